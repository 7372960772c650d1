//! Handles the inputs of the lease machine ([`Machine`]): the results of etcd requests, and the events of the watch.

use std::time::Duration;

use tokio::time::Instant;

use super::machine::{
    Found, GRANTED_KEPT, Machine, OPERATOR_WAIT, SUPERSEDED_READ, TTL_MAX, VERIFY_INTERVAL,
};
use super::state::{Claim, Lease, Removal, State, Value, WatchState};
use crate::backoff::jittered;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Event, KeepAlive, KeyValue, LeaseId, Revision};

impl Machine {
    /// Handles the result of a grant: the TTL that etcd chose, or an error.
    pub(in crate::registration) fn on_granted(
        &mut self,
        lease: LeaseId,
        answer: Result<Duration, EtcdError>,
        sent: Instant,
        now: Instant,
    ) {
        let (ttl, renew_at) = match answer {
            Ok(ttl) => {
                let ttl = ttl.min(TTL_MAX);
                (ttl, sent + self.first_renewal(ttl))
            }
            // An earlier attempt granted this lease, and the response was lost. Only a renewal returns the remaining TTL, so the lease is
            // renewed at once.
            Err(error)
                if error.kind() == EtcdErrorKind::LeaseExists
                    && self.failed_grant == Some(lease) =>
            {
                (self.ttl, now)
            }
            Err(error) => {
                if error.kind() == EtcdErrorKind::LeaseExists {
                    // Another client has a lease with the same random id. If both clients used this lease, a revoke by one of them would
                    // delete the keys of both. So the next grant uses a new id.
                    self.state = State::Granting {
                        lease: LeaseId::random(&mut self.rng),
                    };
                }
                self.failed_grant = Some(lease);
                return self.failed(error, now);
            }
        };
        self.not_before = None;
        self.last_error = None;
        // The store may be another one than before, for example after a wipe, and its raft terms may have started again. So lower terms are
        // valid again.
        self.term = 0;
        self.granted.push(lease);
        if self.granted.len() > GRANTED_KEPT {
            self.granted.remove(0);
        }
        let verify_at = now + jittered(VERIFY_INTERVAL, &mut self.rng);
        self.lease = Some(Lease {
            id: lease,
            ttl,
            expires: sent + ttl,
            renew_at,
            failed: 0,
            verify_at,
            confirmed: false,
        });
        self.state = State::Reading;
    }

    /// Handles the result of a read of the keys.
    pub(in crate::registration) fn on_read(
        &mut self,
        answer: Result<Vec<Found>, EtcdError>,
        now: Instant,
    ) {
        if matches!(self.state, State::Leaving { .. } | State::Paused) {
            return self.on_searched(answer);
        }
        let found = match answer {
            Ok(found) => found,
            Err(error) => return self.failed(error, now),
        };
        // The backoff is not reset here: if reads succeed and puts fail, the machine would otherwise repeat both in a tight loop.
        self.not_before = None;
        if let Some(lease) = &mut self.lease {
            lease.verify_at = now + jittered(VERIFY_INTERVAL, &mut self.rng);
        }
        let reading = matches!(
            self.state,
            State::Reading | State::Putting | State::Registered | State::Superseded
        );
        if reading {
            for found in found {
                self.on_found(&found);
            }
            self.select_state(now);
        }
    }

