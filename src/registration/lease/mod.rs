//! The machine of one registration: pure, so that every order of answers can be played to it.
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

use crate::backoff::{Backoff, jittered};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Event, KeepAlive, KeyValue, LeaseId, Revision};

/// What the owner task is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Grant this lease; answer with [`Machine::on_granted`].
    Grant { lease: LeaseId, deadline: Duration },
    /// Read the key linearizably; answer with [`Machine::on_read`].
    Read { deadline: Duration },
    /// Put the value, marked as leaving or not, if the key's mod revision is as expected; answer with [`Machine::on_put`].
    Put {
        lease: LeaseId,
        expected: Revision,
        leaving: bool,
        deadline: Duration,
    },
    /// Renew the lease; answer with [`Machine::on_renewed`].
    Renew { lease: LeaseId, deadline: Duration },
    /// Revoke the lease; answer with [`Machine::on_revoked`].
    Revoke { lease: LeaseId, deadline: Duration },
    /// Wait for this moment, for an event on the key, or for a request.
    Wait { until: Option<Instant> },
    /// All is done.
    End,
}

/// The machine.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each holds in several states, and is true or false in all of them"
)]
#[derive(Debug)]
pub(super) struct Machine {
    ttl: Duration,
    state: State,
    lease: Option<Lease>,
    /// The leases this registration was granted: keys under them are its own.
    granted: Vec<LeaseId>,
    /// The highest raft term seen.
    term: u64,
    /// Whether the next write takes the key over from whoever holds it: true until the first one.
    claiming: bool,
    /// Where the key was last written under our lease, while it is there.
    held: Option<Revision>,
    /// Whether the value at hand is newer than the one in etcd.
    dirty: bool,
    /// Whether the owner task watches the key, so that a loss is seen at once.
    key_watched: bool,
    /// Whether etcd was out of reach, for a renewal or for the watch, since the last good renewal.
    disturbed: bool,
    /// Whether the value can say that the instance is leaving.
    says_goodbye: bool,
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
    Putting {
        expected: Revision,
    },
    Registered {
        mod_revision: Revision,
    },
    Superseded {
        lease: LeaseId,
    },
    /// Taking the key away. `mod_revision` is where the last word, that the instance is leaving, can be written.
    Leaving {
        mod_revision: Option<Revision>,
        next: After,
    },
    Paused,
    Deregistered,
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
    /// Good renewals since the key was last read.
    unverified: u32,
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
    pub(super) fn new(ttl: Duration, says_goodbye: bool, mut rng: fastrand::Rng) -> Self {
        let bound = (ttl / 4).min(RETRY_MAX);
        Self {
            ttl,
            state: State::Granting {
                lease: LeaseId::random(&mut rng),
            },
            lease: None,
            granted: Vec::new(),
            term: 0,
            claiming: true,
            held: None,
            dirty: true,
            key_watched: false,
            disturbed: false,
            says_goodbye,
            not_before: None,
            backoff: Backoff::new(RETRY_FIRST, bound),
            rng,
            failures: 0,
            last_error: None,
        }
    }

    /// Where the registration stands. Registered means: the key is known to be there under our lease, and the lease cannot have run
    /// out yet.
    pub(super) fn phase(&self, now: Instant) -> Phase {
        match self.state {
            State::Superseded { lease } => Phase::Superseded(lease),
            State::Leaving { .. } => Phase::Leaving,
            State::Paused => Phase::Paused,
            State::Deregistered => Phase::Deregistered,
            // Verifying, and writing a new value, leave the old one where it is.
            _ => match &self.lease {
                Some(lease) if self.held.is_some() && now < lease.expires => Phase::Registered {
                    lease: lease.id,
                    expires: lease.expires,
                },
                _ => Phase::Registering,
            },
        }
    }

    /// Whether the newest value is in etcd.
    pub(super) fn is_written(&self) -> bool {
        matches!(self.state, State::Registered { .. }) && !self.dirty
    }

    /// When the phase may change without an input.
    pub(super) fn expires(&self) -> Option<Instant> {
        self.lease.map(|lease| lease.expires)
    }

