//! Open connections that get no calls: the peer does not answer, or too many calls to the endpoint failed.

use std::sync::Arc;

use tokio::time::Instant;

use super::driver::{DialId, Driver, State, SubchannelEvent, SubchannelId};
use crate::address::Address;
use crate::balance::connect_backoff::ConnectBackoff;
use crate::balance::health::Health;
use crate::balance::outlier;
use crate::balance::ready_connection::{ReadyConnection, ReadyEntry};
use crate::balance::subchannel::{Idle, Ready, Silence, Subchannel};
use crate::transport::connection_task::ConnectionEvent;

impl Driver {
    pub(super) fn on_event(&mut self, dial_id: DialId, event: SubchannelEvent) {
        let event = match event {
            SubchannelEvent::Health(health) => return self.on_health(dial_id, health),
            SubchannelEvent::Connection(event) => event,
        };
        match event {
            ConnectionEvent::Stalled => self.on_silent(dial_id, Silence::Stalled),
            ConnectionEvent::Doubtful => self.on_silent(dial_id, Silence::Doubtful),
            ConnectionEvent::Recovered => self.on_recovered(dial_id),
            ConnectionEvent::Streams => self.on_streams(dial_id),
            ConnectionEvent::Left(reason) => self.on_lost(dial_id, reason),
        }
    }

    /// Handles a change of the peer's limit on concurrent streams.
    fn on_streams(&mut self, dial_id: DialId) {
        let Some(&id) = self.connected.get(&dial_id) else {
            return;
        };
        let Some((address, State::Ready(subchannel))) = self.subchannels.get_mut(&id) else {
            return;
        };
        subchannel.connection().follow_limit();
        subchannel.connection().offer();
        self.shared.changed.notify_waiters();
        if self.options.health_check.is_some() && !subchannel.connection().http2().has_reserve() {
            // The health watch holds the only stream, so h2 would queue every call until the watch ends, possibly for ever.
            let address = address.clone();
            tracing::warn!(%address, "health check stopped: the endpoint allows one stream, and calls need it");
            subchannel.end_health_watch();
            self.update_ready_set(id);
            self.reclassify(&address);
        }
    }

