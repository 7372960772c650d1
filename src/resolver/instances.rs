//! The set of instances, without I/O. Puts and deletes of keys change the set.
//!
//! The unit of load balancing is the address. Several keys may contain the same address, for example after a restart under a new instance
//! id. The key with the highest create revision then describes the address. The address is removed with its last key.

use std::collections::hash_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::format::{Decoder, FormatError};
use crate::instance::{Instance, KeyLocation};
use crate::keyspace::{Event, Key, KeyValue, LeaseId, Range, Revision};
use tonic_balance::Address;

/// The registered instances, indexed by key and by address.
///
/// A *good* value is a value that the [`Decoder`] accepts and that does not exceed a limit. The last good value of a key stays in use
/// until the next good value or a delete.
#[derive(Debug, Default)]
pub(super) struct Instances {
    keys: BTreeMap<Key, Entry>,
    /// The keys that contain each address, ordered by create revision.
    addresses: HashMap<Address, Keys>,
    /// Total size, in bytes, of the keys that have a good value, and of these values.
    bytes: usize,
    /// Number of keys with a good value.
    used: usize,
    limit: Limit,
    /// Of the keys that were rejected because of a limit, the smallest size of a key and its value, in bytes. `None` if no key was rejected
    /// for this reason since [`Instances::take_room`] last returned true.
    smallest_over_limit: Option<usize>,
}

/// The keys that contain one address. Nearly every address has one key, and a set would have memory for eleven.
#[derive(Debug)]
enum Keys {
    One((Revision, Key)),
    Several(BTreeSet<(Revision, Key)>),
}

impl Keys {
    fn insert(&mut self, key: (Revision, Key)) {
        match self {
            Self::One(known) if *known == key => {}
            Self::One(known) => *self = Self::Several(BTreeSet::from([known.clone(), key])),
            Self::Several(keys) => {
                keys.insert(key);
            }
        }
    }

    /// Removes a key. Returns whether no key is left; the value must then be dropped.
    fn remove(&mut self, key: &(Revision, Key)) -> bool {
        match self {
            Self::One(known) => known == key,
            Self::Several(keys) => {
                keys.remove(key);
                keys.is_empty()
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Key> {
        let (one, several) = match self {
            Self::One((_, key)) => (Some(key), None),
            Self::Several(keys) => (None, Some(keys)),
        };
        let several = several.into_iter().flatten().map(|(_, key)| key);
        one.into_iter().chain(several)
    }

    /// Returns the key with the highest create revision.
    fn newest(&self) -> Option<&Key> {
        match self {
            Self::One((_, key)) => Some(key),
            Self::Several(keys) => keys.last().map(|(_, key)| key),
        }
    }
}

/// The state of one key.
#[derive(Debug, Default)]
struct Entry {
    /// The instance from the last good value, if any.
    instance: Option<Instance>,
    /// The latest write of the key, if its value could not be used.
    rejected: Option<Box<Rejected>>,
    /// Size, in bytes, of the key and of its last good value. Zero if the key has no good value.
    bytes: usize,
}

/// A write whose value could not be used.
#[derive(Debug)]
struct Rejected {
    revision: Revision,
    lease: LeaseId,
    reason: FormatError,
}

/// The limits on a set of instances. Keys beyond a limit are rejected, so that a writer cannot fill the memory of every client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) keys: usize,
    pub(super) bytes: usize,
}

impl Default for Limit {
    /// Returns the default limits: 100 000 keys and 64 MiB. 100 000 keys are a thousand times the keys of a service with a hundred
    /// instances. 64 MiB are less than a hundredth of the memory of a host with 8 GiB.
    fn default() -> Self {
        Self {
            keys: 100_000,
            bytes: 64 << 20,
        }
    }
}

/// The outcome of a batch of events.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// Addresses whose instance may have changed or been removed.
    pub(super) changed: Vec<Address>,
    /// For each address that lost its last key: the instance that was at the address. A later event of the batch may have registered the
    /// address again.
    pub(super) vanished: HashMap<Address, Instance>,
    /// Number of writes whose value could not be used. `first_rejected` describes the first such write.
    pub(super) rejected: u64,
    pub(super) first_rejected: Option<(Key, Revision, FormatError)>,
}

impl Instances {
    pub(super) fn new(limit: Limit) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    /// Applies the events of one prefix in order.
    pub(super) fn apply(
        &mut self,
        events: Vec<Event>,
        range: &Range,
        decoder: &Decoder,
    ) -> Applied {
        let mut applied = Applied::default();
        for event in events {
            match event {
                Event::Put(kv) => self.put(kv, range, decoder, &mut applied),
                Event::Delete { key, .. } => self.delete(&key, &mut applied),
            }
        }
        applied
    }

