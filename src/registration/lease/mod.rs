//! The machine of one registration, of one key or of several under one lease: pure, so that every order of answers can be played to it.
//!
//! ```text
//!                    ┌──────────── lease gone ────────────┐
//!                    ▼                                    │
//!   start ──▶ Granting ──▶ Reading ──▶ Putting ──▶ Registered ◀─┐ renew at TTL/3
//!               ▲  ▲         │ ▲          │          │ │  └─────┘
//!               │  │ foreign │ └─conflict─┘          │ │
//!               │  │         ▼                       │ └─ deleted, new value, time to verify ──▶ Reading
//!               │  └─── Superseded ◀── foreign put ──┘
//!               │   key gone
//!               └── resume ── Paused ◀── pause ── Leaving ── deregister ──▶ Deregistered
//! ```
//!
//! The state alone says what to do next ([`Machine::command`]); a command may be dropped half way and is then simply given again. That
//! is safe because every write is guarded: by the key's mod revision, and by a lease that dies with the registration.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::error::EtcdError;
use crate::keyspace::{KeyValue, LeaseId, Revision};

mod answers;
mod command;

/// What the owner task is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Grant this lease; answer with [`Machine::on_granted`].
    Grant { lease: LeaseId, deadline: Duration },
    /// Read the keys of [`Machine::live`] linearizably; answer with [`Machine::on_read`].
    Read { deadline: Duration },
    /// Put the value, marked as leaving or not, under the keys of [`Machine::puts`], all of them or none, if the mod revision of each is
    /// as expected; answer with [`Machine::on_put`].
    Put {
        lease: LeaseId,
        leaving: bool,
        deadline: Duration,
    },
    /// Delete this key if it is under this lease, once it says that the instance is leaving, where it was last written at this revision;
    /// answer with [`Machine::on_deleted`].
    Delete {
        index: usize,
        lease: LeaseId,
        leave_marker: Option<Revision>,
        deadline: Duration,
    },
    /// Renew the lease, and take no answer out of a raft term below this one; answer with [`Machine::on_renewed`].
    Renew {
        lease: LeaseId,
        term: u64,
        deadline: Duration,
    },
    /// Revoke the lease; answer with [`Machine::on_revoked`].
    Revoke { lease: LeaseId, deadline: Duration },
    /// Wait for this moment, for an event on the key, or for a request.
    Wait { until: Option<Instant> },
    /// All is done.
    End,
}

/// The machine.
#[derive(Debug)]
pub(super) struct Machine {
    ttl: Duration,
    state: State,
    lease: Option<Lease>,
    /// Leases before it, which keys of ours may still hang on: a revoke of them had no answer.
    unrevoked: Vec<LeaseId>,
    /// None of them is revoked before it.
    revoke_at: Option<Instant>,
    /// The lease whose grant was asked for and had no answer.
    asked: Option<LeaseId>,
    /// The leases this registration was granted: keys under them are its own.
    granted: Vec<LeaseId>,
    /// The raft term of the last linearizable read, or of a later renewal.
    term: u64,
    keys: Vec<Place>,
    /// Whether the owner task watches the keys, so that a loss is seen at once.
    key_watched: bool,
    /// Whether etcd was out of reach, for a renewal or for the watch, since the last good renewal.
    disturbed: bool,
    /// Whether the value can say that the instance is leaving.
    has_leave_marker: bool,
    /// Nothing but renewals is sent before it.
    not_before: Option<Instant>,
    backoff: Backoff,
    rng: fastrand::Rng,
    pub(super) failures: u64,
    pub(super) last_error: Option<EtcdError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Granting {
        lease: LeaseId,
    },
    Reading,
    Putting,
    Registered,
    /// Others have every key.
    Superseded,
    /// Taking the keys away. `leave_marker`: the last word, that the instance is leaving, is still to be written.
    Leaving {
        leave_marker: bool,
        next: After,
    },
    Paused,
    Deregistered,
}

