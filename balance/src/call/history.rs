//! The endpoints and connections that a call has used, and the rules for its next pick.

use std::sync::Arc;

use tonic::Status;

use super::core::Core;
use super::routing::Routing;
use super::status;
use crate::address::Address;
use crate::balance::{
    Endpoint, Exclusions, Permit, Pick, ReadyConnection, Snapshot, SplitDraw, Summary,
};

/// The history of a call: the endpoints and connections that did not process the call in its current attempt, and the endpoints of its
/// earlier attempts.
#[derive(Default)]
pub(super) struct History {
    endpoints: Vec<Arc<Endpoint>>,
    connections: Vec<Arc<ReadyConnection>>,
    /// Connections that did not answer a check (a PING before the call is sent), with the number of bytes read from the peer before the
    /// check. The call may use such a connection again as soon as further bytes were read from it.
    silent: Vec<(Arc<ReadyConnection>, u64)>,
    /// Silent connections that the call may use without another check, because no other connection was dialled in time.
    trusted: Vec<Arc<ReadyConnection>>,
    last: Option<Failure>,
    /// Why a private connection, which would carry only this call, could not be dialled. The call fails with this status if no other
    /// endpoint takes the call.
    private_dial_error: Option<Status>,
    /// The number of connections, in the current attempt, that a peer closed with a GOAWAY whose last stream id excludes this call. The
    /// error code of the GOAWAY does not matter.
    goaways: usize,
    /// The number of connections that were lost while this call was on them, in all attempts.
    lost_connections: usize,
    /// Whether a connection that carried this call ended because its peer sent a GOAWAY with an error code. `NO_ERROR` and a GOAWAY because
    /// of `too_many_pings` do not count.
    goaway_with_error: bool,
    /// Whether a private connection, which carried only this call, was lost.
    lost_private_connection: bool,
    /// Endpoints of earlier attempts, of concurrent attempts, and of the [`Routing`], with the latest at the end. The call uses them only
    /// if no other endpoint is ready.
    avoided: Vec<Address>,
    /// The caller's routing, if any. It receives the connection of each send.
    route: Option<Routing>,
    /// The draw of the current attempt from the parts of the traffic split.
    draw: SplitDraw,
}

/// The failure of one send.
struct Failure {
    address: Address,
    error: h2::Error,
}

impl History {
    /// Creates the history of a call with a [`Routing`]. `given_up` contains the connections that the channel is about to replace. The
    /// first attempt does not use them.
    pub(super) fn with_routing(route: Routing, given_up: Vec<Arc<ReadyConnection>>) -> Self {
        Self {
            connections: given_up,
            avoided: route.avoided().to_vec(),
            route: Some(route),
            ..Self::default()
        }
    }

    /// Creates the history of a call whose first pick has already drawn its part of the traffic split.
    pub(super) fn with_draw(draw: SplitDraw) -> Self {
        Self {
            draw,
            ..Self::default()
        }
    }

    /// Returns the draw of the current attempt from the parts of the traffic split.
    pub(super) fn draw(&self) -> &SplitDraw {
        &self.draw
    }

    /// Records the connection that the call was sent on, for its [`Routing`].
    pub(super) fn on_sent(&self, permit: &Permit) {
        if let Some(route) = &self.route {
            route.set_connection(permit.connection());
        }
    }

    /// Excludes a connection that does not accept or process the call. Other connections of its endpoint may still be picked.
    pub(super) fn exclude_connection(&mut self, permit: &Permit, error: h2::Error) {
        self.connections.push(Arc::clone(permit.connection()));
        self.last = Some(Failure {
            address: permit.endpoint().address().clone(),
            error,
        });
    }

    /// Records a connection that did not answer a check before the call was sent on it.
    pub(super) fn add_silent(&mut self, permit: &Permit, bytes: u64) {
        self.silent.push((Arc::clone(permit.connection()), bytes));
    }

    /// Returns whether connections are excluded because they did not answer a check.
    pub(super) fn has_silent(&self) -> bool {
        !self.silent.is_empty()
    }

    /// Allows the silent connections without another check, because no other connection was made in time.
    pub(super) fn trust_silent(&mut self) {
        let silent = self.silent.drain(..).map(|(connection, _)| connection);
        self.trusted.extend(silent);
    }

    /// Returns true if the call uses the connection of `permit` without another check, after [`trust_silent`](Self::trust_silent).
    pub(super) fn trusts(&self, permit: &Permit) -> bool {
        let mut trusted = self.trusted.iter();
        trusted.any(|connection| Arc::ptr_eq(connection, permit.connection()))
    }

