//! The store of the scripted etcd: the keys with their history, the leases, and the raft term.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use etcd_client::proto::{PbEvent, PbKeyValue, PbResponseHeader};
use tokio::time::Instant;

/// A key with its new value and lease, or with `None` for a deletion.
pub(super) type Change = (Vec<u8>, Option<(Vec<u8>, i64)>);

#[derive(Clone, Debug, Default)]
pub(super) struct Store {
    pub(super) revision: i64,
    pub(super) term: u64,
    /// Number of restarts so far. Watch streams end when it changes.
    pub(super) epoch: u64,
    pub(super) keys: BTreeMap<Vec<u8>, PbKeyValue>,
    pub(super) history: Vec<(i64, Vec<PbEvent>)>,
    pub(super) compacted: i64,
    pub(super) leases: HashMap<i64, (Duration, Instant)>,
}

impl Store {
    pub(super) fn new() -> Self {
        Self {
            revision: 1,
            term: 2,
            ..Self::default()
        }
    }

    pub(super) fn header(&self) -> PbResponseHeader {
        PbResponseHeader {
            cluster_id: 7,
            member_id: 1,
            revision: self.revision,
            raft_term: self.term,
        }
    }

    /// Applies puts (with a value and a lease) and deletes as one transaction.
    pub(super) fn apply(&mut self, changes: Vec<Change>) {
        let revision = self.revision + 1;
        let mut events = Vec::new();
        for (key, change) in changes {
            match change {
                Some((value, lease)) => {
                    let before = self.keys.get(&key);
                    let kv = PbKeyValue {
                        key: key.clone(),
                        value,
                        lease,
                        create_revision: before.map_or(revision, |kv| kv.create_revision),
                        mod_revision: revision,
                        version: before.map_or(1, |kv| kv.version + 1),
                    };
                    self.keys.insert(key, kv.clone());
                    events.push(event(0, kv));
                }
                None if self.keys.remove(&key).is_some() => {
                    let gone = PbKeyValue {
                        key,
                        mod_revision: revision,
                        ..PbKeyValue::default()
                    };
                    events.push(event(1, gone));
                }
                None => {}
            }
        }
        if !events.is_empty() {
            self.revision = revision;
            self.history.push((revision, events));
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        self.leases.retain(|_, (_, expires)| *expires > now);
        let dead = |kv: &PbKeyValue| kv.lease != 0 && !self.leases.contains_key(&kv.lease);
        let dead = self.keys.values().filter(|kv| dead(kv));
        let dead: Vec<_> = dead.map(|kv| kv.key.clone()).collect();
        // Each key is deleted at a revision of its own.
        for key in dead {
            self.apply(vec![(key, None)]);
        }
    }

    pub(super) fn compact(&mut self) {
        self.compacted = self.revision;
        self.history
            .retain(|(revision, _)| *revision >= self.revision);
    }

    /// Loses all data, like a member that restarts with the same flags and without its data. The cluster id stays the same, and the
    /// revision and the raft term start again.
    pub(super) fn wipe(&mut self) {
        *self = Self {
            epoch: self.epoch + 1,
            ..Self::new()
        };
    }

    /// Restores a backup, like a member that starts from a backup: leases get their full time again, and raft terms start again.
    pub(super) fn restore(&mut self, backup: &Self, now: Instant) {
        let epoch = self.epoch + 1;
        *self = Self {
            epoch,
            term: 1,
            ..backup.clone()
        };
        for (length, expires) in self.leases.values_mut() {
            *expires = now + *length;
        }
    }

    /// Returns the events of a range from a revision on.
    pub(super) fn events(&self, from: i64, start: &[u8], end: &[u8]) -> Vec<PbEvent> {
        let events = self
            .history
            .iter()
            .filter(|(revision, _)| *revision >= from);
        let events = events.flat_map(|(_, events)| events.iter().cloned());
        let within = |event: &PbEvent| {
            let kv = event.kv.as_ref();
            kv.is_some_and(|kv| kv.key.as_slice() >= start && kv.key.as_slice() < end)
        };
        events.filter(within).collect()
    }

    /// Returns the distinct values of all keys with the prefix, sorted.
    pub(super) fn values(&self, prefix: &str) -> Vec<String> {
        let mine = self
            .keys
            .iter()
            .filter(|(key, _)| key.starts_with(prefix.as_bytes()));
        let values = mine.map(|(_, kv)| String::from_utf8_lossy(&kv.value).into_owned());
        let mut values: Vec<_> = values.collect();
        values.sort();
        values.dedup();
        values
    }
}

fn event(kind: i32, kv: PbKeyValue) -> PbEvent {
    PbEvent {
        r#type: kind,
        kv: Some(kv),
        prev_kv: None,
    }
}
