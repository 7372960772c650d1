//! A connection in the ready set.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::endpoint::{Endpoint, Vitals};
use super::load::{Load, LoadHandle, Ticks};
use super::picker::Candidate;
use crate::transport::http2::Connection;

/// One connection to an endpoint that is in the ready set, or was when a call took it.
#[derive(Debug)]
pub(crate) struct ReadyConnection {
    load: LoadHandle,
    /// Kept for the endpoint, which shows it as long as the connection exists.
    _vitals: Arc<Vitals>,
    http2: Connection,
    endpoint: Arc<Endpoint>,
    waiters: Arc<dyn Queue>,
    /// The channel's start, which the estimate counts time from.
    epoch: Instant,
    /// Whether calls that wait may be given a place: it is in the set that calls pick from.
    takes_calls: AtomicBool,
    used: Arc<Used>,
}

/// The calls that wait for a free place, as connections see them.
pub(super) trait Queue: Debug + Send + Sync {
    /// Gives up a call's place: to the first that waits and can use it, or for anyone to take.
    fn release(&self, connection: &Arc<ReadyConnection>);

    /// Hands over free places of a connection for as long as there are calls that can use them.
    fn offer(&self, connection: &Arc<ReadyConnection>);
}

/// What calls have made of a connection. It outlives the connection and does not keep it open.
#[derive(Debug, Default)]
pub(super) struct Used {
    sent: AtomicBool,
    answered: AtomicBool,
}

impl Used {
    /// Whether a call was sent on the connection.
    pub(super) fn is_sent(&self) -> bool {
        self.sent.load(Ordering::Relaxed)
    }

    /// Whether a call was answered, be it with an error.
    pub(super) fn is_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    pub(super) fn on_sent(&self) {
        set(&self.sent);
    }

    pub(super) fn on_answer(&self) {
        set(&self.answered);
    }
}

/// Read first: of many calls only one writes to what all of them read.
fn set(flag: &AtomicBool) {
    if !flag.load(Ordering::Relaxed) {
        flag.store(true, Ordering::Relaxed);
    }
}

impl ReadyConnection {
    pub(super) fn new(
        http2: Connection,
        endpoint: Arc<Endpoint>,
        load: LoadHandle,
        waiters: Arc<dyn Queue>,
        epoch: Instant,
    ) -> Self {
        let vitals = Arc::new(Vitals {
            load: load.clone(),
            round_trip: http2.round_trip(),
        });
        endpoint.add_connection(&vitals);
        Self {
            load,
            _vitals: vitals,
            http2,
            endpoint,
            waiters,
            epoch,
            takes_calls: AtomicBool::new(false),
            used: Arc::default(),
        }
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    pub(super) fn http2(&self) -> &Connection {
        &self.http2
    }

    /// A time as the estimate has it.
    pub(super) fn ticks(&self, now: Instant) -> Ticks {
        Ticks::at(now, self.epoch)
    }

    /// Gives a call's place up.
    pub(super) fn release(self: &Arc<Self>) {
        self.waiters.release(self);
    }

    /// Whether a call that waits may be given a place here.
    pub(super) fn takes_calls(&self) -> bool {
        self.takes_calls.load(Ordering::SeqCst)
            && self.load.in_flight() as usize <= self.load.limit()
    }

    /// The connection is now in the set that calls pick from, or is not any more.
    pub(super) fn set_takes_calls(self: &Arc<Self>, takes_calls: bool) {
        let took = self.takes_calls.swap(takes_calls, Ordering::SeqCst);
        if takes_calls && !took {
            self.waiters.offer(self);
        }
    }

    /// Hands free places to calls that wait.
    pub(super) fn offer(self: &Arc<Self>) {
        self.waiters.offer(self);
    }

    pub(super) fn used(&self) -> &Arc<Used> {
        &self.used
    }

    /// How many bytes the peer has sent.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.http2.bytes_read()
    }

    /// Takes over how many calls the peer allows.
    pub(super) fn follow_limit(&self) {
        self.load.set_limit(self.http2.max_streams());
    }

    /// Notes a failure that only the caller can tell, of a call or a stream. With a time since when the peer was to answer, a PING will tell
    /// whether it is there at all.
    pub(crate) fn on_reported_failure(&self, now: Instant, silent_since: Option<Instant>) {
        self.load.on_failure(Duration::ZERO, self.ticks(now));
        if let Some(then) = silent_since {
            self.http2.suspect(then);
        }
    }

    /// Whether every stream the peer allows is in use.
    pub(super) fn is_full(&self) -> bool {
        self.load.in_flight() as usize >= self.load.limit()
    }
}

/// A member in a set that calls pick from, with its load at hand: of those that are not chosen a pick reads nothing else.
#[derive(Clone, Debug)]
pub(crate) struct ReadyEntry {
    connection: Arc<ReadyConnection>,
    load: LoadHandle,
}

impl ReadyEntry {
    pub(super) fn new(connection: &Arc<ReadyConnection>) -> Self {
        Self {
            connection: Arc::clone(connection),
            load: connection.load.clone(),
        }
    }

    pub(super) fn connection(&self) -> &Arc<ReadyConnection> {
        &self.connection
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }
}

impl Candidate for ReadyEntry {
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