    fn put(&mut self, kv: KeyValue, range: &Range, decoder: &Decoder, applied: &mut Applied) {
        let key = kv.key.to_string();
        let read = match decoder.read(&key, &kv.value) {
            Ok(Some(read)) => read,
            // Either the value marks the instance as out of service, or the key is not the key of an instance. Both cases count as a delete
            // of the key.
            Ok(None) => return self.delete(&kv.key, applied),
            Err(error) => return self.reject(kv, error, applied),
        };
        let bytes = kv.key.as_bytes().len() + kv.value.len();
        if let Err(error) = self.check_limit(&kv.key, bytes) {
            let before = self.keys.get(&kv.key).map_or(0, |entry| entry.bytes);
            let growth = bytes.saturating_sub(before);
            let smallest = self
                .smallest_over_limit
                .map_or(growth, |least| least.min(growth));
            self.smallest_over_limit = Some(smallest);
            return self.reject(kv, error, applied);
        }
        let id = String::from_utf8_lossy(range.suffix(&kv.key)).into_owned();
        let instance = read.at(id, KeyLocation::new(key, &kv));
        let entry = self.keys.entry(kv.key.clone()).or_default();
        entry.rejected = None;
        self.bytes = self.bytes - entry.bytes + bytes;
        self.used += usize::from(entry.bytes == 0);
        entry.bytes = bytes;
        if entry.instance.as_ref() == Some(&instance) {
            return;
        }
        let before = entry.instance.replace(instance.clone());
        if let Some(before) = before {
            let unnamed = self.unname(&before, &kv.key);
            if before.address() != instance.address() {
                applied.changed.push(before.address().clone());
                if unnamed {
                    applied.vanished.insert(before.address().clone(), before);
                }
            }
        }
        let named = (created(&instance), kv.key);
        match self.addresses.entry(instance.address().clone()) {
            Slot::Vacant(vacant) => {
                vacant.insert(Keys::One(named));
            }
            Slot::Occupied(mut keys) => keys.get_mut().insert(named),
        }
        applied.changed.push(instance.address().clone());
    }

    /// Records a write whose value cannot be used. The last good value of the key stays in use. A write that is recorded is counted once,
    /// however often a list contains it.
    fn reject(&mut self, kv: KeyValue, error: FormatError, applied: &mut Applied) {
        let is_known = self.keys.contains_key(&kv.key);
        // `used` does not count keys without a good value, so the difference is the number of such keys.
        if !is_known && self.keys.len() - self.used >= REJECTED {
            // There is no room to record the write. It is counted, and is counted again with each list. `Instances::rejected` does not
            // return it.
            applied.rejected += 1;
            applied
                .first_rejected
                .get_or_insert((kv.key, kv.mod_revision, error));
            return;
        }
        let entry = self.keys.entry(kv.key.clone()).or_default();
        let write = Rejected {
            revision: kv.mod_revision,
            lease: kv.lease,
            reason: error.clone(),
        };
        let before = entry.rejected.replace(Box::new(write));
        let is_same =
            |before: Box<Rejected>| (before.revision, before.lease) == (kv.mod_revision, kv.lease);
        if !before.is_some_and(is_same) {
            applied.rejected += 1;
            applied
                .first_rejected
                .get_or_insert((kv.key, kv.mod_revision, error));
        }
    }