    /// Records an endpoint to which no private connection could be dialled for this call.
    pub(super) fn add_private_dial_failure(&mut self, endpoint: &Arc<Endpoint>, status: Status) {
        self.endpoints.push(Arc::clone(endpoint));
        self.private_dial_error = Some(status);
    }

    /// Records a connection that the peer closed with a GOAWAY whose last stream id excludes this call. The endpoint may be picked again on
    /// another connection, as after [`exclude_connection`](Self::exclude_connection).
    pub(super) fn add_closed(&mut self, permit: &Permit, error: h2::Error) {
        self.goaways += 1;
        self.exclude_connection(permit, error);
    }

    /// Records an endpoint that refused the call after it was sent.
    pub(super) fn add_refused(&mut self, permit: &Permit, error: h2::Error) {
        self.endpoints.push(Arc::clone(permit.endpoint()));
        self.exclude_connection(permit, error);
    }

    /// Records that a connection was lost while this call was on it. If `goaway_with_error`, the peer has sent a GOAWAY with an error code,
    /// so a call on the connection may be the cause. If `lost_private_connection`, the connection was private to this call, so the call is
    /// treated as the cause.
    pub(super) fn on_connection_lost(
        &mut self,
        goaway_with_error: bool,
        lost_private_connection: bool,
    ) {
        self.lost_connections += 1;
        self.goaway_with_error |= goaway_with_error;
        self.lost_private_connection |= lost_private_connection;
    }

    /// Returns whether a connection was lost while this call was on it. If so, no further hedge is sent.
    pub(super) fn has_lost_connection(&self) -> bool {
        self.lost_connections > 0
    }

    /// Returns whether this call may have caused the end of a connection. If so, the call is sent only on private connections.
    pub(super) fn is_suspect(&self) -> bool {
        self.goaway_with_error
    }

    /// Returns whether this call is treated as the cause of its lost connections. If so, the call is not sent again.
    pub(super) fn is_to_blame(&self) -> bool {
        self.lost_private_connection || self.lost_connections >= MAX_LOST_CONNECTIONS
    }

    /// Records an endpoint that later attempts use only if no other endpoint is ready. The next attempt draws its part of the traffic split.
    pub(super) fn avoid(&mut self, endpoint: &Endpoint) {
        self.avoided.push(endpoint.address().clone());
        self.draw = SplitDraw::default();
    }

    /// Starts another attempt. `failed` is the endpoint at which the last attempt failed, if any. This endpoint, and the endpoints that
    /// refused the last attempt, can be picked again, but only if no other endpoint is ready.
    pub(super) fn next_attempt(&mut self, failed: Option<&Arc<Endpoint>>) {
        let refused = std::mem::take(&mut self.endpoints);
        let left = refused.iter().chain(failed);
        let left = left.map(|endpoint| endpoint.address().clone());
        self.avoided.extend(left);
        self.connections.clear();
        self.goaways = 0;
        self.last = None;
        self.private_dial_error = None;
        self.draw = SplitDraw::default();
    }

    /// Returns true if the limit on transparent retries of this attempt is exceeded. The call then fails.
    pub(super) fn is_exhausted(&self) -> bool {
        self.endpoints.len() > MAX_REFUSALS || self.goaways > MAX_GOAWAYS
    }

    /// Returns the exclusions of this call for the wait queue. The queue does not hand the call a stream of an excluded connection or
    /// endpoint. With `avoid_used_endpoints`, all avoided endpoints are included.
    pub(super) fn exclusions(&self, avoid_used_endpoints: bool) -> Exclusions {
        let endpoints = self.endpoints.iter();
        let mut endpoints: Vec<_> = endpoints
            .map(|endpoint| endpoint.address().clone())
            .collect();
        if avoid_used_endpoints {
            endpoints.extend(self.avoided.iter().cloned());
        }
        Exclusions {
            connections: self.connections.clone(),
            silent: self.silent.clone(),
            endpoints,
        }
    }

    /// Returns whether there are endpoints that the call uses only if no other endpoint is available.
    pub(super) fn avoids(&self) -> bool {
        !self.avoided.is_empty()
    }

    /// Returns true if the call must fail instead of waiting until the set of ready connections changes. There are two cases. If the last
    /// failure reset only the stream, its connection stays in the set, so the wait could have no end. If a private connection could not be
    /// dialled, the call fails for that reason.
    pub(super) fn is_refusal_final(&self) -> bool {
        let is_reset = |last: &Failure| last.error.is_reset();
        self.private_dial_error.is_some() || self.last.as_ref().is_some_and(is_reset)
    }

