//! The state of the lease machine, of its lease and of each key.

use std::time::Duration;

use tokio::time::Instant;

use crate::keyspace::{LeaseId, Revision};

/// The state of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Granting {
        lease: LeaseId,
    },
    Reading,
    Putting,
    Registered,
    /// Every live key belongs to another server.
    Superseded,
    /// The keys are being removed. `leave_marker` states whether the leave marker (a field in the value) must still be written.
    Leaving {
        leave_marker: bool,
        next: AfterRevoke,
    },
    Paused,
    Deregistered,
}

/// One key and its known state.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyEntry {
    /// The mod revision of the registration's last write of the key. `None` if the key is not known to exist under the registration's
    /// lease.
    pub(super) held: Option<Revision>,
    /// The mod revision that the next put expects, or `None` if no put is needed.
    pub(super) expected: Option<Revision>,
    /// The lease that the key is attached to, if the key belongs to another server.
    pub(super) foreign: Option<LeaseId>,
    /// Whether the key has a value of this server that was written by hand, without a lease, and is neither overwritten nor deleted yet.
    /// The revoke of the lease does not delete such a key.
    pub(super) by_hand: bool,
    pub(super) claim: Claim,
    pub(super) value: Value,
    pub(super) removal: Removal,
    /// The earliest time of the next delete of this key. Each key has its own time, because a rejected delete must not delay requests for
    /// the other keys.
    pub(super) delete_at: Option<Instant>,
}

/// The claim of the registration to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The registration has not written the key yet. Its first put may overwrite the key of another server.
    Open,
    /// The registration has written the key, or has found it with its own value and lease. A key of another server is not overwritten.
    Made,
}

/// Whether etcd has the newest value of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// The newest value is not known to be in etcd.
    Pending,
    /// The newest value is in etcd.
    Written,
}

/// The removal of one key while other keys stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    /// The key stays.
    None,
    /// The key must be deleted.
    Requested,
    /// The key is deleted.
    Done,
}

impl KeyEntry {
    pub(super) const NEW: Self = Self {
        held: None,
        expected: None,
        foreign: None,
        by_hand: false,
        claim: Claim::Open,
        value: Value::Pending,
        removal: Removal::None,
        delete_at: None,
    };

    pub(super) fn is_live(&self) -> bool {
        self.removal == Removal::None
    }

    /// Returns whether clients find the key with a value of this server.
    pub(super) fn is_present(&self) -> bool {
        self.held.is_some() || self.by_hand
    }

    /// Returns whether the newest value must still be written.
    pub(super) fn is_pending(&self) -> bool {
        self.value == Value::Pending
    }

    /// Records a value that was written by hand. The next put overwrites it.
    pub(super) fn claim_by_hand(&mut self, mod_revision: Revision) {
        self.held = None;
        self.foreign = None;
        self.expected = Some(mod_revision);
        self.by_hand = true;
        self.value = Value::Pending;
    }

    /// Records a value that was written by hand although the key must not exist. The value is deleted.
    pub(super) fn remove_by_hand(&mut self) {
        // The put of the leave marker would find another revision, and write no key.
        self.held = None;
        self.by_hand = true;
        if !self.is_live() {
            self.removal = Removal::Requested;
        }
    }

    /// Records that the key no longer exists under the registration's lease.
    pub(super) fn mark_lost(&mut self) {
        self.held = None;
        self.expected = None;
        // A value that was written by hand does not end with the lease.
        if self.removal == Removal::Requested && !self.by_hand {
            self.removal = Removal::Done;
        }
    }
}

/// The watch on the keys of the registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WatchState {
    Closed,
    /// The loss of a key is detected at once.
    Open,
    /// The watch is open, but a read has found a loss that the watch has not delivered.
    MissedLoss,
}

/// The step after the revoke of the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AfterRevoke {
    Pause,
    Deregister,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Lease {
    pub(super) id: LeaseId,
    pub(super) ttl: Duration,
    /// The time at which the lease expires without a further renewal. It is counted from the time at which the last successful grant or
    /// renewal was sent.
    pub(super) expires: Instant,
    pub(super) renew_at: Instant,
    /// Number of failed renewals since the last success.
    pub(super) failed: u32,
    /// From this time on, the next successful renewal is followed by a read of the keys, even if the keys are watched.
    pub(super) verify_at: Instant,
    /// Whether a renewal or a put under this lease has succeeded.
    pub(super) confirmed: bool,
}
