//! The lease machine: the state machine of one registration. The owner task asks the machine for the next command and executes the command.
//! It passes three kinds of input to the machine: the results of the commands, the events of the watch on the keys, and the requests of the
//! application, such as a pause.

use std::time::Duration;

use tokio::time::Instant;

use super::state::{Claim, KeyEntry, Lease, Removal, State, Value, WatchState};
use crate::backoff::Backoff;
use crate::error::EtcdError;
use crate::keyspace::{KeyValue, LeaseId, Revision};

/// The next command for the owner task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::registration) enum Command {
    /// Grant this lease. The result is passed to [`Machine::on_granted`].
    Grant { lease: LeaseId, deadline: Duration },
    /// Read the keys of [`Machine::reads`] linearizably. The result is passed to [`Machine::on_read`].
    Read { deadline: Duration },
    /// In one transaction, put the value under the keys of [`Machine::puts`]. If `leaving` is set, the value contains the leave marker, a
    /// field that tells clients that the server is leaving. The transaction writes nothing unless each key has its expected mod revision.
    /// The result is passed to [`Machine::on_put`].
    Put {
        lease: LeaseId,
        leaving: bool,
        deadline: Duration,
    },
    /// Delete this key if it is attached to this lease, or if it has no lease and the address of the registration. With [`LeaseId::NONE`],
    /// only the second condition applies. If `leave_marker` is set, first write the leave marker, on the condition that the key still has
    /// the given mod revision. The result of the delete is passed to [`Machine::on_deleted`].
    Delete {
        index: usize,
        lease: LeaseId,
        leave_marker: Option<Revision>,
        deadline: Duration,
    },
    /// Renew the lease, and reject a response with a raft term below `term`. The result is passed to [`Machine::on_renewed`].
    Renew {
        lease: LeaseId,
        term: u64,
        deadline: Duration,
    },
    /// Revoke the lease. The result is passed to [`Machine::on_revoked`].
    Revoke { lease: LeaseId, deadline: Duration },
    /// Wait until this time, an event on a key, or a request, whichever is first.
    Wait { until: Option<Instant> },
    /// End the task.
    End,
}

/// The state machine of one registration.
#[derive(Debug)]
pub(in crate::registration) struct Machine {
    pub(super) ttl: Duration,
    pub(super) state: State,
    pub(super) lease: Option<Lease>,
    /// Earlier leases whose revoke was not confirmed. Own keys may still be attached to them.
    pub(super) unrevoked: Vec<LeaseId>,
    /// The earliest time of the next revoke of an earlier lease.
    pub(super) revoke_at: Option<Instant>,
    /// The lease id of the last failed grant. etcd may have granted the lease, although the client received an error.
    pub(super) failed_grant: Option<LeaseId>,
    /// The leases that were granted to this registration. A key that is attached to one of them belongs to this registration.
    pub(super) granted: Vec<LeaseId>,
    /// The raft term of the last linearizable read, or of a later renewal.
    pub(super) term: u64,
    pub(super) keys: Vec<KeyEntry>,
    /// In the states `Leaving` and `Paused`: whether the keys must be read, to find values that were written by hand. Such a value has no
    /// lease, so the revoke does not delete it, and it would remain for ever after the end of the server.
    pub(super) search: bool,
    pub(super) watch_state: WatchState,
    /// Whether a renewal or the watch has failed since the last successful renewal.
    pub(super) disturbed: bool,
    /// Whether the format has a leave marker.
    pub(super) has_leave_marker: bool,
    /// Before this time, only renewals are sent. There is one exception: in the state `Superseded`, this time delays only the next read of
    /// the keys.
    pub(super) not_before: Option<Instant>,
    pub(super) backoff: Backoff,
    pub(super) rng: fastrand::Rng,
    pub(in crate::registration) failures: u64,
    pub(in crate::registration) last_error: Option<EtcdError>,
}

/// The result of the read of one key.
#[derive(Clone, Debug)]
pub(in crate::registration) struct Found {
    pub(in crate::registration) index: usize,
    pub(in crate::registration) kv: Option<KeyValue>,
    /// Whether the value of the key in etcd is the registration's current value.
    pub(in crate::registration) current: bool,
    /// Whether the key has no lease and the address of this registration: the value was written by hand.
    pub(in crate::registration) by_hand: bool,
}

/// A guarded put: the key is written only if it has the expected mod revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::registration) struct Put {
    pub(in crate::registration) index: usize,
    pub(in crate::registration) expected: Revision,
}

/// The state of a registration as reported to its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::registration) enum Phase {
    Registering,
    Registered { lease: LeaseId, expires: Instant },
    Superseded(LeaseId),
    Leaving,
    Paused,
    Deregistered,
}

