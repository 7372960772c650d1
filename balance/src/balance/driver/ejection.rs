//! Connections that are there and get no calls: their peer has stopped answering, or has failed too many.

use std::sync::Arc;

use tokio::time::Instant;

use super::{DialId, Driver, Report, State, SubchannelId};
use crate::address::Address;
use crate::balance::connect_backoff::ConnectBackoff;
use crate::balance::health::Health;
use crate::balance::member::{Member, Seat};
use crate::balance::outlier;
use crate::balance::subchannel::{Idle, Ready, Silence, Subchannel};
use crate::transport::task;

impl Driver {
    pub(super) fn on_report(&mut self, dial_id: DialId, report: Report) {
        match report {
            Report::Connection(task::Report::Stalled) => self.on_silent(dial_id, Silence::Stalled),
            Report::Connection(task::Report::Doubtful) => {
                self.on_silent(dial_id, Silence::Doubtful);
            }
            Report::Connection(task::Report::Recovered) => self.on_recovered(dial_id),
            Report::Connection(task::Report::Streams) => self.on_streams(dial_id),
            Report::Connection(task::Report::Left(leave)) => self.on_lost(dial_id, leave),
            Report::Health(health) => self.on_health(dial_id, health),
        }
    }

    /// The peer has changed its mind on how many calls it takes.
    fn on_streams(&mut self, dial_id: DialId) {
        let Some(&id) = self.connected.get(&dial_id) else {
            return;
        };
        let Some((address, State::Ready(subchannel))) = self.subchannels.get_mut(&id) else {
            return;
        };
        subchannel.member().follow_limit();
        subchannel.member().offer();
        self.shared.changed.notify_waiters();
        if self.options.health_check.is_some() && !subchannel.member().connection().has_reserve() {
            // A call would wait for the watch's stream inside h2, for ever.
            let address = address.clone();
            tracing::warn!(%address, "no health check any more: the endpoint allows one stream, and calls need it");
            subchannel.end_health_watch();
            self.place(id);
            self.reclassify(&address);
        }
    }

    /// Nothing was read from a connection in time. If a PING has proven that, it gets no calls.
    fn on_silent(&mut self, dial_id: DialId, silence: Silence) {
        let Some(&id) = self.connected.get(&dial_id) else {
            return;
        };
        let Some((address, State::Ready(subchannel))) = self.subchannels.get_mut(&id) else {
            return;
        };
        if !subchannel.set_silence(silence) {
            // Another call has found out the same.
            return;
        }
        let address = address.clone();
        // A connection that has served calls is worth another one at once.
        let has_served = subchannel.member().used().is_answered();
        if silence == Silence::Stalled {
            tracing::warn!(%address, "connection does not answer: dialling a second one beside it");
            self.note(&address, "does not answer any more".into());
        } else {
            tracing::debug!(%address, "connection is silent: dialling a second one beside it");
        }
        self.place(id);
        self.dial_beside(&address, has_served);
        self.reclassify(&address);
    }

    fn on_recovered(&mut self, dial_id: DialId) {
        let Some(&id) = self.connected.get(&dial_id) else {
            return;
        };
        let median = self.median;
        let Some((address, State::Ready(subchannel))) = self.subchannels.get_mut(&id) else {
            return;
        };
        let address = address.clone();
        if subchannel.is_stalled() {
            // It was away, and is taken for as fast as the pool.
            subchannel.member().load().forget(median);
            tracing::info!(%address, "connection answers again");
        }
        subchannel.set_silence(Silence::None);
        self.place(id);
        if let Some((_, State::Ready(subchannel))) = self.subchannels.get(&id) {
            // It may have been in the ready set all the time, and calls that did not trust it wait.
            subchannel.member().offer();
        }
        self.shared.changed.notify_waiters();
        self.drop_spare(&address);
        self.reclassify(&address);
    }

