//! A connection that calls can pick.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::endpoint::{ConnectionStats, Endpoint};
use super::endpoint_requests::EndpointRequests;
use super::estimate::Ticks;
use super::load::{Load, LoadHandle};
use super::picker::Candidate;
use crate::metrics::ConnectionRecord;
use crate::transport::http2::Connection;

/// One open connection to an endpoint. Usually the connection is in the ready set. It is outside the set if it waits for its first health
/// status, if its peer does not answer or is not healthy, if it was removed while calls still use it, or if it is private to one call.
#[derive(Debug)]
pub(crate) struct ReadyConnection {
    load: LoadHandle,
    /// Keeps the statistics alive while the connection exists. The endpoint has only a weak reference to them, and reports them.
    _stats: Arc<ConnectionStats>,
    http2: Connection,
    endpoint: Arc<Endpoint>,
    waiters: Arc<dyn Queue>,
    /// The start of the channel. The times in the load estimate are relative to it.
    epoch: Instant,
    /// Which waiting calls get a permit on the connection, as a [`TakesCalls`].
    takes_calls: AtomicU8,
    used: Arc<ConnectionUse>,
    /// The requests of the endpoint, if their number is limited.
    requests: Option<SharedRequests>,
    /// The measurement of the connection, if metrics are enabled.
    record: Option<ConnectionRecord>,
}

/// Which waiting calls get a permit on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TakesCalls {
    /// The connection was removed from all sets: it was replaced, is about to be closed, or does not answer.
    Evicted,
    /// The connection is in no set that calls pick from.
    No,
    /// The endpoint is excluded from ordinary picks only by a pushback. It may still be in the set of a selection, so calls that wait for
    /// selected endpoints get a permit.
    Selected,
    /// The connection is in the set that calls pick from.
    All,
}

/// The requests of an endpoint, which its connections share.
pub(super) type SharedRequests = Arc<EndpointRequests<ReadyConnection>>;

/// The functions of the wait queue that a connection calls.
pub(super) trait Queue: Debug + Send + Sync {
    /// Ends a request: releases its stream and its place below the limits.
    fn release(&self, connection: &Arc<ReadyConnection>);

    /// Releases the stream of a call: hands it to the first waiter that can use it, or else makes it free for any call. The request keeps its
    /// place below the limit of the channel.
    fn release_stream(&self, connection: &Arc<ReadyConnection>);

    /// Hands free streams of the connection to waiters, as long as there are waiters that can use them.
    fn offer(&self, connection: &Arc<ReadyConnection>);
}

/// Whether a call was sent on a connection, and whether a call was answered. The value outlives the connection and does not keep it open.
#[derive(Debug, Default)]
pub(super) struct ConnectionUse {
    sent: AtomicBool,
    answered: AtomicBool,
}

impl ConnectionUse {
    /// Returns whether a call was sent on the connection.
    pub(super) fn is_sent(&self) -> bool {
        self.sent.load(Ordering::Relaxed)
    }

