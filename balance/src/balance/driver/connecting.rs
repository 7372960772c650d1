//! Dials connections, and handles the outcomes of dials.

use std::sync::Arc;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::dials::Ended;
use super::driver::Driver;
use super::event_queue::SubchannelEvent;
use super::subchannel_table::{DialId, State, SubchannelId};
use crate::address::Address;
use crate::balance::options::AddressCallback;
use crate::balance::ready_connection::ReadyConnection;
use crate::balance::stream_queue::Waiters;
use crate::balance::subchannel::{Connecting, Idle, Subchannel};
use crate::causes::causes;
use crate::metrics::ConnectionRecord;
use crate::transport::connect::{DialError, DialHistory};
use crate::transport::http2::Connection;

impl Driver {
    /// Queues a subchannel for a dial, at a random position in the queue.
    pub(super) fn enqueue(&mut self, id: SubchannelId) {
        let is_failing = self.subchannels.is_failing(id);
        self.dials.enqueue(id, is_failing, &mut self.rng);
    }

    /// Starts queued dials, up to the limit on concurrent dials.
    pub(super) fn dial_queued(&mut self) {
        while let Some(id) = self.dials.next() {
            let Some((address, state)) = self.subchannels.take(id) else {
                continue;
            };
            let state = match state {
                State::Idle(subchannel) if self.may_be_dialled(&address) => {
                    let dial = self.dial(id, &address, &subchannel);
                    State::Connecting(subchannel.connect(dial, Instant::now()))
                }
                state => state,
            };
            self.subchannels.insert(id, address.clone(), state);
            self.reclassify(&address);
        }
    }

    fn may_be_dialled(&self, address: &Address) -> bool {
        let entry = self.endpoints.get(address);
        entry.is_some_and(|entry| !entry.attributes.is_last_resort())
    }

    fn dial(
        &mut self,
        id: SubchannelId,
        address: &Address,
        subchannel: &Subchannel<Idle>,
    ) -> AbortHandle {
        tracing::debug!(%address, "connecting");
        let dial_id = self.subchannels.next_id();
        let report = self.events.reporter(dial_id);
        let on_event = move |event| report(SubchannelEvent::Connection(event));
        let entry = self.endpoints.get(address);
        let history = DialHistory {
            failed: subchannel.failed_attempts(),
            keep_alive: entry.and_then(|entry| entry.keep_alive),
        };
        let (connector, address) = (Arc::clone(&self.connector), address.clone());
        let dial = async move { connector.connect(&address, history, on_event).await };
        self.dials.start(id, dial_id, subchannel.is_failing(), dial)
    }

    pub(super) fn on_dial_ended(&mut self, ended: Ended) {
        let Some(dialled) = self.dials.finish(ended) else {
            return;
        };
        let id = dialled.subchannel;
        let Some((address, state)) = self.subchannels.take(id) else {
            return;
        };
        let State::Connecting(subchannel) = state else {
            // The dial was cancelled before its outcome was received.
            self.subchannels.insert(id, address, state);
            return;
        };
        match dialled.outcome {
            Ok(connection) => {
                self.subchannels.on_connected(dialled.id, id);
                self.on_connected(id, dialled.id, &address, subchannel, connection);
                if let Some(reason) = dialled.closed {
                    self.on_closed(dialled.id, &reason);
                }
            }
            Err(error) => self.on_dial_failed(id, &address, subchannel, &error),
        }
    }

