//! Dials connections, and handles failed dials and lost connections.

use std::cmp::Reverse;
use std::sync::Arc;

use tokio::task::{AbortHandle, Id, JoinError};
use tokio::time::Instant;

use super::driver::{Dial, DialId, Driver, State, SubchannelEvent, SubchannelId};
use crate::address::Address;
use crate::balance::limits::MAX_DURATION;
use crate::balance::options::OnRefused;
use crate::balance::ready_connection::ReadyConnection;
use crate::balance::subchannel::{Connecting, Ending, Lost, Subchannel};
use crate::balance::summary::EndpointError;
use crate::balance::waiters::Waiters;
use crate::error::causes;
use crate::transport::connect::{Attempt, DialError};
use crate::transport::connection_task::CloseReason;
use crate::transport::http2::Connection;

impl Driver {
    /// Queues a subchannel for dialling, in random order.
    pub(super) fn enqueue(&mut self, id: SubchannelId) {
        let is_failing =
            matches!(self.subchannels.get(&id), Some((_, State::Idle(one))) if one.is_failing());
        self.enqueue_as(id, is_failing);
    }

    fn enqueue_as(&mut self, id: SubchannelId, is_failing: bool) {
        let queue = if is_failing {
            &mut self.failing
        } else {
            &mut self.queue
        };
        queue.push_back(id);
        let place = self.rng.usize(..queue.len());
        let last = queue.len() - 1;
        queue.swap(place, last);
    }

    /// Returns the next subchannel to dial. Failing subchannels are dialled last and use at most half of the dials: if a thousand endpoints
    /// do not answer, each dial takes its whole timeout, and the other endpoints must not wait for them.
    fn next_queued(&mut self) -> Option<SubchannelId> {
        if let Some(id) = self.queue.pop_front() {
            return Some(id);
        }
        if self.retries < DIALS / 2 {
            return self.failing.pop_front();
        }
        None
    }

    pub(super) fn dial_queued(&mut self) {
        while self.dials.len() < DIALS {
            let Some(id) = self.next_queued() else {
                return;
            };
            let Some((address, state)) = self.subchannels.remove(&id) else {
                continue;
            };
            let state = match state {
                State::Idle(subchannel) if self.is_dialled(&address) => {
                    let failed = subchannel.failed_attempts();
                    let dial = self.dial(id, &address, subchannel.is_failing(), failed);
                    State::Connecting(subchannel.connect(dial, Instant::now()))
                }
                state => state,
            };
            self.subchannels.insert(id, (address.clone(), state));
            self.reclassify(&address);
        }
    }

    pub(super) fn is_dialled(&self, address: &Address) -> bool {
        let entry = self.endpoints.get(address);
        entry.is_some_and(|entry| !entry.attributes.is_last_resort())
    }

    fn dial(
        &mut self,
        id: SubchannelId,
        address: &Address,
        is_retry: bool,
        failed: usize,
    ) -> AbortHandle {
        tracing::debug!(%address, "connecting");
        self.next_id += 1;
        let dial_id = self.next_id;
        let events = self.on_event.clone();
        let on_event = move |event| {
            // The send fails only if the driver has ended, and then no task reads the event.
            let _ = events.send((dial_id, SubchannelEvent::Connection(event)));
        };
        let (connector, address) = (Arc::clone(&self.connector), address.clone());
        let keep_alive = self
            .endpoints
            .get(&address)
            .and_then(|entry| entry.keep_alive);
        let attempt = Attempt { failed, keep_alive };
        let dial = async move { connector.connect(&address, attempt, on_event).await };
        let dial = self.dials.spawn(dial);
        self.retries += usize::from(is_retry);
        let dialling = Dial {
            subchannel: id,
            id: dial_id,
            is_retry,
        };
        self.dialling.insert(dial.id(), dialling);
        dial
    }

    /// Drops the record of a subchannel's dial, so that its outcome is ignored.
    pub(super) fn forget_dial(&mut self, id: SubchannelId) {
        let (retries, lost_early) = (&mut self.retries, &mut self.lost_early);
        self.dialling.retain(|_, dial| {
            let stays = dial.subchannel != id;
            *retries -= usize::from(!stays && dial.is_retry);
            if !stays {
                lost_early.remove(&dial.id);
            }
            stays
        });
    }

