//! Connections that are there and get no calls: their peer has stopped answering, or has failed too many.

use std::sync::Arc;

use tokio::time::Instant;

use super::{DialId, Driver, Report, State, SubchannelId};
use crate::address::Address;
use crate::balance::health::Health;
use crate::balance::member::{Member, Seat};
use crate::balance::outlier;
use crate::balance::subchannel::{ConnectBackoff, Idle, Ready, Subchannel};
use crate::transport::http2;

impl Driver {
    pub(super) fn on_report(&mut self, dial_id: DialId, report: Report) {
        match report {
            Report::Connection(http2::Report::Stalled) => self.on_stalled(dial_id, true),
            Report::Connection(http2::Report::Recovered) => self.on_stalled(dial_id, false),
            Report::Connection(http2::Report::Streams) => self.on_streams(dial_id),
            Report::Connection(http2::Report::Left(leave)) => self.on_left(dial_id, &leave),
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
        // Whoever waits for a stream may find one now.
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

    fn on_stalled(&mut self, dial_id: DialId, stalled: bool) {
        let Some(&id) = self.connected.get(&dial_id) else {
            return;
        };
        let median = self.median;
        let Some((address, State::Ready(subchannel))) = self.subchannels.get_mut(&id) else {
            return;
        };
        let address = address.clone();
        subchannel.set_stalled(stalled);
        if stalled {
            tracing::warn!(%address, "endpoint does not answer: no calls until it does");
            self.note(&address, "does not answer any more".into());
            if self.options.redial_stalled {
                return self.leave(id);
            }
        } else {
            subchannel.member().load().forget(median);
            tracing::info!(%address, "endpoint answers again");
        }
        self.place(id);
    }

    /// Puts a connection where its endpoint's rank says: among those that are picked, or among those that are only if there are no others.
    pub(super) fn place(&mut self, id: SubchannelId) {
        let Some((address, State::Ready(subchannel))) = self.subchannels.get(&id) else {
            return;
        };
        let Some(known) = self.known.get(address) else {
            return;
        };
        let ejected = subchannel.is_stalled() || known.ejection.is_ejected();
        known.endpoint.set_ejected(ejected);
        if *subchannel.health() != Health::Serving {
            return self.evict(id);
        }
        let weight = self.share(known, Instant::now());
        let weight = weight.saturating_mul(self.zone_factor(known));
        let (here, there) = if ejected || known.instance.is_last_resort() {
            (&mut self.last_resort, &mut self.primary)
        } else {
            (&mut self.primary, &mut self.last_resort)
        };
        let moved = there.remove(&id);
        if !here.contains(&id) {
            here.insert(id, Seat::new(subchannel.member()), weight);
        } else if !here.reweigh(&id, weight) {
            return;
        }
        // Who is not to be picked any more is out at once.
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
        self.evict(id);
        self.connected.retain(|_, connected| *connected != id);
        if let Some(known) = self.known.get(address) {
            known.endpoint.set_ejected(false);
            let draining = subchannel.drain();
            self.draining.push((Arc::clone(&known.endpoint), draining));
        }
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
