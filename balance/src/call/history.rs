//! Where a call has been, and where it goes next.

use std::sync::Arc;

use tonic::Status;

use super::core::Core;
use super::routing::Routing;
use super::status;
use crate::address::Address;
use crate::balance::{Endpoint, Exclusions, Permit, Pick, ReadyConnection, Snapshot, Summary};

/// Where a call has been: without being processed in this attempt, and at all in earlier ones.
#[derive(Default)]
pub(super) struct History {
    endpoints: Vec<Arc<Endpoint>>,
    connections: Vec<Arc<ReadyConnection>>,
    /// Connections that did not answer a check, and how many bytes their peer had sent before it. They are of use again once it sends more.
    silent: Vec<(Arc<ReadyConnection>, u64)>,
    /// Silent connections that the call may use after all, because no other was made in time.
    trusted: Vec<Arc<ReadyConnection>>,
    last: Option<Failure>,
    /// Why the call got no connection of its own.
    undialled: Option<Status>,
    /// Connections that ended in order with the call still unprocessed.
    goaways: usize,
    /// Connections that were lost with the call on them, in all attempts.
    lost: usize,
    /// Whether a peer has ended a connection with an error while the call was on it.
    blamed: bool,
    /// Whether a connection that carried the call alone was lost.
    alone: bool,
    /// Endpoints of attempts before this one, or beside it, the latest last. They are used again only where no other is ready.
    avoided: Vec<Address>,
    /// Where the call goes is told to whoever asked for it.
    route: Option<Routing>,
}

/// How a try ended.
struct Failure {
    address: Address,
    error: h2::Error,
}

impl History {
    /// For a call with wishes of its own.
    pub(super) fn by(route: Routing, given_up: Vec<Arc<ReadyConnection>>) -> Self {
        Self {
            connections: given_up,
            avoided: route.avoided().to_vec(),
            route: Some(route),
            ..Self::default()
        }
    }

    /// The call goes there now.
    pub(super) fn on_placed(&self, permit: &Permit) {
        if let Some(route) = &self.route {
            route.set_connection(permit.connection());
        }
    }

    /// Notes a connection that took no more streams when the call came: nothing against its endpoint.
    pub(super) fn add_gone(&mut self, permit: &Permit, error: h2::Error) {
        self.connections.push(Arc::clone(permit.connection()));
        self.last = Some(Failure {
            address: permit.endpoint().address().clone(),
            error,
        });
    }

    /// Notes a connection that did not answer a check before the call was sent on it.
    pub(super) fn add_silent(&mut self, permit: &Permit, bytes: u64) {
        self.silent.push((Arc::clone(permit.connection()), bytes));
    }

    /// Whether connections are left out because they did not answer a check.
    pub(super) fn has_silent(&self) -> bool {
        !self.silent.is_empty()
    }

    /// Allows the silent connections again, without another check: no other connection was made in time.
    pub(super) fn trust_silent(&mut self) {
        let silent = self.silent.drain(..).map(|(connection, _)| connection);
        self.trusted.extend(silent);
    }

    pub(super) fn trusts(&self, permit: &Permit) -> bool {
        let mut trusted = self.trusted.iter();
        trusted.any(|connection| Arc::ptr_eq(connection, permit.connection()))
    }

    /// Notes an endpoint to which no connection could be made for this call.
    pub(super) fn add_undialled(&mut self, endpoint: &Arc<Endpoint>, status: Status) {
        self.endpoints.push(Arc::clone(endpoint));
        self.undialled = Some(status);
    }

    /// Notes a connection that its peer has closed in order before it processed the call: nothing against its endpoint either.
    pub(super) fn add_closed(&mut self, permit: &Permit, error: h2::Error) {
        self.goaways += 1;
        self.add_gone(permit, error);
    }

    /// Notes an endpoint that has refused the call after it was sent.
    pub(super) fn add_refused(&mut self, permit: &Permit, error: h2::Error) {
        self.endpoints.push(Arc::clone(permit.endpoint()));
        self.add_gone(permit, error);
    }

    /// Notes that a connection was lost with the call on it. With `blamed`, its peer has ended it because of what was sent on it; if it
    /// carried the call `alone`, that was this call.
    pub(super) fn on_connection_lost(&mut self, blamed: bool, alone: bool) {
        self.lost += 1;
        self.blamed |= blamed;
        self.alone |= alone;
    }

    /// Whether a connection was lost with the call on it, so that no copy of it is sent besides.
    pub(super) fn has_lost(&self) -> bool {
        self.lost > 0
    }

    /// Returns whether this call may have caused the end of its connection. From then on it is sent on connections of its own.
    pub(super) fn is_suspect(&self) -> bool {
        self.blamed
    }

    /// Returns whether the call has to be taken for the cause of what happened to its connections. It is sent to no other.
    pub(super) fn is_to_blame(&self) -> bool {
        self.alone || self.lost >= LOST
    }

    /// Notes an endpoint that is to be used for another attempt only where no other is ready.
    pub(super) fn avoid(&mut self, endpoint: &Endpoint) {
        self.avoided.push(endpoint.address().clone());
    }

