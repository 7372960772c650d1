//! A connection in the ready set.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::endpoint::Endpoint;
use super::load::{Load, LoadHandle, Ticks};
use super::picker::Candidate;
use super::waiters::Waiters;
use crate::transport::http2::Connection;

/// One connection to an endpoint that is in the ready set, or was when a call took it.
#[derive(Debug)]
pub(crate) struct Member {
    load: LoadHandle,
    connection: Connection,
    endpoint: Arc<Endpoint>,
    waiters: Arc<Waiters>,
    /// The channel's start, which the estimate counts time from.
    epoch: Instant,
}

impl Member {
    pub(super) fn new(
        connection: Connection,
        endpoint: Arc<Endpoint>,
        load: LoadHandle,
        waiters: Arc<Waiters>,
        epoch: Instant,
    ) -> Self {
        Self {
            load,
            connection,
            endpoint,
            waiters,
            epoch,
        }
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// A time as the estimate has it.
    pub(super) fn ticks(&self, now: Instant) -> Ticks {
        Ticks::at(now, self.epoch)
    }

    /// Gives a call's place up.
    pub(super) fn release(&self) {
        self.load.release();
        self.waiters.on_release();
    }

    /// Takes over how many calls the peer allows.
    pub(super) fn follow_limit(&self) {
        self.load.set_limit(self.connection.max_streams());
    }

    /// Notes a failure that only the caller can tell, of a call or a stream. With a time since when the peer was to answer, a PING will tell
    /// whether it is there at all.
    pub(crate) fn on_complaint(&self, now: Instant, silent_since: Option<Instant>) {
        self.load.on_failure(Duration::ZERO, self.ticks(now));
        if let Some(then) = silent_since {
            self.connection.suspect(then);
        }
    }

    /// Whether every stream the peer allows is in use.
    pub(super) fn is_full(&self) -> bool {
        self.load.in_flight() as usize >= self.load.limit()
    }
}

/// A member in a set that calls pick from, with its load at hand: of those that are not chosen a pick reads nothing else.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    member: Arc<Member>,
    load: LoadHandle,
}

impl Seat {
    pub(super) fn new(member: &Arc<Member>) -> Self {
        Self {
            member: Arc::clone(member),
            load: member.load.clone(),
        }
    }

    pub(super) fn member(&self) -> &Arc<Member> {
        &self.member
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }
}

impl Candidate for Seat {
    fn latency(&self) -> f32 {
        self.load.latency()
    }

    fn in_flight(&self) -> u32 {
        self.load.in_flight()
    }

    fn acquire(&self) -> bool {
        self.load.acquire()
    }
}