    /// What to do now.
    pub(super) fn command(&self, now: Instant) -> Command {
        let deadline = self.deadline();
        if let State::Leaving { mod_revision, .. } = self.state {
            return self.leave(mod_revision, now);
        }
        if let Some(lease) = &self.lease
            && self.keeps_lease()
            && lease.renew_at <= now
        {
            return Command::Renew {
                lease: lease.id,
                deadline,
            };
        }
        let renew_at = self
            .lease
            .filter(|_| self.keeps_lease())
            .map(|lease| lease.renew_at);
        if let Some(not_before) = self.not_before.filter(|not_before| *not_before > now)
            && !matches!(
                self.state,
                State::Superseded { .. } | State::Paused | State::Deregistered
            )
        {
            return Command::Wait {
                until: earliest(Some(not_before), renew_at),
            };
        }
        match (self.state, &self.lease) {
            (State::Granting { lease }, _) => Command::Grant { lease, deadline },
            (State::Putting { expected }, Some(lease)) => Command::Put {
                lease: lease.id,
                expected,
                leaving: false,
                deadline,
            },
            (State::Registered { .. }, Some(_)) if self.dirty => Command::Read { deadline },
            (State::Reading | State::Putting { .. }, _) => Command::Read { deadline },
            (State::Registered { .. }, _) => Command::Wait { until: renew_at },
            // The watch on the key says when the other is gone; the slow reads are for a watch that cannot be had.
            (State::Superseded { .. }, _) => match self.not_before {
                Some(not_before) if not_before > now => Command::Wait {
                    until: Some(not_before),
                },
                _ => Command::Read { deadline },
            },
            (State::Paused | State::Leaving { .. }, _) => Command::Wait { until: None },
            (State::Deregistered, _) => Command::End,
        }
    }

    fn leave(&self, mod_revision: Option<Revision>, now: Instant) -> Command {
        let deadline = self.deadline();
        let Some(lease) = &self.lease else {
            return Command::Wait { until: None };
        };
        if let Some(not_before) = self.not_before.filter(|not_before| *not_before > now) {
            return Command::Wait {
                until: Some(not_before),
            };
        }
        match mod_revision {
            Some(expected) => Command::Put {
                lease: lease.id,
                expected,
                leaving: true,
                deadline,
            },
            None => Command::Revoke {
                lease: lease.id,
                deadline,
            },
        }
    }

    /// A renewal that misses a sixth of the TTL is sent again elsewhere while there is time.
    fn deadline(&self) -> Duration {
        let ttl = self.lease.map_or(self.ttl, |lease| lease.ttl);
        (ttl / 6).min(DEADLINE_MAX)
    }

    fn keeps_lease(&self) -> bool {
        matches!(
            self.state,
            State::Reading | State::Putting { .. } | State::Registered { .. }
        )
    }

    /// Takes the answer to a grant: the TTL that etcd chose.
    pub(super) fn on_granted(
        &mut self,
        lease: LeaseId,
        answer: Result<Duration, EtcdError>,
        sent: Instant,
        now: Instant,
    ) {
        let (ttl, renew_at) = match answer {
            Ok(ttl) => (ttl.min(TTL_MAX), sent + ttl.min(TTL_MAX) / 3),
            // Our own grant, whose answer was lost: how long it has left only a renewal tells.
            Err(error) if error.kind() == EtcdErrorKind::LeaseExists => (self.ttl, now),
            Err(error) => return self.failed(error, now),
        };
        self.not_before = None;
        self.last_error = None;
        // The store may be another one than that of the lease before, and its raft terms have begun anew.
        self.term = 0;
        self.granted.push(lease);
        if self.granted.len() > GRANTED_KEPT {
            self.granted.remove(0);
        }
        self.lease = Some(Lease {
            id: lease,
            ttl,
            expires: sent + ttl,
            renew_at,
            failed: 0,
            unverified: 0,
        });
        self.state = State::Reading;
    }

    /// Takes the key as it was read. `current`: its value is the one at hand.
    pub(super) fn on_read(
        &mut self,
        answer: Result<Option<KeyValue>, EtcdError>,
        current: bool,
        now: Instant,
    ) {
        let found = match answer {
            Ok(found) => found,
            Err(error) => return self.failed(error, now),
        };
        // Not the backoff: a read that works before a put that fails would make a loop of them.
        self.not_before = None;
        self.dirty &= !current;
        if let Some(lease) = &mut self.lease {
            lease.unverified = 0;
        }
        match (self.state, found) {
            (State::Superseded { .. }, None) => self.register(),
            (State::Superseded { .. }, Some(kv)) => self.supersede(kv.lease, now),
            (State::Reading | State::Registered { .. } | State::Putting { .. }, found) => {
                self.on_own_read(found, now);
            }
            _ => {}
        }
    }

    fn on_own_read(&mut self, found: Option<KeyValue>, now: Instant) {
        let Some(lease) = self.lease else {
            return self.register();
        };
        let ours = found.as_ref().filter(|kv| kv.lease == lease.id);
        self.held = ours.map(|kv| kv.mod_revision);
        match found {
            None => {
                self.state = State::Putting {
                    expected: Revision::ZERO,
                }
            }
            Some(kv) if kv.lease == lease.id && !self.dirty => {
                self.claiming = false;
                self.succeeded();
                self.state = State::Registered {
                    mod_revision: kv.mod_revision,
                };
            }
            // A key without a lease was put by somebody else too: nobody here ever does that.
            Some(kv) if self.claiming || self.granted.contains(&kv.lease) => {
                self.state = State::Putting {
                    expected: kv.mod_revision,
                };
            }
            Some(kv) => self.supersede(kv.lease, now),
        }
    }