    /// Returns whether a call on the connection got a response. An error is also a response.
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

/// Sets a flag. Stores it only if it changes: all calls read this cache line, and each store would slow down the reads of other threads.
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
        let stats = Arc::new(ConnectionStats {
            load: load.clone(),
            round_trip: http2.round_trip(),
        });
        endpoint.add_connection(&stats);
        Self {
            load,
            _stats: stats,
            http2,
            endpoint,
            waiters,
            epoch,
            takes_calls: AtomicU8::new(TakesCalls::No as u8),
            used: Arc::default(),
            requests: None,
            record: None,
        }
    }

    /// Sets the measurement of the connection.
    pub(super) fn with_record(mut self, record: Option<ConnectionRecord>) -> Self {
        self.record = record;
        self
    }

    /// Sets the requests of the endpoint, if their number is limited.
    pub(super) fn with_requests(mut self, requests: Option<SharedRequests>) -> Self {
        self.requests = requests;
        self
    }

    /// Returns the requests of the endpoint, if their number is limited.
    pub(super) fn requests(&self) -> Option<&SharedRequests> {
        self.requests.as_ref()
    }

    /// Reserves a stream, and a place below the limit of the endpoint. Returns false if either is not free.
    pub(super) fn reserve(&self) -> bool {
        if !self.load.acquire() {
            return false;
        }
        let is_limited = self
            .requests
            .as_ref()
            .is_some_and(|requests| !requests.acquire());
        if is_limited {
            self.load.release();
        }
        !is_limited
    }

    /// Makes a reserved stream free, and its place below the limit of the endpoint.
    pub(super) fn unreserve(&self) {
        self.load.release();
        if let Some(requests) = &self.requests {
            requests.release();
        }
    }

    /// Returns whether the endpoint has as many requests as its limit allows.
    pub(super) fn is_limited(&self) -> bool {
        let requests = self.requests.as_ref();
        requests.is_some_and(|requests| requests.is_full())
    }

    /// Returns the measurement of the connection, if metrics are enabled.
    pub(super) fn record(&self) -> Option<&ConnectionRecord> {
        self.record.as_ref()
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

    /// Converts a time to the unit of the load estimate.
    pub(super) fn ticks(&self, now: Instant) -> Ticks {
        Ticks::at(now, self.epoch)
    }

    /// Ends a request on this connection.
    pub(super) fn release(self: &Arc<Self>) {
        self.waiters.release(self);
    }

    /// Releases the stream of a call, which keeps its place below the limit of the channel.
    pub(super) fn release_stream(self: &Arc<Self>) {
        self.waiters.release_stream(self);
    }

    /// Returns whether a waiting call can get a permit on this connection. The connection must be in a set that calls pick from, and its
    /// limit on streams must not be exceeded.
    pub(super) fn takes_calls(&self) -> bool {
        self.takes_calls.load(Ordering::SeqCst) > TakesCalls::No as u8
            && self.load.in_flight() as usize <= self.load.limit()
    }

    /// Returns whether calls that wait for any endpoint can get a permit on this connection.
    pub(super) fn takes_all_calls(&self) -> bool {
        self.takes_calls.load(Ordering::SeqCst) == TakesCalls::All as u8
    }

    /// Returns whether the connection was removed from all sets. What happens on it is then no evidence about a later server at the address.
    pub(super) fn is_evicted(&self) -> bool {
        self.takes_calls.load(Ordering::SeqCst) == TakesCalls::Evicted as u8
    }

    /// Sets which waiting calls get a permit on the connection. If more calls than before do, it offers its free streams to waiters.
    pub(super) fn set_takes_calls(self: &Arc<Self>, takes_calls: TakesCalls) {
        let took = self.takes_calls.swap(takes_calls as u8, Ordering::SeqCst);
        if takes_calls > TakesCalls::No && takes_calls as u8 > took {
            self.waiters.offer(self);
        }
    }

    /// Hands free streams to waiters.
    pub(super) fn offer(self: &Arc<Self>) {
        self.waiters.offer(self);
    }

    pub(super) fn used(&self) -> &Arc<ConnectionUse> {
        &self.used
    }

    /// Returns how many bytes the peer has sent.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.http2.bytes_read()
    }

    /// Adopts the peer's current limit on concurrent streams.
    pub(super) fn update_stream_limit(&self) {
        self.load.set_limit(self.http2.max_streams());
    }

    /// Records that a call, or a stream that the call opened, has failed in a way that only the caller can detect. `silent_since` is set if
    /// a response is overdue. If nothing was read from the connection since that time, a PING checks the connection.
    pub(crate) fn on_reported_failure(&self, now: Instant, silent_since: Option<Instant>) {
        self.load.on_failure(Duration::ZERO, self.ticks(now));
        if let Some(then) = silent_since {
            self.http2.request_ping_for_overrun(then);
        }
    }

    /// Returns whether every stream that the peer allows is in use.
    pub(super) fn is_full(&self) -> bool {
        self.load.in_flight() as usize >= self.load.limit()
    }
}

/// An entry of the ready set. It has its own handle to the load, so that a pick that compares connections reads only their loads.
#[derive(Clone, Debug)]
pub(crate) struct ReadyEntry {
    connection: Arc<ReadyConnection>,
    load: LoadHandle,
}

impl ReadyEntry {
    pub(super) fn new(connection: &Arc<ReadyConnection>) -> Self {
        let has_limit = connection.requests.is_some();
        Self {
            connection: Arc::clone(connection),
            load: connection.load.clone().with_request_limit(has_limit),
        }
    }

    pub(super) fn connection(&self) -> &Arc<ReadyConnection> {
        &self.connection
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }

    // Not inlined, so that a pick without a limit stays short.
    #[inline(never)]
    fn reserve_below_limit(&self) -> bool {
        if self.connection.is_limited() {
            return false;
        }
        let is_reserved = self.connection.reserve();
        if !is_reserved {
            // A call that has joined the queue in the meantime may have found no free stream, because this pick had reserved it for a
            // moment.
            self.connection.offer();
        }
        is_reserved
    }
}

impl Candidate for ReadyEntry {
    fn latency(&self) -> f32 {
        self.load.latency()
    }

    fn in_flight(&self) -> u32 {
        self.load.in_flight()
    }

    fn server_in_flight(&self) -> u32 {
        self.load.server_in_flight()
    }

    fn acquire(&self) -> bool {
        if self.load.has_request_limit() {
            return self.reserve_below_limit();
        }
        self.load.acquire()
    }

    fn is_limited(&self) -> bool {
        self.load.has_request_limit() && self.connection.is_limited()
    }
}

#[cfg(test)]
mod tests {
    use super::super::ready_set::Slot;
    use super::*;

    /// A pick among thousands of connections reads random slots. Each byte of a slot costs cache.
    #[test]
    #[cfg(target_pointer_width = "64")]
    fn a_slot_of_the_ready_set_has_32_bytes() {
        assert_eq!(size_of::<ReadyEntry>(), 24);
        assert_eq!(size_of::<Slot<ReadyEntry>>(), 32);
    }
}