    pub(super) fn on_dialled(
        &mut self,
        dialled: Result<(Id, Result<Connection, DialError>), JoinError>,
    ) {
        let (task, outcome) = match dialled {
            Ok((task, outcome)) => (task, outcome),
            Err(error) => (error.id(), Err(DialError::Panicked(error))),
        };
        let Some(dial) = self.dialling.remove(&task) else {
            return;
        };
        self.retries -= usize::from(dial.is_retry);
        let (id, dial_id) = (dial.subchannel, dial.id);
        let lost_early = self.lost_early.remove(&dial_id);
        let Some((address, state)) = self.subchannels.remove(&id) else {
            return;
        };
        let State::Connecting(subchannel) = state else {
            // The dial was cancelled before its outcome was received.
            self.subchannels.insert(id, (address, state));
            return;
        };
        match outcome {
            Ok(connection) => {
                self.connected.insert(dial_id, id);
                self.on_connected(id, dial_id, &address, subchannel, connection);
                if let Some(leave) = lost_early {
                    self.on_left(dial_id, &leave);
                }
            }
            Err(error) => self.on_refused(id, &address, subchannel, &error),
        }
    }

    pub(super) fn on_connected(
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
        let load = self.loads.begin(entry.endpoint.estimate(), self.median);
        let connection = Arc::new(ReadyConnection::new(
            connection,
            Arc::clone(&entry.endpoint),
            load,
            Arc::<Waiters>::clone(&self.shared.waiters),
            self.shared.started,
        ));
        connection.follow_limit();
        let weak = Arc::downgrade(&connection);
        // A weak reference: the connection's task must not keep the connection open.
        connection.http2().set_busy(move || {
            let connection = weak.upgrade();
            connection.is_some_and(|connection| connection.load().in_flight() > 0)
        });
        let dial = !entry.attributes.is_last_resort();
        let health_watch = self.watch_health(dial_id, &connection);
        let is_asked = health_watch.is_some();
        let ready = State::Ready(subchannel.connected(connection, health_watch));
        self.subchannels.insert(id, (address.clone(), ready));
        if !is_asked {
            self.replace_stalled(address, id);
        }
        let connections = self
            .endpoints
            .get(address)
            .map_or(0, |entry| entry.subchannels.len());
        let missing = self
            .options
            .connections_per_endpoint
            .saturating_sub(connections);
        if is_asked {
            tracing::debug!(%address, ?round_trip, "connected: waiting for the health check");
        } else {
            tracing::info!(%address, ?round_trip, "endpoint ready");
            self.start_slowly(address, Instant::now());
            self.update_ready_set(id);
        }
        // The other connections of an endpoint are dialled only after the first one is ready.
        for _ in 0..missing {
            self.add_subchannel(address, dial);
        }
        self.reclassify(address);
        self.publish_soon();
    }