impl Machine {
    pub(in crate::registration) fn new(
        ttl: Duration,
        keys: usize,
        has_leave_marker: bool,
        mut rng: fastrand::Rng,
    ) -> Self {
        let bound = (ttl / 4).min(RETRY_MAX);
        Self {
            ttl,
            state: State::Granting {
                lease: LeaseId::random(&mut rng),
            },
            lease: None,
            unrevoked: Vec::new(),
            revoke_at: None,
            failed_grant: None,
            granted: Vec::new(),
            term: 0,
            keys: vec![KeyEntry::NEW; keys],
            search: false,
            watch_state: WatchState::Closed,
            disturbed: false,
            has_leave_marker,
            not_before: None,
            backoff: Backoff::new(RETRY_FIRST, bound),
            rng,
            failures: 0,
            last_error: None,
        }
    }

    /// Returns the phase. `Registered` means that clients find every key: it is known to exist under the registration's lease, or with a
    /// value of this server that was written by hand and is about to be overwritten. It also means that the lease cannot have expired yet.
    /// If one of the keys belongs to another server, the phase is `Superseded`, even if all other keys are registered.
    pub(in crate::registration) fn phase(&self, now: Instant) -> Phase {
        match self.state {
            State::Leaving { .. } => return Phase::Leaving,
            State::Paused => return Phase::Paused,
            State::Deregistered => return Phase::Deregistered,
            _ => {}
        }
        if let Some(lease) = self.live_entries().find_map(|entry| entry.foreign) {
            return Phase::Superseded(lease);
        }
        // While the machine reads the keys again or puts a new value, the old value stays in etcd, so the phase does not change.
        match &self.lease {
            Some(lease) if self.live_entries().all(KeyEntry::is_present) && now < lease.expires => {
                Phase::Registered {
                    lease: lease.id,
                    expires: lease.expires,
                }
            }
            _ => Phase::Registering,
        }
    }

    /// Returns whether the newest value of every live key is in etcd, under the registration's lease.
    pub(in crate::registration) fn is_written(&self) -> bool {
        self.state == State::Registered && !self.live_entries().any(KeyEntry::is_pending)
    }

    /// Returns whether the key with this index is removed for good. Also returns true if no key has this index.
    pub(in crate::registration) fn is_gone(&self, index: usize) -> bool {
        let is_deleted = |entry: &KeyEntry| entry.removal == Removal::Done;
        self.state == State::Deregistered || self.keys.get(index).is_none_or(is_deleted)
    }

    /// Returns the indexes of the live keys: neither removed nor being removed.
    pub(in crate::registration) fn live(&self) -> impl Iterator<Item = usize> {
        let live = |(index, entry): (usize, &KeyEntry)| entry.is_live().then_some(index);
        self.keys.iter().enumerate().filter_map(live)
    }

    /// Returns the indexes of the keys of the next [`Command::Read`]: the keys that the registration has written, also those of removed
    /// services, and, while the server must be registered, the other live keys.
    pub(in crate::registration) fn reads(&self) -> Vec<usize> {
        let is_out = matches!(self.state, State::Leaving { .. } | State::Paused);
        let is_read = |entry: &KeyEntry| entry.claim == Claim::Made || entry.is_live() && !is_out;
        let keys = self.keys.iter().enumerate();
        keys.filter_map(|(index, entry)| is_read(entry).then_some(index))
            .collect()
    }

    /// Returns whether the registration has written a key.
    pub(in crate::registration) fn has_written(&self) -> bool {
        self.keys.iter().any(|entry| entry.claim == Claim::Made)
    }

    /// Returns the puts of the next [`Command::Put`], at most 100.
    pub(in crate::registration) fn puts(&self) -> Vec<Put> {
        let leaving = matches!(self.state, State::Leaving { .. });
        let puts = self.keys.iter().enumerate().filter_map(|(index, entry)| {
            let expected = if leaving { entry.held } else { entry.expected };
            let expected = expected.filter(|_| entry.is_live())?;
            Some(Put { index, expected })
        });
        puts.take(PUTS_MAX).collect()
    }

    pub(super) fn live_entries(&self) -> impl Iterator<Item = &KeyEntry> {
        self.keys.iter().filter(|entry| entry.is_live())
    }

    /// Returns whether the watch on the keys is open, but has not delivered the loss of a key. The watch must then be opened again.
    pub(in crate::registration) fn has_missed_loss(&self) -> bool {
        self.watch_state == WatchState::MissedLoss
    }

    /// Returns the time at which the lease expires. At that time, the phase can change although the machine receives no input.
    pub(in crate::registration) fn expires(&self) -> Option<Instant> {
        self.lease.map(|lease| lease.expires)
    }