    /// Begins another attempt. What has refused the last one is not forgotten, but not ruled out any more.
    pub(super) fn next_attempt(&mut self, failed: Option<&Arc<Endpoint>>) {
        let refused = std::mem::take(&mut self.endpoints);
        let left = refused.iter().chain(failed);
        let left = left.map(|endpoint| endpoint.address().clone());
        self.avoided.extend(left);
        self.connections.clear();
        self.goaways = 0;
        self.last = None;
        self.undialled = None;
    }

    pub(super) fn is_exhausted(&self) -> bool {
        self.endpoints.len() > REPLAYS || self.goaways > GOAWAYS
    }

    /// Where the call does not go if it is given a place; with `fresh`, only where it was in no attempt yet.
    pub(super) fn exclusions(&self, fresh: bool) -> Exclusions {
        let endpoints = self.endpoints.iter();
        let mut endpoints: Vec<_> = endpoints
            .map(|endpoint| endpoint.address().clone())
            .collect();
        if fresh {
            endpoints.extend(self.avoided.iter().cloned());
        }
        Exclusions {
            connections: self.connections.clone(),
            silent: self.silent.clone(),
            endpoints,
        }
    }

    /// Whether there are endpoints that the call uses only where no other can be had.
    pub(super) fn avoids(&self) -> bool {
        !self.avoided.is_empty()
    }

    /// Whether the connection that was tried last stays in the ready set, so that waiting for the next set is in vain.
    pub(super) fn is_refusal_final(&self) -> bool {
        let is_reset = |last: &Failure| last.error.is_reset();
        self.undialled.is_some() || self.last.as_ref().is_some_and(is_reset)
    }

    /// Picks a place. With `fresh`, a full endpoint that the call has not been to is waited for in place of one where it has failed.
    pub(super) fn pick(&self, snapshot: &Snapshot<'_>, fresh: bool) -> Pick<Permit> {
        let mut is_full = false;
        if !self.avoided.is_empty() {
            let last = self.avoided.last();
            let is_last = |connection: &Arc<ReadyConnection>| {
                last.is_some_and(|last| last == connection.endpoint().address())
            };
            match self.pick_new(snapshot) {
                Pick::Excluded => {}
                Pick::Full if !fresh => is_full = true,
                pick => return pick,
            }
            match snapshot.pick(|connection| self.is_open(connection) && !is_last(connection)) {
                Pick::Excluded => {}
                Pick::Full => is_full = true,
                pick => return pick,
            }
        }
        let Summary {
            endpoints, pending, ..
        } = *snapshot.summary();
        let picked = match snapshot.pick(|connection| self.is_open(connection)) {
            // Where every endpoint has been tried, but for those that cannot be reached, another connection to one of them is another server
            // more often than not.
            // An endpoint that could not be dialled for this call has no other connection.
            Pick::Excluded
                if self.undialled.is_none()
                    && (self.endpoints.len() >= endpoints || pending == 0) =>
            {
                snapshot.pick(|connection| self.is_untried(connection))
            }
            pick => pick,
        };
        match picked {
            Pick::Excluded if is_full => Pick::Full,
            pick => pick,
        }
    }

    /// Picks an endpoint that the call has not been to in any attempt.
    pub(super) fn pick_new(&self, snapshot: &Snapshot<'_>) -> Pick<Permit> {
        let avoided = |connection: &Arc<ReadyConnection>| {
            self.avoided.contains(connection.endpoint().address())
        };
        snapshot.pick(|connection| self.is_open(connection) && !avoided(connection))
    }

    /// Whether neither the connection nor its endpoint was tried in this attempt.
    fn is_open(&self, connection: &Arc<ReadyConnection>) -> bool {
        self.is_untried(connection)
            && !self
                .endpoints
                .iter()
                .any(|history| is_at(history, connection))
    }

    fn is_untried(&self, connection: &Arc<ReadyConnection>) -> bool {
        let is_it = |history: &Arc<ReadyConnection>| Arc::ptr_eq(history, connection);
        let is_silent = |(history, bytes): &(Arc<ReadyConnection>, u64)| {
            is_it(history) && history.bytes_read() == *bytes
        };
        !self.connections.iter().any(is_it) && !self.silent.iter().any(is_silent)
    }

    /// The status of a call that has nowhere to go. Taken once.
    pub(super) fn take_status(&mut self, core: &Core, summary: &Summary, why: &str) -> Status {
        if let Some(status) = self.undialled.take() {
            return status;
        }
        match self.last.take() {
            Some(Failure { address, error }) => {
                status::broken(&core.service, &address, error, None)
            }
            None => status::unready(core, summary, why),
        }
    }
}

/// Whether a connection is to this endpoint, or to one of the same address that has been registered anew.
fn is_at(endpoint: &Endpoint, connection: &ReadyConnection) -> bool {
    endpoint.address() == connection.endpoint().address()
}

/// How often a call is sent again at most after refusals.
const REPLAYS: usize = 3;
/// How often it is sent again after connections that were closed in order: a server that ends each of its connections after one call leaves
/// all others on it to be sent again.
const GOAWAYS: usize = 64;
/// Connections lost with a call on them after which it is sent to no other.
const LOST: usize = 2;