    /// Handles a connection on which nothing was read in time. If a PING has proven that the peer is stalled, the connection gets no calls.
    fn on_silent(&mut self, dial_id: DialId, silence: Silence) {
        let Some(&id) = self.connected.get(&dial_id) else {
            return;
        };
        let Some((address, State::Ready(subchannel))) = self.subchannels.get_mut(&id) else {
            return;
        };
        if !subchannel.set_silence(silence) {
            // The same silence was already reported.
            return;
        }
        let address = address.clone();
        // If the connection has served calls, the backoff is reset and the second connection is dialled at once.
        let has_served = subchannel.connection().used().is_answered();
        if silence == Silence::Stalled {
            tracing::warn!(%address, "connection does not answer: dialling a second one beside it");
            self.note(&address, "does not answer any more".into());
        } else {
            tracing::debug!(%address, "connection is silent: dialling a second one beside it");
        }
        self.update_ready_set(id);
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
            // The latency estimate is older than the stall, so the connection starts again with the pool's median.
            subchannel.connection().load().forget(median);
            tracing::info!(%address, "connection answers again");
        }
        subchannel.set_silence(Silence::None);
        self.update_ready_set(id);
        if let Some((_, State::Ready(subchannel))) = self.subchannels.get(&id) {
            // A doubtful connection stays in the ready set, but calls that did not trust it are in the wait queue. Its permits are offered
            // to them.
            subchannel.connection().offer();
        }
        self.shared.changed.notify_waiters();
        self.drop_spare(&address);
        self.reclassify(&address);
    }

    /// Removes a connection from both ready sets if its peer does not answer or is not healthy. Otherwise puts it into the last-resort set if
    /// its endpoint is ejected or marked as last resort, and else into the primary set.
    pub(super) fn update_ready_set(&mut self, id: SubchannelId) {
        let Some((address, State::Ready(subchannel))) = self.subchannels.get(&id) else {
            return;
        };
        let Some(entry) = self.endpoints.get(address) else {
            return;
        };
        let is_foreign = entry
            .quarantine
            .is_some_and(|quarantine| !quarantine.is_over());
        let ejected = entry.ejection.is_ejected() || is_foreign;
        entry
            .endpoint
            .set_ejected(ejected || subchannel.is_stalled());
        if *subchannel.health() != Health::Serving || subchannel.is_stalled() {
            let connection = Arc::clone(subchannel.connection());
            return self.evict(id, &connection);
        }
        let weight = self.share(entry, Instant::now());
        let weight = weight.saturating_mul(self.zone_factor(entry));
        let is_reserve = ejected || entry.attributes.is_last_resort();
        let (here, there) = if is_reserve {
            (&mut self.last_resort, &mut self.primary)
        } else {
            (&mut self.primary, &mut self.last_resort)
        };
        let takes_calls = !is_reserve || self.is_last_resort;
        subchannel.connection().set_takes_calls(takes_calls);
        let moved = there.remove(&id);
        if !here.contains(&id) {
            here.insert(id, ReadyEntry::new(subchannel.connection()), weight);
        } else if !here.reweigh(&id, weight) {
            return;
        }
        // A connection that changed sets is published immediately; a change of weight alone can be batched.
        if moved {
            self.publish_now();
        } else {
            self.publish_soon();
        }
    }

    /// Replaces the connections that calls have given up.
    pub(super) fn redial_given_up(&mut self) {
        let given_up = self.shared.given_up();
        if given_up.is_empty() {
            return;
        }
        let ids: Vec<_> = given_up
            .iter()
            .filter_map(|connection| self.find(connection))
            .collect();
        for id in ids {
            self.redial(id);
        }
        self.publish();
        // The entries are removed after `publish`: until then a pick can still find these connections, and calls use the list to exclude
        // them.
        self.shared.lock_given_up().retain(|connection| {
            let mut done = given_up.iter();
            !done.any(|done| Arc::ptr_eq(done, connection))
        });
    }

    fn find(&self, connection: &Arc<ReadyConnection>) -> Option<SubchannelId> {
        let entry = self.endpoints.get(connection.endpoint().address())?;
        let is_it = |id: &&SubchannelId| matches!(self.subchannels.get(*id), Some((_, State::Ready(ready))) if Arc::ptr_eq(ready.connection(), connection));
        entry.subchannels.iter().find(is_it).copied()
    }

    /// Replaces a ready connection by a new one, even if its peer still answers.
    fn redial(&mut self, id: SubchannelId) {
        let Some((address, state)) = self.subchannels.remove(&id) else {
            return;
        };
        let state = match state {
            State::Ready(subchannel) => {
                State::Idle(self.replace_connection(id, &address, subchannel))
            }
            state => state,
        };
        self.subchannels.insert(id, (address.clone(), state));
        // The second connection, dialled beside the old one, is no longer needed.
        self.drop_spare(&address);
        self.reclassify(&address);
    }

    /// Closes a connection and queues a dial in its place. Calls in flight continue until they end or the connection breaks.
    pub(super) fn replace_connection(
        &mut self,
        id: SubchannelId,
        address: &Address,
        subchannel: Subchannel<Ready>,
    ) -> Subchannel<Idle> {
        tracing::info!(%address, "closing a connection and dialling a new one");
        subchannel.connection().endpoint().set_ejected(false);
        self.close(id, subchannel);
        // The new connection takes over the subchannel's id, so later events of the old connection must not be applied to it.
        self.connected.retain(|_, connected| *connected != id);
        self.enqueue(id);
        Subchannel::new(ConnectBackoff::new(self.options.max_backoff))
    }

    /// Runs the outlier detection on the calls since the last sweep.
    pub(super) fn sweep(&mut self, now: Instant) {
        let Some(config) = &self.options.outlier_detection else {
            return;
        };
        self.sweep_at = Some(now + config.period());
        let mut hosts: Vec<_> = self
            .endpoints
            .values_mut()
            .map(|entry| {
                let tally = entry.endpoint.tally();
                let before = std::mem::replace(&mut entry.judged, tally);
                (tally.since(before), entry.ejection)
            })
            .collect();
        outlier::sweep(config, &mut hosts, now);
        let mut moved = Vec::new();
        for (entry, (counts, ejection)) in self.endpoints.values_mut().zip(hosts) {
            let address = entry.endpoint.address();
            match (entry.ejection.is_ejected(), ejection.is_ejected()) {
                (false, true) => {
                    tracing::warn!(%address, ?counts, "endpoint ejected: it fails much more than the others");
                }
                (true, false) => tracing::info!(%address, "endpoint is no longer ejected"),
                _ => {
                    entry.ejection = ejection;
                    continue;
                }
            }
            entry.ejection = ejection;
            moved.extend(entry.subchannels.iter().copied());
        }
        for id in moved {
            self.update_ready_set(id);
        }
    }
}