    fn on_connected(
        &mut self,
        id: SubchannelId,
        dial_id: DialId,
        address: &Address,
        subchannel: Subchannel<Connecting>,
        connection: Connection,
    ) {
        let Some(entry) = self.endpoints.get(address) else {
            return;
        };
        let round_trip = connection.round_trip();
        let load = self.latencies.begin(entry.endpoint.estimate());
        let connection = ReadyConnection::new(
            connection,
            Arc::clone(&entry.endpoint),
            load,
            Arc::<Waiters>::clone(&self.shared.waiters),
            self.shared.started,
        );
        let metrics = self.options.metrics.as_ref();
        let metrics = metrics.map(|metrics| metrics.subchannel(entry.attributes.zone()));
        let connection = connection
            .with_record(metrics.map(ConnectionRecord::open))
            .with_requests(entry.requests.clone());
        let connection = Arc::new(connection);
        if let Some(requests) = &entry.requests {
            requests.add_connection(&connection);
        }
        connection.update_stream_limit();
        let weak = Arc::downgrade(&connection);
        // The callback holds a weak reference, so that it does not keep the connection open.
        connection.http2().set_busy(move || {
            let connection = weak.upgrade();
            connection.is_some_and(|connection| connection.load().in_flight() > 0)
        });
        let dial = !entry.attributes.is_last_resort();
        let health_watch = self.watch_health(dial_id, &connection);
        let awaits_health = health_watch.is_some();
        let ready = State::Ready(subchannel.connected(connection, health_watch));
        self.subchannels.insert(id, address.clone(), ready);
        if !awaits_health {
            self.replace_silent(address, id);
        }
        let connections = self
            .endpoints
            .get(address)
            .map_or(0, |entry| entry.subchannels.len());
        let missing = self
            .options
            .connections_per_endpoint
            .saturating_sub(connections);
        if awaits_health {
            tracing::debug!(%address, ?round_trip, "connected: waiting for the health check");
        } else {
            tracing::info!(%address, ?round_trip, "endpoint ready");
            self.begin_weight(address, Instant::now());
            self.update_ready_set(id);
        }
        // The other connections of an endpoint are dialled only after its first connection is established.
        for _ in 0..missing {
            self.add_subchannel(address, dial);
        }
        self.reclassify(address);
        self.publication.soon();
    }

    fn on_dial_failed(
        &mut self,
        id: SubchannelId,
        address: &Address,
        subchannel: Subchannel<Connecting>,
        error: &DialError,
    ) {
        let first = !subchannel.is_failing();
        let failed = subchannel.failed(&mut self.rng, Instant::now());
        let reason = causes(error);
        if first {
            tracing::info!(%address, %reason, "endpoint is failing: could not connect");
        } else {
            tracing::debug!(%address, %reason, "endpoint still failing");
        }
        self.set_last_error(address, reason.into());
        if let Some(entry) = self.endpoints.get_mut(address) {
            entry.is_warm = false;
            let metrics = self.options.metrics.as_ref();
            if let Some(metrics) =
                metrics.map(|metrics| metrics.subchannel(entry.attributes.zone()))
            {
                metrics.on_failed();
            }
        }
        if let Some(AddressCallback(on_refused)) = &self.options.on_refused {
            on_refused(address);
        }
        self.timers.push(failed.until(), id);
        let failed = State::TransientFailure(failed);
        self.subchannels.insert(id, address.clone(), failed);
        self.reclassify(address);
    }

    pub(super) fn set_last_error(&mut self, address: &Address, reason: Arc<str>) {
        if let Some(entry) = self.endpoints.get(address) {
            entry.endpoint.set_last_error(Arc::clone(&reason));
        }
        self.publication.set_last_error(address.clone(), reason);
    }

    /// Handles an expired timer of a subchannel. The timer ends a backoff, or the wait of a resting subchannel, whose connection ended
    /// while no call needed it.
    pub(super) fn on_backoff_over(&mut self, id: SubchannelId, now: Instant) {
        let Some((address, state)) = self.subchannels.take(id) else {
            return;
        };
        // Timers cannot be cancelled, so the timer of an earlier wait may expire during a later wait. The guards ignore such a timer.
        let state = match state {
            State::Resting(subchannel) if subchannel.until() <= now => {
                self.resting.remove(id);
                self.enqueue(id);
                State::Idle(subchannel.wake(false))
            }
            State::TransientFailure(subchannel) if subchannel.until() <= now => {
                self.dials
                    .enqueue(id, subchannel.is_failing(), &mut self.rng);
                State::Idle(subchannel.retry())
            }
            state => state,
        };
        self.subchannels.insert(id, address, state);
    }
}