    /// Takes the answer to a put: the key's new revision, or nothing if somebody else was faster.
    pub(super) fn on_put(
        &mut self,
        leaving: bool,
        answer: Result<Option<Revision>, EtcdError>,
        now: Instant,
    ) {
        if leaving {
            // The last word is a courtesy; whatever came of it, the revoke is next.
            if let State::Leaving { mod_revision, .. } = &mut self.state {
                *mod_revision = None;
            }
            return;
        }
        match answer {
            Ok(Some(mod_revision)) => {
                self.succeeded();
                self.claiming = false;
                self.held = Some(mod_revision);
                self.dirty = false;
                self.state = State::Registered { mod_revision };
            }
            Ok(None) => self.state = State::Reading,
            Err(error) if error.kind() == EtcdErrorKind::LeaseNotFound => {
                self.lease_lost(error, now);
            }
            Err(error) => {
                // It may have been written all the same: only a read tells.
                self.state = State::Reading;
                self.failed(error, now);
            }
        }
    }

    /// Takes the answer to a renewal that was sent at `sent`.
    pub(super) fn on_renewed(
        &mut self,
        answer: Result<KeepAlive, EtcdError>,
        sent: Instant,
        now: Instant,
    ) {
        let term = self.term;
        let Some(lease) = &mut self.lease else {
            return;
        };
        match answer {
            // A leader that was frozen and thawed answers out of a term that is over; the cluster knows nothing of it.
            Ok(KeepAlive {
                header: Some(header),
                ..
            }) if header.raft_term < term => self.renewal_failed(false, now),
            Ok(KeepAlive { header, ttl }) => {
                self.term = header.map_or(term, |header| header.raft_term.max(term));
                let outage = lease.failed > 0;
                let ttl = ttl.min(TTL_MAX);
                lease.ttl = ttl;
                lease.expires = sent + ttl;
                lease.renew_at = sent + ttl / 3;
                lease.failed = 0;
                self.disturbed = false;
                lease.unverified += 1;
                let overdue = lease.unverified >= if self.key_watched { VERIFY_EVERY } else { 1 };
                if matches!(self.state, State::Registered { .. }) {
                    self.succeeded();
                    // An answer is no proof that the key is still there.
                    if overdue || outage {
                        self.state = State::Reading;
                    }
                }
            }
            Err(error) if error.kind() == EtcdErrorKind::LeaseNotFound => {
                self.lease_lost(error, now);
            }
            Err(error) => {
                self.renewal_failed(error.kind().needs_operator(), now);
                self.last_error = Some(error);
            }
        }
    }

    fn renewal_failed(&mut self, needs_operator: bool, now: Instant) {
        self.failures += 1;
        self.disturbed = true;
        let Some(lease) = &mut self.lease else {
            return;
        };
        lease.failed += 1;
        // While the lease lives it is tried at the usual pace, whatever the answer: what an operator sets right in time has cost nothing.
        let wait = if needs_operator && lease.expires <= now {
            jittered(OPERATOR_WAIT, &mut self.rng)
        } else if lease.failed == 1 {
            // The first time at once, and on another member if there is one: it may be this one's trouble alone.
            Duration::ZERO
        } else {
            self.backoff.next(&mut self.rng)
        };
        lease.renew_at = now + wait;
    }

    /// The lease is gone for good, and with it the key.
    fn lease_lost(&mut self, error: EtcdError, now: Instant) {
        self.lease = None;
        self.held = None;
        self.state = State::Granting {
            lease: LeaseId::random(&mut self.rng),
        };
        self.failures += 1;
        self.last_error = Some(error);
        // After an outage the whole fleet is here at once; a lease that was revoked by hand is one server's matter.
        let spread = self.ttl.mul_f64(self.rng.f64() / 3.0);
        self.not_before = self.disturbed.then(|| now + spread);
    }

    /// Takes the answer to a revoke.
    pub(super) fn on_revoked(&mut self, answer: Result<(), EtcdError>, now: Instant) {
        let State::Leaving { next, .. } = self.state else {
            return;
        };
        match answer {
            Ok(()) => self.left(next),
            Err(error) => self.failed(error, now),
        }
    }

    fn left(&mut self, next: After) {
        self.lease = None;
        self.held = None;
        self.last_error = None;
        self.state = match next {
            After::Pause => State::Paused,
            After::Deregister => State::Deregistered,
        };
    }