    fn check_limit(&self, key: &Key, bytes: usize) -> Result<(), FormatError> {
        let before = self.keys.get(key).map_or(0, |entry| entry.bytes);
        let is_new = before == 0;
        let Limit {
            keys: most_keys,
            bytes: most_bytes,
        } = self.limit;
        if is_new && self.used >= most_keys {
            let reason = format!("is over the resolver's limit of {most_keys} keys");
            return Err(FormatError::new(reason));
        }
        if bytes > before && self.bytes - before + bytes > most_bytes {
            let reason = format!("is over the resolver's limit of {most_bytes} bytes");
            return Err(FormatError::new(reason));
        }
        Ok(())
    }

    /// Returns whether values that were rejected because of a limit could be accepted now. The prefixes must then be listed again, because
    /// these values were not kept. Returns true only while a tenth of each limit is free, and the smallest of these values fits. Without
    /// this condition, a set that stays at a limit would cause a list for each removed key. After a call that returned true, the next calls
    /// return false until a limit causes another rejection.
    pub(super) fn take_room(&mut self) -> bool {
        let Limit { keys, bytes } = self.limit;
        let Some(smallest) = self.smallest_over_limit else {
            return false;
        };
        let has_room = self.used < keys
            && self.used <= keys - keys / 10
            && self.bytes.saturating_add(smallest) <= bytes
            && self.bytes <= bytes - bytes / 10;
        if has_room {
            self.smallest_over_limit = None;
        }
        has_room
    }

    /// Returns the keys whose latest value is not used, with the revision of the write and the reason.
    pub(super) fn rejected(&self) -> impl Iterator<Item = (&Key, Revision, &FormatError)> {
        self.keys.iter().filter_map(|(key, entry)| {
            let Rejected {
                revision, reason, ..
            } = entry.rejected.as_deref()?;
            Some((key, *revision, reason))
        })
    }

    fn delete(&mut self, key: &Key, applied: &mut Applied) {
        let entry = self.keys.remove(key);
        let bytes = entry.as_ref().map_or(0, |entry| entry.bytes);
        self.bytes -= bytes;
        self.used -= usize::from(bytes > 0);
        if let Some(before) = entry.and_then(|entry| entry.instance) {
            applied.changed.push(before.address().clone());
            if self.unname(&before, key) {
                applied.vanished.insert(before.address().clone(), before);
            }
        }
    }

    /// Removes a key from the keys of its address. Returns whether it was the last key of the address.
    fn unname(&mut self, before: &Instance, key: &Key) -> bool {
        let Some(keys) = self.addresses.get_mut(before.address()) else {
            return false;
        };
        let unnamed = keys.remove(&(created(before), key.clone()));
        if unnamed {
            self.addresses.remove(before.address());
        }
        unnamed
    }

    /// Returns the keys that contain an address.
    pub(super) fn keys(&self, address: &Address) -> impl Iterator<Item = &Key> {
        let keys = self.addresses.get(address).into_iter();
        keys.flat_map(Keys::iter)
    }

    /// Returns the instance at an address, if one is registered.
    pub(super) fn get(&self, address: &Address) -> Option<&Instance> {
        let key = self.addresses.get(address)?.newest()?;
        self.keys.get(key)?.instance.as_ref()
    }

    /// Returns one instance per address, in arbitrary order.
    pub(super) fn instances(&self) -> impl Iterator<Item = &Instance> {
        self.addresses
            .keys()
            .filter_map(|address| self.get(address))
    }