    fn on_found(&mut self, found: &Found) {
        let lease = self.lease.map(|lease| lease.id);
        let Some(entry) = self.keys.get_mut(found.index) else {
            return;
        };
        if !entry.is_live() {
            if found.by_hand && entry.claim == Claim::Made {
                entry.remove_by_hand();
            }
            return;
        }
        // The event of a loss may also be on its way. The watch is then opened again without need, which is harmless.
        let is_own = |kv: &KeyValue| Some(kv.lease) == lease || self.granted.contains(&kv.lease);
        let is_lost = entry.held.is_some() && !found.kv.as_ref().is_some_and(is_own);
        if is_lost && self.watch_state == WatchState::Open {
            self.watch_state = WatchState::MissedLoss;
        }
        entry.foreign = None;
        entry.expected = None;
        entry.by_hand = false;
        if found.by_hand
            && entry.claim == Claim::Made
            && let Some(kv) = &found.kv
        {
            return entry.claim_by_hand(kv.mod_revision);
        }
        let Some(kv) = &found.kv else {
            entry.held = None;
            entry.expected = Some(Revision::ZERO);
            return;
        };
        // If the key's revision is lower than the revision of the registration's last write, the store was restored from a backup that does
        // not contain that write. The value must then be written again.
        if found.current {
            entry.value = Value::Written;
        } else if entry.held.is_some_and(|held| kv.mod_revision < held) {
            entry.value = Value::Pending;
        }
        let ours = Some(kv.lease) == lease;
        entry.held = ours.then_some(kv.mod_revision);
        if ours && !entry.is_pending() {
            entry.claim = Claim::Made;
        } else if entry.claim == Claim::Open || self.granted.contains(&kv.lease) {
            entry.expected = Some(kv.mod_revision);
        } else {
            // A key without a lease belongs to another client if its value has another address.
            entry.foreign = Some(kv.lease);
        }
    }

    /// Selects the next state from the known state of the keys.
    fn select_state(&mut self, now: Instant) {
        if self.live_entries().any(|entry| entry.expected.is_some()) {
            match &self.lease {
                Some(_) => self.state = State::Putting,
                None => self.register(),
            }
        } else if self.live_entries().all(|entry| entry.foreign.is_some()) {
            self.supersede(now);
        } else {
            self.succeeded();
            self.state = State::Registered;
        }
    }

    /// Handles the result of a put: the new revision of the keys, or `None` if nothing was written because another client has changed one
    /// of the keys.
    pub(in crate::registration) fn on_put(
        &mut self,
        leaving: bool,
        answer: Result<Option<Revision>, EtcdError>,
        now: Instant,
    ) {
        if leaving {
            // The leave marker (a field that tells clients that the server is leaving) is best effort. Each batch of up to 100 keys is
            // written only once, and after a failed write, the remaining batches are skipped. The lease is then revoked, even if some keys
            // have no marker.
            for put in self.puts() {
                self.keys[put.index].held = None;
            }
            // A key was changed, perhaps by hand.
            self.search |= matches!(answer, Ok(None));
            let more = answer.is_ok() && self.holds_keys();
            if let State::Leaving { leave_marker, .. } = &mut self.state {
                *leave_marker = more;
            }
            return;
        }
        match answer {
            Ok(Some(mod_revision)) => {
                if let Some(lease) = &mut self.lease {
                    lease.confirmed = true;
                }
                for put in self.puts() {
                    let entry = &mut self.keys[put.index];
                    entry.claim = Claim::Made;
                    entry.value = Value::Written;
                    entry.expected = None;
                    entry.by_hand = false;
                    entry.held = Some(mod_revision);
                }
                self.select_state(now);
            }
            Ok(None) => self.state = State::Reading,
            Err(error) if error.kind() == EtcdErrorKind::LeaseNotFound => {
                self.lease_lost(error, now);
            }
            Err(error) => {
                // etcd may have applied the put although the request failed. Only a read returns the actual value.
                self.state = State::Reading;
                self.failed(error, now);
            }
        }
    }

    /// Handles the result of a delete. A key of another server counts as deleted.
    pub(in crate::registration) fn on_deleted(
        &mut self,
        index: usize,
        answer: Result<(), EtcdError>,
        now: Instant,
    ) {
        match answer {
            Ok(()) => {
                self.succeeded();
                if let Some(entry) = self.keys.get_mut(index) {
                    entry.by_hand = false;
                    entry.mark_lost();
                }
                self.end_removal();
            }
            Err(error) => {
                let again = self.schedule_retry(error, now);
                if let Some(entry) = self.keys.get_mut(index) {
                    entry.delete_at = again;
                }
            }
        }
    }