/// One key, and what is known of it.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each holds in several states, and is true or false in all of them"
)]
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Where the key was last written under our lease, while it is there.
    held: Option<Revision>,
    /// The mod revision at which the key is to be written over.
    expected: Option<Revision>,
    /// Under whose lease the key is, if another has it.
    foreign: Option<LeaseId>,
    /// Whether the next write takes the key over from whoever holds it: true until the first one.
    claiming: bool,
    /// Whether the value at hand is newer than the one in etcd.
    dirty: bool,
    /// Whether the key is to go while others stay.
    leaving: bool,
    gone: bool,
    /// It is not deleted before that: one whose deletion is refused must not keep the others from what they need.
    delete_at: Option<Instant>,
}

impl Place {
    const NEW: Self = Self {
        held: None,
        expected: None,
        foreign: None,
        claiming: true,
        dirty: true,
        leaving: false,
        gone: false,
        delete_at: None,
    };

    fn is_live(&self) -> bool {
        !self.leaving && !self.gone
    }

    /// The key has gone with its lease.
    fn lose(&mut self) {
        self.held = None;
        self.expected = None;
        self.gone |= self.leaving;
    }
}

/// A key as it was read.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) index: usize,
    pub(super) kv: Option<KeyValue>,
    /// Whether its value is the one at hand.
    pub(super) current: bool,
}

/// A key that is to be written if its mod revision is as expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Put {
    pub(super) index: usize,
    pub(super) expected: Revision,
}

/// What comes after the lease is revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Pause,
    Deregister,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    id: LeaseId,
    ttl: Duration,
    /// When it ends if no renewal gets through, counted from when the last good one was sent.
    expires: Instant,
    renew_at: Instant,
    /// Failed renewals since the last good one.
    failed: u32,
    /// Good renewals since the keys were last read.
    unverified: u32,
    /// Whether it was ever renewed or written under.
    proven: bool,
}

/// Where a registration stands, for its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Registering,
    Registered { lease: LeaseId, expires: Instant },
    Superseded(LeaseId),
    Leaving,
    Paused,
    Deregistered,
}