    /// Returns the number of addresses.
    pub(super) fn len(&self) -> usize {
        self.addresses.len()
    }
}

/// Limit on the keys without a good value that are kept, so that [`Instances::rejected`] can return them.
const REJECTED: usize = 1_000;

/// Returns the create revision of an instance's key.
fn created(instance: &Instance) -> Revision {
    instance
        .location()
        .map_or(Revision::ZERO, KeyLocation::create_revision)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    fn put(key: &str, value: &str, create: i64, modified: i64, lease: i64) -> Event {
        Event::Put(KeyValue {
            key: key.into(),
            value: value.as_bytes().to_vec(),
            create_revision: Revision::new(create),
            mod_revision: Revision::new(modified),
            lease: LeaseId::new(lease),
        })
    }

    fn delete(key: &str, revision: i64) -> Event {
        Event::Delete {
            key: key.into(),
            mod_revision: Revision::new(revision),
        }
    }

    fn apply(snapshot: &mut Instances, events: impl IntoIterator<Item = Event>) -> Applied {
        snapshot.apply(
            events.into_iter().collect(),
            &Range::prefix("/s/"),
            &Decoder::default(),
        )
    }

    fn known(snapshot: &Instances) -> Vec<String> {
        let mut known: Vec<_> = snapshot
            .instances()
            .map(|instance| {
                format!(
                    "{}={}",
                    instance.id().unwrap_or_default(),
                    instance.address()
                )
            })
            .collect();
        known.sort();
        known
    }

    #[test]
    fn room_is_reported_when_a_tenth_of_an_exceeded_limit_is_free() {
        let mut set = Instances::new(Limit {
            keys: 10,
            bytes: 10_000,
        });
        let key = |number: i64| format!("/s/{number:02}");
        let puts = (1..=11).map(|number| {
            put(
                &key(number),
                &format!("10.0.0.{number}:80"),
                number,
                number,
                1,
            )
        });
        assert_eq!(apply(&mut set, puts).rejected, 1);
        assert!(!set.take_room());
        apply(&mut set, [delete(&key(1), 12)]);
        assert!(set.take_room());
        assert!(!set.take_room(), "free room must be reported only once");
        // A value that can never fit must not cause lists.
        let large = "x".repeat(10_000);
        let large = format!("{{\"Addr\":\"10.0.0.2:80\",\"Metadata\":\"{large}\"}}");
        let applied = apply(&mut set, [put(&key(20), &large, 20, 20, 1)]);
        assert_eq!(applied.rejected, 1);
        assert!(!set.take_room());
    }

    #[test]
    fn keys_beyond_the_limits_are_rejected_and_listed() {
        let mut set = Instances::new(Limit {
            keys: 2,
            bytes: 100,
        });
        let puts = ["/s/a", "/s/b", "/s/c"].map(|key| put(key, "10.0.0.1:80", 1, 1, 1));
        let applied = apply(&mut set, puts);
        assert_eq!(applied.rejected, 1);
        let rejected: Vec<_> = set
            .rejected()
            .map(|(key, revision, reason)| format!("{key} {revision} {reason}"))
            .collect();
        assert_eq!(rejected, ["/s/c 1 is over the resolver's limit of 2 keys"]);
        // A value over the limit on bytes does not replace the last good value.
        let large = format!(
            "{{\"Addr\":\"10.0.0.2:80\",\"Metadata\":\"{}\"}}",
            "x".repeat(90)
        );
        let applied = apply(&mut set, [put("/s/a", &large, 1, 2, 1)]);
        assert_eq!((applied.rejected, applied.changed.len()), (1, 0));
        assert_eq!(
            known(&set),
            ["b=10.0.0.1:80"],
            "two keys of one address must be one instance"
        );
        // Deleted keys no longer count towards the limit.
        apply(&mut set, [delete("/s/b", 3), delete("/s/c", 3)]);
        let applied = apply(&mut set, [put("/s/d", "10.0.0.4:80", 4, 4, 1)]);
        assert_eq!(applied.rejected, 0);
        // A good value ends the rejection.
        apply(&mut set, [put("/s/a", "10.0.0.1:80", 1, 5, 1)]);
        assert_eq!(set.rejected().count(), 0);
    }

    #[test]
    fn keys_without_a_good_value_do_not_use_up_the_limit() {
        let mut set = Instances::new(Limit {
            keys: 1,
            bytes: 1_000,
        });
        let bad = ["/s/a", "/s/b"].map(|key| put(key, "{", 1, 1, 1));
        assert_eq!(apply(&mut set, bad).rejected, 2);
        apply(&mut set, [put("/s/c", "10.0.0.3:80", 2, 2, 1)]);
        assert_eq!(known(&set), ["c=10.0.0.3:80"]);
        let corrected = || [put("/s/a", "10.0.0.1:80", 1, 3, 1)];
        assert_eq!(
            apply(&mut set, corrected()).rejected,
            1,
            "a corrected value must be rejected while the set is at its limit"
        );
        apply(&mut set, [delete("/s/c", 4)]);
        assert_eq!(apply(&mut set, corrected()).rejected, 0);
        assert_eq!(known(&set), ["a=10.0.0.1:80"]);
    }

    #[test]
    fn keys_of_one_address_are_one_instance_until_the_last_is_deleted() {
        let mut snapshot = Instances::default();
        apply(
            &mut snapshot,
            [
                put("/s/a", "1.1.1.1:1", 2, 2, 7),
                put("/s/b", "1.1.1.1:1", 3, 3, 8),
            ],
        );
        assert_eq!(
            known(&snapshot),
            ["b=1.1.1.1:1"],
            "the key created last must describe the address"
        );
        apply(&mut snapshot, [delete("/s/b", 4)]);
        assert_eq!(
            known(&snapshot),
            ["a=1.1.1.1:1"],
            "the address must stay while one of its keys exists"
        );
        let applied = apply(&mut snapshot, [delete("/s/a", 5)]);
        assert_eq!(known(&snapshot), [""; 0]);
        assert_eq!(applied.changed.len(), 1);
    }

    #[test]
    fn a_key_with_a_new_address_removes_its_old_address() {
        let mut snapshot = Instances::default();
        apply(&mut snapshot, [put("/s/a", "1.1.1.1:1", 2, 2, 7)]);
        let applied = apply(&mut snapshot, [put("/s/a", "2.2.2.2:2", 2, 3, 7)]);
        assert_eq!(known(&snapshot), ["a=2.2.2.2:2"]);
        assert_eq!(applied.changed.len(), 2, "both addresses must change");
    }

    #[test]
    fn an_invalid_value_is_counted_once_per_write_and_the_last_good_one_stays() {
        let mut snapshot = Instances::default();
        apply(&mut snapshot, [put("/s/a", "1.1.1.1:1", 2, 2, 7)]);
        let garbage = || put("/s/a", "{", 2, 3, 7);
        let applied = apply(&mut snapshot, [garbage(), garbage()]);
        assert_eq!((applied.rejected, applied.changed.len()), (1, 0));
        assert_eq!(
            apply(&mut snapshot, [garbage()]).rejected,
            0,
            "a write that is listed again must not be counted again"
        );
        assert_eq!(known(&snapshot), ["a=1.1.1.1:1"]);
        let applied = apply(&mut snapshot, [put("/s/a", "{", 2, 4, 7)]);
        assert_eq!(applied.rejected, 1, "the next write must be counted");
        apply(&mut snapshot, [delete("/s/a", 5)]);
        assert_eq!(snapshot.len(), 0);
    }

    #[test]
    fn a_key_marked_out_of_service_is_removed_and_not_rejected() {
        let mut snapshot = Instances::default();
        let decoder = Decoder {
            format: Some(Format::Rpcx),
            ..Decoder::default()
        };
        let mut apply = |value| {
            let event = put("/s/tcp@1.1.1.1:1", value, 2, 2, 7);
            let applied = snapshot.apply(vec![event], &Range::prefix("/s/"), &decoder);
            (applied.rejected, snapshot.len())
        };
        assert_eq!(apply("weight=2"), (0, 1));
        assert_eq!(apply("weight=2&state=inactive"), (0, 0));
        assert_eq!(apply("weight=2"), (0, 1));
    }

    #[test]
    fn a_key_that_is_listed_again_is_a_change_only_under_another_lease() {
        let mut snapshot = Instances::default();
        apply(&mut snapshot, [put("/s/a", "1.1.1.1:1", 2, 2, 7)]);
        assert!(
            apply(&mut snapshot, [put("/s/a", "1.1.1.1:1", 2, 2, 7)])
                .changed
                .is_empty()
        );
        let again = apply(&mut snapshot, [put("/s/a", "1.1.1.1:1", 2, 2, 8)]);
        assert_eq!(
            again.changed.len(),
            1,
            "a key under another lease must be a change"
        );
    }

    #[test]
    fn the_key_that_was_created_last_describes_its_address() {
        let mut set = Instances::default();
        let address = "1.1.1.1:1";
        let keys = [("/s/b", 2), ("/s/a", 4), ("/s/c", 3)];
        apply(&mut set, keys.map(|(key, at)| put(key, address, at, at, 7)));
        assert_eq!(known(&set), ["a=1.1.1.1:1"]);
        let keys: Vec<_> = set.keys(&address.parse().expect("valid")).collect();
        let expected = ["/s/b", "/s/c", "/s/a"].map(Key::from);
        assert_eq!(keys, expected.iter().collect::<Vec<_>>());
    }

    #[test]
    fn an_address_vanishes_with_its_last_key() {
        for moves in [true, false] {
            let mut set = Instances::default();
            let keys = ["/s/a", "/s/b"];
            apply(&mut set, keys.map(|key| put(key, "1.1.1.1:1", 2, 2, 7)));
            for (key, last) in [("/s/a", false), ("/s/b", true)] {
                let event = if moves {
                    put(key, "2.2.2.2:2", 2, 3, 7)
                } else {
                    delete(key, 3)
                };
                let vanished = apply(&mut set, [event]).vanished;
                let address = "1.1.1.1:1".parse().expect("valid");
                assert_eq!(vanished.contains_key(&address), last, "{key}");
                assert!(vanished.len() <= 1);
            }
        }
    }

    #[test]
    fn the_limit_on_bytes_counts_the_last_good_value_of_each_key() {
        let size = "/s/a1".len() + "10.0.0.1:80".len();
        let mut set = Instances::new(Limit {
            keys: 10,
            bytes: 2 * size + 1,
        });
        let mut rejected = |key, value, at| apply(&mut set, [put(key, value, 1, at, 1)]).rejected;
        assert_eq!(rejected("/s/a1", "10.0.0.1:80", 1), 0);
        assert_eq!(rejected("/s/a2", "10.0.0.2:80", 2), 0);
        assert_eq!(rejected("/s/a1", "10.0.0.1:801", 3), 0, "the exact limit");
        assert_eq!(rejected("/s/a1", "10.0.0.1:8012", 4), 1);
        assert!(!set.take_room(), "all bytes are used");
        apply(&mut set, [delete("/s/a2", 5)]);
        assert!(set.take_room());
        let next = apply(&mut set, [put("/s/a3", "10.0.0.3:80", 6, 6, 1)]);
        assert_eq!(next.rejected, 0);
    }

    #[test]
    fn rejected_writes_beyond_the_limit_are_counted_but_not_kept() {
        let mut set = Instances::new(Limit {
            keys: 2,
            bytes: 1_000,
        });
        let bad = |number: usize, at| put(&format!("/s/{number}"), "{", 1, at, 1);
        let applied = apply(&mut set, (0..1_100).map(|number| bad(number, 1)));
        assert_eq!(applied.rejected, 1_100);
        assert_eq!(set.rejected().count(), REJECTED);
        let applied = apply(&mut set, [bad(0, 2)]);
        assert_eq!(applied.rejected, 1, "a key that is kept");
        let latest = set.rejected().map(|(_, revision, _)| revision).max();
        assert_eq!(latest, Some(Revision::new(2)));
        let applied = apply(&mut set, [bad(2_000, 3)]);
        let (key, ..) = applied.first_rejected.expect("a rejected write");
        assert_eq!(key, Key::from("/s/2000"));
    }

    /// In a store that was restored, another write can have the same revision.
    #[test]
    fn a_rejected_write_of_another_lease_is_counted() {
        let mut set = Instances::default();
        let applied = apply(&mut set, [7, 8].map(|lease| put("/s/a", "{", 2, 3, lease)));
        assert_eq!(applied.rejected, 2);
    }
}
