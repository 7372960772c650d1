//! What a registration learns from etcd.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    After, GRANTED_KEPT, Lease, Machine, OPERATOR_WAIT, SUPERSEDED_READ, State, TTL_MAX,
    VERIFY_EVERY,
};
use crate::backoff::jittered;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Event, KeepAlive, KeyValue, LeaseId, Revision};

impl Machine {
    /// Takes the answer to a grant: the TTL that etcd chose.
    pub(in crate::registration) fn on_granted(
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
    pub(in crate::registration) fn on_read(
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
    pub(in crate::registration) fn on_put(
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
    pub(in crate::registration) fn on_renewed(
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
    pub(in crate::registration) fn on_revoked(
        &mut self,
        answer: Result<(), EtcdError>,
        now: Instant,
    ) {
        let State::Leaving { next, .. } = self.state else {
            return;
        };
        match answer {
            Ok(()) => self.left(next),
            Err(error) => self.failed(error, now),
        }
    }

    pub(super) fn left(&mut self, next: After) {
        self.lease = None;
        self.held = None;
        self.last_error = None;
        self.state = match next {
            After::Pause => State::Paused,
            After::Deregister => State::Deregistered,
        };
    }

    /// Takes an event of the key's watch.
    pub(in crate::registration) fn on_event(&mut self, event: &Event, now: Instant) {
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
    pub(in crate::registration) fn on_watch_opened(&mut self) {
        self.key_watched = true;
        match &mut self.state {
            State::Registered { .. } => self.state = State::Reading,
            State::Superseded { .. } => self.not_before = None,
            _ => {}
        }
    }

    /// The watch on the key has ended.
    pub(in crate::registration) fn on_watch_lost(&mut self) {
        self.key_watched = false;
        self.disturbed = true;
    }

    /// A linearizable answer was given in this raft term.
    pub(in crate::registration) fn on_term(&mut self, term: u64) {
        self.term = self.term.max(term);
    }

    pub(super) fn supersede(&mut self, lease: LeaseId, now: Instant) {
        // The lease has nothing left to hold: it runs out by itself, or holds what `register` claims in time.
        self.state = State::Superseded { lease };
        self.lease = None;
        self.held = None;
        self.not_before = Some(now + jittered(SUPERSEDED_READ, &mut self.rng));
    }

    pub(super) fn register(&mut self) {
        self.not_before = None;
        self.dirty = true;
        self.state = match &self.lease {
            Some(_) => State::Reading,
            None => State::Granting {
                lease: LeaseId::random(&mut self.rng),
            },
        };
    }

    pub(super) fn succeeded(&mut self) {
        self.backoff.reset();
        self.not_before = None;
        self.last_error = None;
    }

    pub(super) fn failed(&mut self, error: EtcdError, now: Instant) {
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