    /// Picks a connection, preferably to an endpoint that the call has not used. If all ready endpoints that the call has not used are full
    /// (have no free stream), picks a used endpoint. With `avoid_used_endpoints`, returns `Full` in this case, so that the call waits for a
    /// free stream. An endpoint with as many requests as its limit allows counts as full, but the call never waits for it while another
    /// endpoint can take the call.
    pub(super) fn pick(&self, snapshot: &Snapshot, avoid_used_endpoints: bool) -> Pick<Permit> {
        let (mut is_full, mut is_limited) = (false, false);
        if !self.avoided.is_empty() {
            let last = self.avoided.last();
            let is_last = |connection: &Arc<ReadyConnection>| {
                last.is_some_and(|last| last == connection.endpoint().address())
            };
            match self.pick_new(snapshot) {
                Pick::Excluded => {}
                Pick::Limited => is_limited = true,
                Pick::Full if !avoid_used_endpoints => is_full = true,
                pick => return pick,
            }
            match snapshot
                .pick(|connection| self.is_untried_endpoint(connection) && !is_last(connection))
            {
                Pick::Excluded => {}
                Pick::Limited => is_limited = true,
                Pick::Full => is_full = true,
                pick => return pick,
            }
        }
        let (endpoints, pending) = snapshot.endpoints_and_pending();
        let picked = match snapshot.pick(|connection| self.is_untried_endpoint(connection)) {
            // Every reachable endpoint was tried. Behind a proxy, another connection to the same endpoint often leads to another server, so
            // untried connections of tried endpoints are allowed. This does not apply if a private connection could not be dialled: on
            // another shared connection of that endpoint, the call would need the same private connection.
            Pick::Excluded
                if self.private_dial_error.is_none()
                    && (self.endpoints.len() >= endpoints || pending == 0) =>
            {
                snapshot.pick(|connection| self.is_untried(connection))
            }
            pick => pick,
        };
        match picked {
            Pick::Excluded | Pick::Limited if is_full => Pick::Full,
            Pick::Excluded if is_limited => Pick::Limited,
            pick => pick,
        }
    }

    /// Picks an endpoint that the call has not used in any attempt.
    pub(super) fn pick_new(&self, snapshot: &Snapshot) -> Pick<Permit> {
        let avoided = |connection: &Arc<ReadyConnection>| {
            self.avoided.contains(connection.endpoint().address())
        };
        snapshot.pick(|connection| self.is_untried_endpoint(connection) && !avoided(connection))
    }

    /// Returns whether neither the connection nor its endpoint was tried in this attempt.
    fn is_untried_endpoint(&self, connection: &Arc<ReadyConnection>) -> bool {
        self.is_untried(connection)
            && !self
                .endpoints
                .iter()
                .any(|endpoint| is_at(endpoint, connection))
    }

    /// Returns false if the connection was tried in this attempt, or if it did not answer a check and no byte was read from it since then.
    fn is_untried(&self, connection: &Arc<ReadyConnection>) -> bool {
        let is_same = |tried: &Arc<ReadyConnection>| Arc::ptr_eq(tried, connection);
        let is_silent = |(tried, bytes): &(Arc<ReadyConnection>, u64)| {
            is_same(tried) && tried.bytes_read() == *bytes
        };
        !self.connections.iter().any(is_same) && !self.silent.iter().any(is_silent)
    }

    /// Returns the status of a call that no endpoint can take. Clears the recorded failure.
    pub(super) fn take_status(&mut self, core: &Core, summary: &Summary, why: &str) -> Status {
        if let Some(status) = self.private_dial_error.take() {
            return status;
        }
        match self.last.take() {
            Some(Failure { address, error }) => {
                status::connection_or_stream_failed(&core.service, &address, error, None)
            }
            None => status::unready(core, summary, why),
        }
    }
}

/// Returns whether a connection has the address of this endpoint. The addresses are compared, because after a new registration the
/// connection can belong to another `Endpoint` object.
fn is_at(endpoint: &Endpoint, connection: &ReadyConnection) -> bool {
    endpoint.address() == connection.endpoint().address()
}

/// Limit on the transparent retries of an attempt after refusals.
const MAX_REFUSALS: usize = 3;
/// Limit on the transparent retries of an attempt after a GOAWAY that excluded the call. The limit is high, because some servers close each
/// connection after one call. All other calls on the connection must then be sent again.
const MAX_GOAWAYS: usize = 64;
/// After this many connections were lost with the same call on them, the call is not sent again.
const MAX_LOST_CONNECTIONS: usize = 2;