    /// Records a failed delete or revoke, and returns the time of its next attempt. `not_before` does not change, so that the remaining
    /// keys are not delayed.
    fn schedule_retry(&mut self, error: EtcdError, now: Instant) -> Option<Instant> {
        let before = self.not_before;
        self.failed(error, now);
        std::mem::replace(&mut self.not_before, before)
    }

    /// Handles the result of a renewal that was sent at `sent`.
    pub(in crate::registration) fn on_renewed(
        &mut self,
        answer: Result<KeepAlive, EtcdError>,
        sent: Instant,
        now: Instant,
    ) {
        let first = self.first_renewal(self.ttl.min(TTL_MAX));
        let Some(lease) = &mut self.lease else {
            return;
        };
        match answer {
            Ok(KeepAlive { header, ttl }) => {
                let ttl = ttl.min(TTL_MAX);
                self.term = header.map_or(self.term, |header| header.raft_term.max(self.term));
                let outage = lease.failed > 0;
                lease.ttl = ttl;
                lease.expires = sent + ttl;
                lease.renew_at = sent + if outage { first.min(ttl / 3) } else { ttl / 3 };
                lease.failed = 0;
                lease.confirmed = true;
                self.disturbed = false;
                let overdue = self.watch_state != WatchState::Open || lease.verify_at <= now;
                if self.state == State::Registered {
                    self.succeeded();
                    // A successful renewal does not prove that the keys still exist.
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
                    // The response is from a member that was frozen, or from a store that was restored from a backup. In a restored store,
                    // terms start again, but leases still exist. A linearizable read distinguishes the two cases.
                    self.state = State::Reading;
                }
                self.renewal_failed(error.kind().needs_operator(), now);
                self.last_error = Some(error);
            }
        }
    }

    /// Returns the time until the first renewal after a grant or an outage: at most a third of the TTL. It is random, because the processes
    /// of a fleet start and recover together, and would otherwise renew together from then on.
    fn first_renewal(&mut self, ttl: Duration) -> Duration {
        (ttl / 3).mul_f64(1.0 - 0.75 * self.rng.f64())
    }

    fn renewal_failed(&mut self, needs_operator: bool, now: Instant) {
        self.failures += 1;
        self.disturbed = true;
        let Some(lease) = &mut self.lease else {
            return;
        };
        lease.failed += 1;
        // While the lease is valid, renewals are retried at the same rate after every kind of error. So no key is lost if an operator
        // resolves the error before the lease expires.
        let wait = if needs_operator && lease.expires <= now {
            jittered(lease.ttl.min(OPERATOR_WAIT), &mut self.rng)
        } else if lease.failed == 1 {
            // After the first failure, the renewal is retried at once, on another member if available: the cause may concern only the
            // member that received the request.
            Duration::ZERO
        } else {
            self.backoff.next(&mut self.rng)
        };
        lease.renew_at = now + wait;
    }

    /// Handles the loss of the lease. etcd deletes the keys of a lost lease, so the registration starts again with a grant.
    fn lease_lost(&mut self, error: EtcdError, now: Instant) {
        let confirmed = self.lease.is_some_and(|lease| lease.confirmed);
        self.lose_lease();
        self.state = State::Granting {
            lease: LeaseId::random(&mut self.rng),
        };
        self.failures += 1;
        self.last_error = Some(error);
        // After an outage, all servers of a fleet register at the same time. So the grant is delayed by a random time of up to a third of
        // the TTL. A lease that was revoked by hand concerns only one server and is replaced at once.
        let spread = self.ttl.mul_f64(self.rng.f64() / 3.0);
        self.not_before = self.disturbed.then(|| now + spread);
        if !confirmed {
            // The lease was lost before its first successful renewal or put. This happens if one address leads to two stores: one store
            // grants the lease, and the other store receives the next request. The next lease would be lost as well, so the backoff
            // applies.
            let wait = self.backoff.next(&mut self.rng);
            self.not_before = self.not_before.max(Some(now + wait));
        }
    }