    /// Takes an event of the key's watch.
    pub(super) fn on_event(&mut self, event: &Event, now: Instant) {
        match (self.state, event) {
            (State::Registered { mod_revision }, event) if event.mod_revision() > mod_revision => {
                match event {
                    Event::Put(kv) if self.lease.is_some_and(|lease| lease.id == kv.lease) => {
                        self.held = Some(kv.mod_revision);
                        self.state = State::Registered {
                            mod_revision: kv.mod_revision,
                        };
                    }
                    // A put of ours from before the last loss, late.
                    Event::Put(kv) if self.granted.contains(&kv.lease) => {
                        self.state = State::Reading;
                    }
                    Event::Put(kv) => self.supersede(kv.lease, now),
                    Event::Delete { .. } => {
                        self.held = None;
                        self.state = State::Reading;
                    }
                }
            }
            (State::Superseded { .. }, Event::Put(kv)) if !self.granted.contains(&kv.lease) => {
                self.supersede(kv.lease, now);
            }
            (State::Superseded { .. }, Event::Delete { .. }) => self.register(),
            _ => {}
        }
    }

    /// The watch on the key was opened anew: what happened before is only known by a read.
    pub(super) fn on_watch_opened(&mut self) {
        self.key_watched = true;
        match &mut self.state {
            State::Registered { .. } => self.state = State::Reading,
            State::Superseded { .. } => self.not_before = None,
            _ => {}
        }
    }

    /// The watch on the key has ended.
    pub(super) fn on_watch_lost(&mut self) {
        self.key_watched = false;
        self.disturbed = true;
    }

    /// A linearizable answer was given in this raft term.
    pub(super) fn on_term(&mut self, term: u64) {
        self.term = self.term.max(term);
    }

    fn supersede(&mut self, lease: LeaseId, now: Instant) {
        // The lease has nothing left to hold: it runs out by itself, or holds what `register` claims in time.
        self.state = State::Superseded { lease };
        self.lease = None;
        self.held = None;
        self.not_before = Some(now + jittered(SUPERSEDED_READ, &mut self.rng));
    }

    fn register(&mut self) {
        self.not_before = None;
        self.dirty = true;
        self.state = match &self.lease {
            Some(_) => State::Reading,
            None => State::Granting {
                lease: LeaseId::random(&mut self.rng),
            },
        };
    }

    /// The value has changed.
    pub(super) fn on_new_value(&mut self) {
        self.dirty = true;
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
            // The revoke may be under way: the lease it takes is no lease to go on with.
            self.lease = None;
            self.held = None;
            self.register();
        }
    }

    /// The key is to go for good.
    pub(super) fn on_deregister(&mut self) {
        self.take_away(After::Deregister);
    }

    fn take_away(&mut self, next: After) {
        let mod_revision = match self.state {
            State::Deregistered => return,
            State::Leaving { mod_revision, .. } => mod_revision,
            _ => self.held.filter(|_| self.says_goodbye),
        };
        self.not_before = None;
        self.state = State::Leaving { mod_revision, next };
        // Without a lease there is no key. A grant whose answer was lost leaves a lease that nothing hangs on.
        if self.lease.is_none() {
            self.left(next);
        }
    }

    fn succeeded(&mut self) {
        self.backoff.reset();
        self.not_before = None;
        self.last_error = None;
    }

    fn failed(&mut self, error: EtcdError, now: Instant) {
        let wait = if error.kind().needs_operator() {
            jittered(self.ttl.min(OPERATOR_WAIT), &mut self.rng)
        } else {
            self.backoff.next(&mut self.rng)
        };
        self.not_before = Some(now + wait);
        self.failures += 1;
        self.last_error = Some(error);
    }
}

fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// After an outage leases live again for one TTL: a longer backoff would remove the fleet after etcd has healed.
const RETRY_MAX: Duration = Duration::from_secs(3);
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// A healthy member answers in milliseconds.
const DEADLINE_MAX: Duration = Duration::from_secs(2);
/// No lease of ours is asked to live longer; a server that says otherwise is not believed.
const TTL_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Between tries where credentials or permissions are refused.
const OPERATOR_WAIT: Duration = Duration::from_secs(30);
/// A third of the TTL each: the key is read once per TTL while it is watched, and at each renewal while it is not.
const VERIFY_EVERY: u32 = 3;
/// Reads of a key that another server holds, while it cannot be watched.
const SUPERSEDED_READ: Duration = Duration::from_secs(10);
/// Own leases that are remembered. Each stands for a loss of the one before.
const GRANTED_KEPT: usize = 64;

#[cfg(test)]
mod tests;