    pub(super) fn on_refused(
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
            tracing::info!(%address, %reason, "endpoint failing: no connection");
        } else {
            tracing::debug!(%address, %reason, "endpoint still failing");
        }
        self.note(address, reason.into());
        if let Some(entry) = self.endpoints.get_mut(address) {
            entry.warm = false;
        }
        if let Some(OnRefused(tell)) = &self.options.on_refused {
            tell(address);
        }
        self.timers.push(Reverse((failed.until(), id)));
        let failed = State::TransientFailure(failed);
        self.subchannels.insert(id, (address.clone(), failed));
        self.reclassify(address);
    }

    /// Handles the end of a connection, which may be reported before the end of its dial.
    pub(super) fn on_lost(&mut self, dial_id: DialId, leave: CloseReason) {
        let mut dialling = self.dialling.values();
        if dialling.any(|dialling| dialling.id == dial_id) {
            self.lost_early.insert(dial_id, leave);
        } else {
            self.on_left(dial_id, &leave);
        }
    }

    fn on_left(&mut self, dial_id: DialId, leave: &CloseReason) {
        let Some(id) = self.connected.remove(&dial_id) else {
            return;
        };
        // The connection of a removed endpoint ends as well, but has no subchannel any more.
        let Some((address, State::Ready(subchannel))) = self.subchannels.remove(&id) else {
            return;
        };
        self.evict(id, subchannel.connection());
        self.heed_pings(&address, subchannel.connection());
        if leave.is_graceful() {
            tracing::debug!(%address, reason = %leave, "connection closed by its server");
        } else {
            tracing::info!(%address, reason = %leave, "connection lost");
        }
        if !leave.is_graceful() {
            self.note(&address, leave.to_string().into());
        }
        if subchannel.is_silent() && self.spare_takes_over(&address, id) {
            return self.reclassify(&address);
        }
        let entry = self.endpoints.get(&address);
        if let Some(entry) = entry {
            let estimate = subchannel.connection().load().estimate();
            entry.endpoint.keep_estimate(estimate);
        }
        let last_resort = entry.is_some_and(|entry| entry.attributes.is_last_resort());
        let ending = Ending {
            graceful: leave.is_graceful(),
            used: Arc::clone(subchannel.connection().used()),
        };
        let state = match subchannel.lost(ending, &mut self.rng, Instant::now()) {
            Lost::Resting(subchannel) if last_resort => State::Idle(subchannel.wake(false)),
            Lost::Resting(subchannel) => {
                self.timers.push(Reverse((subchannel.until(), id)));
                self.resting.insert(id);
                State::Resting(subchannel)
            }
            Lost::Idle(subchannel) => {
                if !last_resort {
                    self.enqueue_as(id, subchannel.is_failing());
                }
                State::Idle(subchannel)
            }
            Lost::TransientFailure(subchannel) if last_resort => State::Idle(subchannel.retry()),
            Lost::TransientFailure(subchannel) => {
                if leave.is_graceful() {
                    let reason = "the server closes its connections before it serves a call";
                    self.note(&address, reason.into());
                }
                self.timers.push(Reverse((subchannel.until(), id)));
                State::TransientFailure(subchannel)
            }
        };
        self.subchannels.insert(id, (address.clone(), state));
        self.reclassify(&address);
    }

    /// Doubles the keep-alive interval of an endpoint whose server has closed a connection because of its PINGs (gRFC A8).
    fn heed_pings(&mut self, address: &Address, connection: &ReadyConnection) {
        if !connection.http2().has_too_many_pings() {
            return;
        }
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        if let Some(keep_alive) = &mut entry.keep_alive {
            keep_alive.interval = keep_alive.interval.saturating_mul(2).min(MAX_DURATION);
            keep_alive.permit = keep_alive.permit.max(keep_alive.interval);
            let interval = keep_alive.interval;
            tracing::warn!(%address, ?interval, "too many pings: the keep-alive interval is doubled");
        } else {
            tracing::warn!(%address, "the server has closed a connection because of its PINGs");
        }
    }

    pub(super) fn note(&mut self, address: &Address, reason: Arc<str>) {
        if let Some(entry) = self.endpoints.get(address) {
            entry.endpoint.set_last_error(Arc::clone(&reason));
        }
        let address = address.clone();
        self.summary.last_error = Some(Arc::new(EndpointError { address, reason }));
        self.publish_soon();
    }

    pub(super) fn on_backoff_over(&mut self, id: SubchannelId, now: Instant) {
        let Some((address, state)) = self.subchannels.remove(&id) else {
            return;
        };
        let state = match state {
            State::Resting(subchannel) if subchannel.until() <= now => {
                self.resting.remove(&id);
                self.enqueue(id);
                State::Idle(subchannel.wake(false))
            }
            // A timer of an earlier wait may fire during a later wait. The guard ignores it.
            State::TransientFailure(subchannel) if subchannel.until() <= now => {
                self.enqueue_as(id, subchannel.is_failing());
                State::Idle(subchannel.retry())
            }
            state => state,
        };
        self.subchannels.insert(id, (address, state));
    }
}

/// Limit on concurrent dials: enough to connect thousands of endpoints within a second, and few enough for a limit on open files.
const DIALS: usize = 256;
