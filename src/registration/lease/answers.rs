//! What a registration learns from etcd.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    After, Found, GRANTED_KEPT, Lease, Machine, OPERATOR_WAIT, SUPERSEDED_READ, State, TTL_MAX,
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
            Err(error)
                if error.kind() == EtcdErrorKind::LeaseExists && self.asked == Some(lease) =>
            {
                (self.ttl, now)
            }
            Err(error) => {
                if error.kind() == EtcdErrorKind::LeaseExists {
                    // Of somebody else, by chance: what hangs on it must not hang on ours.
                    self.state = State::Granting {
                        lease: LeaseId::random(&mut self.rng),
                    };
                }
                self.asked = Some(lease);
                return self.failed(error, now);
            }
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
            proven: false,
        });
        self.state = State::Reading;
    }

    /// Takes the keys as they were read.
    pub(in crate::registration) fn on_read(
        &mut self,
        answer: Result<Vec<Found>, EtcdError>,
        now: Instant,
    ) {
        let found = match answer {
            Ok(found) => found,
            Err(error) => return self.failed(error, now),
        };
        // Not the backoff: a read that works before a put that fails would make a loop of them.
        self.not_before = None;
        if let Some(lease) = &mut self.lease {
            lease.unverified = 0;
        }
        let reading = matches!(
            self.state,
            State::Reading | State::Putting | State::Registered | State::Superseded
        );
        if reading {
            for found in found {
                self.on_found(&found);
            }
            self.judge(now);
        }
    }

    fn on_found(&mut self, found: &Found) {
        let lease = self.lease.map(|lease| lease.id);
        let Some(place) = self.keys.get_mut(found.index) else {
            return;
        };
        place.foreign = None;
        place.expected = None;
        let Some(kv) = &found.kv else {
            place.dirty &= !found.current;
            place.held = None;
            place.expected = Some(Revision::ZERO);
            return;
        };
        // An older write of ours is back: the store was restored, and what was written since is lost.
        place.dirty |= place.held.is_some_and(|held| kv.mod_revision < held);
        place.dirty &= !found.current;
        let ours = Some(kv.lease) == lease;
        place.held = ours.then_some(kv.mod_revision);
        if ours && !place.dirty {
            place.claiming = false;
        } else if place.claiming || self.granted.contains(&kv.lease) {
            place.expected = Some(kv.mod_revision);
        } else {
            // A key without a lease was put by somebody else too: nobody here ever does that.
            place.foreign = Some(kv.lease);
        }
    }

    /// What the keys as they are now call for.
    fn judge(&mut self, now: Instant) {
        if self.places().any(|place| place.expected.is_some()) {
            match &self.lease {
                Some(_) => self.state = State::Putting,
                None => self.register(),
            }
        } else if self.places().all(|place| place.foreign.is_some()) {
            self.supersede(now);
        } else {
            self.succeeded();
            self.state = State::Registered;
        }
    }

    /// Takes the answer to a put: the keys' new revision, or nothing if somebody else was faster.
    pub(in crate::registration) fn on_put(
        &mut self,
        leaving: bool,
        answer: Result<Option<Revision>, EtcdError>,
        now: Instant,
    ) {
        if leaving {
            // The last word is a courtesy, said once to each hundred keys while etcd answers; the revoke is next.
            for put in self.puts() {
                self.keys[put.index].held = None;
            }
            let more = answer.is_ok() && self.places().any(|place| place.held.is_some());
            if let State::Leaving { leave_marker, .. } = &mut self.state {
                *leave_marker = more;
            }
            return;
        }
        match answer {
            Ok(Some(mod_revision)) => {
                if let Some(lease) = &mut self.lease {
                    lease.proven = true;
                }
                for put in self.puts() {
                    let place = &mut self.keys[put.index];
                    place.claiming = false;
                    place.dirty = false;
                    place.expected = None;
                    place.held = Some(mod_revision);
                }
                self.judge(now);
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

    /// Takes the answer to a delete. A key that is not ours any more counts as deleted.
    pub(in crate::registration) fn on_deleted(
        &mut self,
        index: usize,
        answer: Result<(), EtcdError>,
        now: Instant,
    ) {
        match answer {
            Ok(()) => {
                self.succeeded();
                if let Some(place) = self.keys.get_mut(index) {
                    place.lose();
                }
            }
            Err(error) => {
                let again = self.not_taken_away(error, now);
                if let Some(place) = self.keys.get_mut(index) {
                    place.delete_at = again;
                }
            }
        }
    }

    /// What is to go cannot be taken away before then. What is to stay does not wait for it.
    fn not_taken_away(&mut self, error: EtcdError, now: Instant) -> Option<Instant> {
        let before = self.not_before;
        self.failed(error, now);
        std::mem::replace(&mut self.not_before, before)
    }

    /// Takes the answer to a renewal that was sent at `sent`.
    pub(in crate::registration) fn on_renewed(
        &mut self,
        answer: Result<KeepAlive, EtcdError>,
        sent: Instant,
        now: Instant,
    ) {
        let Some(lease) = &mut self.lease else {
            return;
        };
        match answer {
            Ok(KeepAlive { header, ttl }) => {
                self.term = header.map_or(self.term, |header| header.raft_term.max(self.term));
                let outage = lease.failed > 0;
                let ttl = ttl.min(TTL_MAX);
                lease.ttl = ttl;
                lease.expires = sent + ttl;
                lease.renew_at = sent + ttl / 3;
                lease.failed = 0;
                lease.proven = true;
                self.disturbed = false;
                lease.unverified += 1;
                let watched = self.key_watched;
                let overdue = lease.unverified >= if watched { VERIFY_EVERY } else { 1 };
                if self.state == State::Registered {
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
                if error.kind() == EtcdErrorKind::StaleTerm && self.state == State::Registered {
                    // Of a member that was frozen, or of a whole store that was restored from a backup, where terms begin anew and leases
                    // live on. A linearizable read tells.
                    self.state = State::Reading;
                }
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
            jittered(lease.ttl.min(OPERATOR_WAIT), &mut self.rng)
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
        let proven = self.lease.is_some_and(|lease| lease.proven);
        self.lose_lease();
        self.state = State::Granting {
            lease: LeaseId::random(&mut self.rng),
        };
        self.failures += 1;
        self.last_error = Some(error);
        // After an outage the whole fleet is here at once; a lease that was revoked by hand is one server's matter.
        let spread = self.ttl.mul_f64(self.rng.f64() / 3.0);
        self.not_before = self.disturbed.then(|| now + spread);
        if !proven {
            // Granted by one store and asked for at another, behind an address that leads to two: the next one is lost as well.
            let wait = self.backoff.next(&mut self.rng);
            self.not_before = self.not_before.max(Some(now + wait));
        }
    }

    /// Takes the answer to a revoke.
    pub(in crate::registration) fn on_revoked(
        &mut self,
        answer: Result<(), EtcdError>,
        now: Instant,
    ) {
        let State::Leaving { next, .. } = self.state else {
            match answer {
                Ok(()) => {
                    self.unrevoked.pop();
                    self.backoff.reset();
                    self.last_error = None;
                }
                Err(error) => self.revoke_at = self.not_taken_away(error, now),
            }
            return;
        };
        if let Err(error) = answer {
            return self.failed(error, now);
        }
        self.not_before = None;
        // The newer ones go first.
        if self.lease.is_some() {
            self.lose_lease();
        } else {
            self.unrevoked.pop();
        }
        if self.unrevoked.is_empty() {
            self.left(next);
        }
    }

    pub(super) fn left(&mut self, next: After) {
        self.lose_lease();
        for place in &mut self.keys {
            place.foreign = None;
        }
        self.last_error = None;
        self.state = match next {
            After::Pause => State::Paused,
            After::Deregister => State::Deregistered,
        };
    }

    /// Takes an event of a key's watch.
    pub(in crate::registration) fn on_event(&mut self, index: usize, event: &Event, now: Instant) {
        let Some(place) = self.keys.get_mut(index) else {
            return;
        };
        if let Event::Put(kv) = event
            && place.gone
            && self.lease.is_some_and(|lease| lease.id == kv.lease)
        {
            // A put that was given up, carried out after the key was deleted.
            place.gone = false;
            place.held = Some(kv.mod_revision);
        }
        if let Event::Delete { mod_revision, .. } = event
            && place.leaving
            && place.held.is_none_or(|held| *mod_revision > held)
        {
            place.lose();
        }
        if !place.is_live() {
            return;
        }
        let own = |kv: &KeyValue| self.granted.contains(&kv.lease);
        match (self.state, event) {
            (State::Registered, event)
                if place.held.is_none_or(|held| event.mod_revision() > held) =>
            {
                match event {
                    Event::Put(kv) if self.lease.is_some_and(|lease| lease.id == kv.lease) => {
                        place.held = Some(kv.mod_revision);
                        place.foreign = None;
                    }
                    Event::Put(kv) if !own(kv) => {
                        place.held = None;
                        place.foreign = Some(kv.lease);
                        self.judge(now);
                    }
                    // A put of ours from before the last loss, late.
                    Event::Put(_) => self.state = State::Reading,
                    Event::Delete { .. } => {
                        place.held = None;
                        place.foreign = None;
                        self.state = State::Reading;
                    }
                }
            }
            (State::Superseded, Event::Put(kv)) if !own(kv) => {
                place.foreign = Some(kv.lease);
                self.supersede(now);
            }
            (State::Superseded, Event::Delete { .. }) => {
                place.foreign = None;
                self.register();
            }
            _ => {}
        }
    }

    /// The watch on the keys was opened anew: what happened before is only known by a read.
    pub(in crate::registration) fn on_watch_opened(&mut self) {
        self.key_watched = true;
        match self.state {
            State::Registered => self.state = State::Reading,
            State::Superseded => self.not_before = None,
            _ => {}
        }
    }

    /// The watch on the keys has ended.
    pub(in crate::registration) fn on_watch_lost(&mut self) {
        self.key_watched = false;
        self.disturbed = true;
    }

    /// A linearizable answer was given in this raft term. Such answers never go back, but for those of a store that was restored.
    pub(in crate::registration) fn on_term(&mut self, term: u64) {
        self.term = term;
    }

    fn supersede(&mut self, now: Instant) {
        // The lease has nothing left to hold, but for a key that is to go: it runs out by itself.
        if self.keys.iter().any(|place| place.leaving && !place.gone) {
            self.leave_behind();
        }
        self.state = State::Superseded;
        self.lose_lease();
        self.not_before = Some(now + jittered(SUPERSEDED_READ, &mut self.rng));
    }

    pub(super) fn register(&mut self) {
        self.not_before = None;
        self.on_new_value();
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
