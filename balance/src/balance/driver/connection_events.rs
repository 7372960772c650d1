//! Handles the events of connections: nothing was read for a while (silence), the peer answers again, the peer has changed its limit on
//! streams, or the connection has ended.

use std::sync::Arc;

use tokio::time::Instant;

use super::disconnect_error::disconnect_error;
use super::driver::Driver;
use super::event_queue::SubchannelEvent;
use super::subchannel_table::{DialId, State};
use crate::balance::options::AddressCallback;
use crate::balance::subchannel::{Ending, Lost, Silence};
use crate::transport::connection_task::{CloseReason, ConnectionEvent};

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
            ConnectionEvent::StreamLimit => self.on_stream_limit(dial_id),
            ConnectionEvent::Closed(reason) => {
                if let Some(reason) = self.dials.on_closed(dial_id, reason) {
                    self.on_closed(dial_id, &reason);
                }
            }
        }
    }

    /// Handles a change of the peer's limit on concurrent streams.
    fn on_stream_limit(&mut self, dial_id: DialId) {
        let Some((id, address, subchannel)) = self.subchannels.of_connection(dial_id) else {
            return;
        };
        subchannel.connection().update_stream_limit();
        subchannel.connection().offer();
        self.shared.changed.notify_waiters();
        if self.options.health_check.is_some() && !subchannel.connection().http2().has_reserve() {
            // The health watch uses the only stream, so h2 would queue every call until the watch ends.
            let address = address.clone();
            tracing::warn!(%address, "health check stopped: the endpoint allows only one stream, and calls need that stream");
            subchannel.end_health_watch();
            self.update_ready_set(id);
            self.reclassify(&address);
        }
    }

    /// Handles a connection on which nothing was read in time. If the peer has left a PING unanswered ([`Silence::Stalled`]), the
    /// connection gets no calls until the peer answers again. If no PING was permitted ([`Silence::Doubtful`]), the connection still gets
    /// calls.
    fn on_silent(&mut self, dial_id: DialId, silence: Silence) {
        let Some((id, address, subchannel)) = self.subchannels.of_connection(dial_id) else {
            return;
        };
        if !subchannel.set_silence(silence) {
            // The same silence was already reported.
            return;
        }
        let address = address.clone();
        // If the connection has served calls, `dial_beside` resets the backoff for second connections, so that a second connection can be
        // dialled at once.
        let has_served = subchannel.connection().used().is_answered();
        if silence == Silence::Stalled {
            tracing::warn!(%address, "connection does not answer and gets no calls");
            self.set_last_error(&address, "does not answer any more".into());
        } else {
            tracing::debug!(%address, "nothing was read on the connection in time; it still gets calls");
        }
        self.update_ready_set(id);
        self.dial_beside(&address, has_served);
        self.reclassify(&address);
    }

    fn on_recovered(&mut self, dial_id: DialId) {
        let reference = self.latencies.reference();
        let Some((id, address, subchannel)) = self.subchannels.of_connection(dial_id) else {
            return;
        };
        let address = address.clone();
        if subchannel.is_stalled() {
            // The latency estimate is older than the stall, so it is replaced by the median of all endpoints.
            subchannel.connection().load().forget(reference);
            tracing::info!(%address, "connection answers again");
        }
        subchannel.set_silence(Silence::None);
        self.update_ready_set(id);
        if let Some((_, subchannel)) = self.subchannels.ready(id) {
            // A doubtful connection stays in the ready set, so `update_ready_set` does not offer its free streams to waiting calls. But
            // before a call is sent on a silent connection, the call checks the connection with a PING. If there is no answer, the call
            // excludes the connection and may have to wait in the queue. Now that bytes were read, such a call can use the connection
            // again.
            subchannel.connection().offer();
        }
        self.shared.changed.notify_waiters();
        self.drop_second_connection(&address);
        self.reclassify(&address);
    }

    /// Handles the end of a connection.
    pub(super) fn on_closed(&mut self, dial_id: DialId, reason: &CloseReason) {
        // A connection has no subchannel if its endpoint was removed, or if the connection was replaced.
        let Some((id, address, subchannel)) = self.subchannels.take_closed(dial_id) else {
            return;
        };
        if let Some(record) = subchannel.connection().record() {
            let goaway = subchannel.connection().http2().goaway();
            record.close(&disconnect_error(goaway, reason));
        }
        self.evict(id, subchannel.connection());
        self.check_too_many_pings(&address, subchannel.connection());
        if reason.is_graceful() {
            tracing::debug!(%address, %reason, "connection closed by its server");
        } else {
            tracing::info!(%address, %reason, "connection lost");
            self.set_last_error(&address, reason.to_string().into());
        }
        if let Some(AddressCallback(on_lost)) = &self.options.on_lost {
            on_lost(&address);
        }
        if subchannel.is_silent() && self.second_connection_takes_over(&address, id) {
            self.update_ready_sets(&address);
            return self.reclassify(&address);
        }
        let entry = self.endpoints.get(&address);
        if let Some(entry) = entry {
            let estimate = subchannel.connection().load().estimate();
            entry.endpoint.keep_estimate(estimate);
        }
        let last_resort = entry.is_some_and(|entry| entry.attributes.is_last_resort());
        let ending = Ending {
            graceful: reason.is_graceful(),
            used: Arc::clone(subchannel.connection().used()),
        };
        let state = match subchannel.lost(ending, &mut self.rng, Instant::now()) {
            Lost::Resting(subchannel) if last_resort => State::Idle(subchannel.wake(false)),
            Lost::Resting(subchannel) => {
                self.timers.push(subchannel.until(), id);
                self.resting.insert(id);
                State::Resting(subchannel)
            }
            Lost::Idle(subchannel) => {
                if !last_resort {
                    self.dials
                        .enqueue(id, subchannel.is_failing(), &mut self.rng);
                }
                State::Idle(subchannel)
            }
            Lost::TransientFailure(subchannel) if last_resort => State::Idle(subchannel.retry()),
            Lost::TransientFailure(subchannel) => {
                if reason.is_graceful() {
                    let reason = "the server closes its connections before it serves a call";
                    self.set_last_error(&address, reason.into());
                }
                self.timers.push(subchannel.until(), id);
                State::TransientFailure(subchannel)
            }
        };
        self.subchannels.insert(id, address.clone(), state);
        // Whether the endpoint counts as ejected depends on its other connections.
        self.update_ready_sets(&address);
        self.reclassify(&address);
    }
}