    /// Records that the value has changed.
    pub(in crate::registration) fn on_new_value(&mut self) {
        for entry in &mut self.keys {
            entry.value = Value::Pending;
        }
    }

    /// Returns whether a value that was written by hand applies. Before the registration has written the key, such a value is from an
    /// earlier run of the server. A server that leaves uses no new value.
    pub(in crate::registration) fn accepts_edit(&self, index: usize) -> bool {
        let is_claimed = |entry: &KeyEntry| entry.claim == Claim::Made && entry.is_live();
        !matches!(self.state, State::Leaving { .. }) && self.keys.get(index).is_some_and(is_claimed)
    }

    /// Returns the id of the current lease.
    pub(in crate::registration) fn lease_id(&self) -> Option<LeaseId> {
        self.lease.map(|lease| lease.id)
    }

    /// Handles a value with the registration's own address and without a lease: an operator has edited the value by hand, for example with
    /// `etcdctl put`, which detaches the key from its lease. The key is written again, under the lease. Otherwise, it would remain for ever
    /// after the end of the server. If the server is paused, or the service of the key is removed, the key is deleted instead.
    /// Returns whether the machine has accepted the value. In other states than `Registered`, a later read finds it.
    pub(in crate::registration) fn on_put_by_hand(&mut self, index: usize, kv: &KeyValue) -> bool {
        let Some(entry) = self.keys.get_mut(index) else {
            return false;
        };
        let is_newer = entry.held.is_none_or(|held| kv.mod_revision > held);
        if !is_newer || entry.claim == Claim::Open {
            return false;
        }
        if !entry.is_live() {
            entry.remove_by_hand();
            return false;
        }
        match self.state {
            State::Registered => {
                entry.claim_by_hand(kv.mod_revision);
                self.state = State::Putting;
                return true;
            }
            State::Superseded => {
                entry.foreign = None;
                // A deregistration before the read must delete the key.
                entry.by_hand = true;
                self.register();
            }
            State::Leaving { .. } | State::Paused => entry.by_hand = true,
            _ => {}
        }
        false
    }

    /// Records the lease for a later revoke, which also deletes the keys that are still attached to it.
    pub(super) fn record_unrevoked(&mut self) {
        self.unrevoked.extend(self.lease.map(|lease| lease.id));
        if self.unrevoked.len() > UNREVOKED_KEPT {
            self.unrevoked.remove(0);
        }
    }

    /// Forgets the lease, and marks all keys as lost.
    pub(super) fn lose_lease(&mut self) {
        self.lease = None;
        for entry in &mut self.keys {
            entry.mark_lost();
        }
    }
}

/// Limit of the backoff step for TTLs above 12 s. For shorter TTLs, the limit is a quarter of the TTL. With a long TTL, a quarter would be
/// too long: with a TTL of 10 minutes, a lost entry could be missing for up to 150 s after etcd has recovered.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(3);
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Maximum timeout of a request. A healthy member responds within milliseconds.
pub(super) const DEADLINE_MAX: Duration = Duration::from_secs(2);
/// Maximum TTL that is accepted from etcd. No registration requests a longer TTL, so a longer TTL in a response is a fault of the store,
/// and is capped.
pub(super) const TTL_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Maximum timeout of the request that writes the leave marker, and of the reads that find values that were written by hand. These
/// requests are best effort, and the revoke needs most of the deregister timeout.
pub(in crate::registration) const LEAVE_MARKER_MAX: Duration = Duration::from_millis(500);
/// Maximum wait between attempts while etcd rejects the credentials or denies the permission.
pub(super) const OPERATOR_WAIT: Duration = Duration::from_secs(30);
/// Maximum time from a read of the keys until the next read is due; the minimum is half of it. A read that is due is sent after the next
/// successful renewal. The watch reports the loss of a key at once, so these reads only find a loss that the watch has not delivered. While
/// the keys are not watched, they are read after each renewal.
pub(super) const VERIFY_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum time between two reads while every live key belongs to another server; the minimum is half of it. The reads detect the deletion
/// of a key even if the watch cannot be opened.
pub(super) const SUPERSEDED_READ: Duration = Duration::from_secs(10);
/// Maximum number of puts in one transaction. etcd rejects more than 128 operations with its default settings.
const PUTS_MAX: usize = 100;
/// Maximum number of leases in [`Machine::granted`]. The oldest lease is forgotten first. A lease that was replaced so many times has been
/// revoked or has expired in practice, so no key is attached to it.
pub(super) const GRANTED_KEPT: usize = 64;
/// Maximum number of earlier leases that are kept for a later revoke. An earlier lease is kept, for example, if the registration is paused
/// and resumed during an outage. Beyond this number, the oldest lease is not revoked and expires by itself.
const UNREVOKED_KEPT: usize = 8;