impl Machine {
    pub(super) fn new(
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
            asked: None,
            granted: Vec::new(),
            term: 0,
            keys: vec![Place::NEW; keys],
            key_watched: false,
            disturbed: false,
            has_leave_marker,
            not_before: None,
            backoff: Backoff::new(RETRY_FIRST, bound),
            rng,
            failures: 0,
            last_error: None,
        }
    }

    /// Where the registration stands. Registered means: every key is known to be there under our lease, and the lease cannot have run
    /// out yet. One that another has is the news, even if the rest is well.
    pub(super) fn phase(&self, now: Instant) -> Phase {
        match self.state {
            State::Leaving { .. } => return Phase::Leaving,
            State::Paused => return Phase::Paused,
            State::Deregistered => return Phase::Deregistered,
            _ => {}
        }
        if let Some(lease) = self.places().find_map(|place| place.foreign) {
            return Phase::Superseded(lease);
        }
        // Verifying, and writing a new value, leave the old one where it is.
        match &self.lease {
            Some(lease)
                if self.places().all(|place| place.held.is_some()) && now < lease.expires =>
            {
                Phase::Registered {
                    lease: lease.id,
                    expires: lease.expires,
                }
            }
            _ => Phase::Registering,
        }
    }

    /// Whether the newest value is in etcd.
    pub(super) fn is_written(&self) -> bool {
        self.state == State::Registered && !self.places().any(|place| place.dirty)
    }

    /// Whether a key has gone for good.
    pub(super) fn is_gone(&self, index: usize) -> bool {
        self.state == State::Deregistered || self.keys.get(index).is_none_or(|place| place.gone)
    }

    /// The keys that are to be kept.
    pub(super) fn live(&self) -> impl Iterator<Item = usize> {
        let live = |(index, place): (usize, &Place)| place.is_live().then_some(index);
        self.keys.iter().enumerate().filter_map(live)
    }

    /// What [`Command::Put`] is to write.
    pub(super) fn puts(&self) -> Vec<Put> {
        let leaving = matches!(self.state, State::Leaving { .. });
        let puts = self.keys.iter().enumerate().filter_map(|(index, place)| {
            let expected = if leaving { place.held } else { place.expected };
            let expected = expected.filter(|_| place.is_live())?;
            Some(Put { index, expected })
        });
        puts.take(PUTS_MAX).collect()
    }

    fn places(&self) -> impl Iterator<Item = &Place> {
        self.keys.iter().filter(|place| place.is_live())
    }

    /// When the phase may change without an input.
    pub(super) fn expires(&self) -> Option<Instant> {
        self.lease.map(|lease| lease.expires)
    }

    /// The value has changed.
    pub(super) fn on_new_value(&mut self) {
        for place in &mut self.keys {
            place.dirty = true;
        }
    }

    /// One key is to go for good. The last one takes the registration with it.
    pub(super) fn on_remove(&mut self, index: usize) {
        if self.live().eq([index]) {
            return self.take_away(After::Deregister);
        }
        if let Some(place) = self.keys.get_mut(index) {
            place.leaving = true;
            // Where there is no lease there is no key of ours.
            if self.lease.is_none() && self.unrevoked.is_empty() {
                place.lose();
            }
        }
    }

    /// The key is to go, and to come back with [`on_resume`](Self::on_resume).
    pub(super) fn on_pause(&mut self) {
        self.take_away(After::Pause);
    }

    /// The key is to come back.
    pub(super) fn on_resume(&mut self) {
        if matches!(
            self.state,
            State::Paused
                | State::Leaving {
                    next: After::Pause,
                    ..
                }
        ) {
            // The revoke may be under way: the lease it takes is no lease to go on with. If it never got there the lease is to go all the same,
            // once the keys hang on another one.
            self.leave_behind();
            self.lose_lease();
            self.register();
        }
    }

    /// The key is to go for good.
    pub(super) fn on_deregister(&mut self) {
        self.take_away(After::Deregister);
    }

    fn take_away(&mut self, next: After) {
        let leave_marker = match self.state {
            State::Deregistered => return,
            State::Leaving { leave_marker, .. } => leave_marker,
            _ => self.has_leave_marker && self.places().any(|place| place.held.is_some()),
        };
        self.not_before = None;
        self.state = State::Leaving { leave_marker, next };
        // Without a lease there is no key. A grant whose answer was lost leaves a lease that nothing hangs on.
        if self.lease.is_none() && self.unrevoked.is_empty() {
            self.left(next);
        }
    }

    /// The lease is to go later, with whatever hangs on it.
    fn leave_behind(&mut self) {
        self.unrevoked.extend(self.lease.map(|lease| lease.id));
        if self.unrevoked.len() > UNREVOKED_KEPT {
            self.unrevoked.remove(0);
        }
    }

    /// There is no lease any more, and no key under it.
    fn lose_lease(&mut self) {
        self.lease = None;
        for place in &mut self.keys {
            place.lose();
        }
    }
}

/// After an outage leases live again for one TTL: a longer backoff would remove the fleet after etcd has healed.
const RETRY_MAX: Duration = Duration::from_secs(3);
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// A healthy member answers in milliseconds.
const DEADLINE_MAX: Duration = Duration::from_secs(2);
/// No lease of ours is asked to live longer; a server that says otherwise is not believed.
const TTL_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// For the last word: it is a courtesy, and the revoke after it needs the time.
pub(super) const LEAVE_MARKER_MAX: Duration = Duration::from_millis(500);
/// Between tries where credentials or permissions are refused.
const OPERATOR_WAIT: Duration = Duration::from_secs(30);
/// A third of the TTL each: the keys are read once per TTL while they are watched, and at each renewal while they are not.
const VERIFY_EVERY: u32 = 3;
/// Reads of a key that another server holds, while it cannot be watched.
const SUPERSEDED_READ: Duration = Duration::from_secs(10);
/// Puts in one transaction: etcd refuses more than 128 operations with its default settings.
const PUTS_MAX: usize = 100;
/// Own leases that are remembered. Each stands for a loss of the one before.
const GRANTED_KEPT: usize = 64;
/// Own leases whose revoke had no answer. Each stands for a pause during an outage.
const UNREVOKED_KEPT: usize = 8;

#[cfg(test)]
mod tests;