    /// Handles the result of a revoke.
    pub(in crate::registration) fn on_revoked(
        &mut self,
        answer: Result<(), EtcdError>,
        now: Instant,
    ) {
        if !matches!(self.state, State::Leaving { .. }) {
            match answer {
                Ok(()) => {
                    self.unrevoked.pop();
                    self.backoff.reset();
                    self.last_error = None;
                }
                Err(error) => self.revoke_at = self.schedule_retry(error, now),
            }
            return;
        }
        if let Err(error) = answer {
            return self.failed(error, now);
        }
        self.not_before = None;
        // Leases are revoked from the newest to the oldest.
        if self.lease.is_some() {
            self.lose_lease();
        } else {
            self.unrevoked.pop();
        }
        if self.unrevoked.is_empty() {
            // A value may have been written by hand between the first read and the revoke.
            self.search = self.has_written();
            self.end_removal();
        }
    }

    /// Handles an event of the watch on a key.
    pub(in crate::registration) fn on_event(&mut self, index: usize, event: &Event, now: Instant) {
        let Some(entry) = self.keys.get_mut(index) else {
            return;
        };
        if let Event::Put(kv) = event
            && entry.removal == Removal::Done
            && self.lease.is_some_and(|lease| lease.id == kv.lease)
        {
            // The registration received an error for this put, but etcd applied the put after it had deleted the key.
            entry.removal = Removal::Requested;
            entry.held = Some(kv.mod_revision);
        }
        if let Event::Delete { mod_revision, .. } = event
            && entry.removal != Removal::None
            && entry.held.is_none_or(|held| *mod_revision > held)
        {
            entry.mark_lost();
        }
        if !entry.is_live() {
            return;
        }
        let own = |kv: &KeyValue| self.granted.contains(&kv.lease);
        match (self.state, event) {
            (State::Registered, event)
                if entry.held.is_none_or(|held| event.mod_revision() > held) =>
            {
                match event {
                    Event::Put(kv) if self.lease.is_some_and(|lease| lease.id == kv.lease) => {
                        entry.held = Some(kv.mod_revision);
                        entry.foreign = None;
                    }
                    Event::Put(kv) if !own(kv) => {
                        entry.held = None;
                        entry.foreign = Some(kv.lease);
                        self.select_state(now);
                    }
                    // The event is delayed: the registration sent this put under an earlier lease.
                    Event::Put(_) => self.state = State::Reading,
                    Event::Delete { .. } => {
                        entry.held = None;
                        entry.foreign = None;
                        self.state = State::Reading;
                    }
                }
            }
            (State::Superseded, Event::Put(kv)) if !own(kv) => {
                entry.foreign = Some(kv.lease);
                self.supersede(now);
            }
            (State::Superseded, Event::Delete { .. }) => {
                entry.foreign = None;
                self.register();
            }
            _ => {}
        }
    }

    /// Handles the opening of the watch on the keys. The watch does not report changes from before its opening, so the keys are read.
    pub(in crate::registration) fn on_watch_opened(&mut self) {
        self.watch_state = WatchState::Open;
        match self.state {
            State::Registered => self.state = State::Reading,
            State::Superseded => self.not_before = None,
            State::Paused => self.search = self.has_written(),
            _ => {}
        }
    }

    /// Handles the end of the watch on the keys.
    pub(in crate::registration) fn on_watch_lost(&mut self) {
        self.watch_state = WatchState::Closed;
        self.disturbed = true;
    }

    /// Records the raft term of a linearizable response. The terms of such responses decrease only if the store was wiped or restored from
    /// a backup. The lower term is then the valid one.
    pub(in crate::registration) fn on_term(&mut self, term: u64) {
        self.term = term;
    }

    fn supersede(&mut self, now: Instant) {
        // No live key (a key that is not being removed) is attached to the lease, so the lease can expire by itself. But if a key that must
        // be deleted still exists, the lease is recorded for a later revoke, which also deletes that key.
        let mut entries = self.keys.iter();
        if entries.any(|entry| entry.removal == Removal::Requested) {
            self.record_unrevoked();
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