    /// Moves a connection to the primary or the last-resort ready set, according to its endpoint, or out of both if it does not answer.
    pub(super) fn place(&mut self, id: SubchannelId) {
        let Some((address, State::Ready(subchannel))) = self.subchannels.get(&id) else {
            return;
        };
        let Some(known) = self.known.get(address) else {
            return;
        };
        let is_foreign = known
            .quarantine
            .is_some_and(|quarantine| !quarantine.is_over());
        let ejected = known.ejection.is_ejected() || is_foreign;
        known
            .endpoint
            .set_ejected(ejected || subchannel.is_stalled());
        if *subchannel.health() != Health::Serving || subchannel.is_stalled() {
            let member = Arc::clone(subchannel.member());
            return self.evict(id, &member);
        }
        let weight = self.share(known, Instant::now());
        let weight = weight.saturating_mul(self.zone_factor(known));
        let is_reserve = ejected || known.attributes.is_last_resort();
        let (here, there) = if is_reserve {
            (&mut self.last_resort, &mut self.primary)
        } else {
            (&mut self.primary, &mut self.last_resort)
        };
        let takes_calls = !is_reserve || self.is_last_resort;
        subchannel.member().set_takes_calls(takes_calls);
        let moved = there.remove(&id);
        if !here.contains(&id) {
            here.insert(id, Seat::new(subchannel.member()), weight);
        } else if !here.reweigh(&id, weight) {
            return;
        }
        // If the connection changed sets, publishes immediately; a change of weight alone can be batched.
        if moved {
            self.publish_now();
        } else {
            self.publish_soon();
        }
    }

    /// Leaves what calls have given up.
    pub(super) fn give_up(&mut self) {
        let given_up = self.shared.given_up();
        if given_up.is_empty() {
            return;
        }
        let ids: Vec<_> = given_up
            .iter()
            .filter_map(|member| self.find(member))
            .collect();
        for id in ids {
            self.leave(id);
        }
        self.publish();
        // Only now can nobody pick them.
        self.shared.lock_given_up().retain(|member| {
            let mut done = given_up.iter();
            !done.any(|done| Arc::ptr_eq(done, member))
        });
    }

    fn find(&self, member: &Arc<Member>) -> Option<SubchannelId> {
        let known = self.known.get(member.endpoint().address())?;
        let is_it = |id: &&SubchannelId| matches!(self.subchannels.get(*id), Some((_, State::Ready(ready))) if Arc::ptr_eq(ready.member(), member));
        known.subchannels.iter().find(is_it).copied()
    }

    /// Dials anew, whatever is at the old connection's end.
    fn leave(&mut self, id: SubchannelId) {
        let Some((address, state)) = self.subchannels.remove(&id) else {
            return;
        };
        let state = match state {
            State::Ready(subchannel) => State::Idle(self.abandon(id, &address, subchannel)),
            state => state,
        };
        self.subchannels.insert(id, (address.clone(), state));
        // The new connection stands for the one that was dialled beside the old.
        self.drop_spare(&address);
        self.reclassify(&address);
    }

    /// Gives a connection up for a new one; its calls go on as long as they can.
    pub(super) fn abandon(
        &mut self,
        id: SubchannelId,
        address: &Address,
        subchannel: Subchannel<Ready>,
    ) -> Subchannel<Idle> {
        tracing::info!(%address, "left a connection: connecting anew");
        subchannel.member().endpoint().set_ejected(false);
        self.close(id, subchannel);
        // The id goes to the new connection, and what the old one reports from now on is not about that.
        self.connected.retain(|_, connected| *connected != id);
        self.enqueue(id);
        Subchannel::new(ConnectBackoff::new(self.options.max_backoff))
    }

    /// Judges the endpoints by what they did since the last time.
    pub(super) fn sweep(&mut self, now: Instant) {
        let Some(config) = &self.options.outlier_detection else {
            return;
        };
        self.sweep_at = Some(now + config.period());
        let mut hosts: Vec<_> = self
            .known
            .values_mut()
            .map(|known| {
                let tally = known.endpoint.tally();
                let before = std::mem::replace(&mut known.judged, tally);
                (tally.since(before), known.ejection)
            })
            .collect();
        outlier::sweep(config, &mut hosts, now);
        let mut moved = Vec::new();
        for (known, (counts, ejection)) in self.known.values_mut().zip(hosts) {
            let address = known.endpoint.address();
            match (known.ejection.is_ejected(), ejection.is_ejected()) {
                (false, true) => {
                    tracing::warn!(%address, ?counts, "endpoint ejected: it fails much more than the others");
                }
                (true, false) => tracing::info!(%address, "endpoint is back from its ejection"),
                _ => {
                    known.ejection = ejection;
                    continue;
                }
            }
            known.ejection = ejection;
            moved.extend(known.subchannels.iter().copied());
        }
        for id in moved {
            self.place(id);
        }
    }
}
