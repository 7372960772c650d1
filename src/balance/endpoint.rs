//! What callers and the driver share of an endpoint and of its connections.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use http::uri::Authority;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::load::{Estimate, Load, LoadHandle, Ticks};
use super::outlier::Counts;
use super::picker::Candidate;
use crate::address::Address;
use crate::transport::http2::Connection;

/// An address, over all its connections.
#[derive(Debug)]
pub(crate) struct Endpoint {
    address: Address,
    authority: Authority,
    calls: AtomicU64,
    failures: AtomicU64,
    /// Of the failures, those of the connection.
    faults: AtomicU64,
    overruns: AtomicU64,
    /// Calls that say nothing of the endpoint: refused unseen, or dropped by the caller.
    unjudged: AtomicU64,
    described: Mutex<Described>,
}

/// What only the driver and [`Endpoint::status`] touch.
#[derive(Debug)]
struct Described {
    state: EndpointState,
    weight: u32,
    last_resort: bool,
    ejected: bool,
    last_error: Option<Arc<str>>,
    connections: Vec<Weak<Member>>,
    /// What the last connection knew of the latency.
    estimate: Option<Estimate>,
}

impl Endpoint {
    pub(super) fn new(address: Address) -> Self {
        // Host and port of an address are a subset of what an authority may be.
        let authority = Authority::try_from(address.as_str())
            .unwrap_or_else(|_| Authority::from_static("localhost"));
        Self {
            address,
            authority,
            calls: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            overruns: AtomicU64::new(0),
            unjudged: AtomicU64::new(0),
            described: Mutex::new(Described {
                state: EndpointState::Idle,
                weight: 1,
                last_resort: false,
                ejected: false,
                last_error: None,
                connections: Vec::new(),
                estimate: None,
            }),
        }
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    pub(super) fn set_state(&self, state: EndpointState) {
        self.lock().state = state;
    }

    pub(super) fn set_attributes(&self, weight: u32, last_resort: bool) {
        let mut described = self.lock();
        described.weight = weight;
        described.last_resort = last_resort;
    }

    pub(super) fn set_ejected(&self, ejected: bool) {
        self.lock().ejected = ejected;
    }

    /// All that was counted so far, for whoever takes the difference.
    pub(super) fn tally(&self) -> Tally {
        let described = self.lock();
        let members = described.connections.iter().filter_map(Weak::upgrade);
        let in_flight = members.map(|member| u64::from(member.load.in_flight()));
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Tally {
            judged: count(&self.calls)
                .saturating_sub(in_flight.sum())
                .saturating_sub(count(&self.unjudged)),
            faults: count(&self.faults),
            overruns: count(&self.overruns),
        }
    }

    pub(super) fn set_last_error(&self, error: Arc<str>) {
        self.lock().last_error = Some(error);
    }

    pub(super) fn add_connection(&self, member: &Arc<Member>) {
        let mut described = self.lock();
        described
            .connections
            .retain(|known| known.strong_count() > 0);
        described.connections.push(Arc::downgrade(member));
    }

    /// Remembers what a connection that goes knew, for the next one.
    pub(super) fn keep_estimate(&self, estimate: Option<Estimate>) {
        let mut described = self.lock();
        described.estimate = estimate.or(described.estimate);
    }

    pub(super) fn estimate(&self) -> Option<Estimate> {
        self.lock().estimate
    }

    /// How the endpoint is now.
    pub(super) fn status(&self) -> EndpointStatus {
        let described = self.lock();
        let members = described.connections.iter().filter_map(Weak::upgrade);
        let members: Vec<_> = members.collect();
        let latency = members
            .iter()
            .find_map(|member| member.load.estimate())
            .or(described.estimate);
        EndpointStatus {
            address: self.address.clone(),
            state: described.state,
            weight: described.weight,
            last_resort: described.last_resort,
            connections: members.len(),
            in_flight: members
                .iter()
                .map(|member| member.load.in_flight() as usize)
                .sum(),
            latency: latency.map(|estimate| estimate.latency()),
            round_trip: members.last().map(|member| member.connection.round_trip()),
            calls: self.calls.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            ejected: described.ejected,
            last_error: described.last_error.as_deref().map(str::to_owned),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Described> {
        // Nothing panics while it is held; and the data would be whole even then.
        self.described
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an endpoint has done since it is known.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    judged: u64,
    faults: u64,
    overruns: u64,
}

impl Tally {
    /// What was done since an earlier time.
    pub(super) fn since(self, earlier: Self) -> Counts {
        let faults = self.faults.saturating_sub(earlier.faults);
        let overruns = self.overruns.saturating_sub(earlier.overruns);
        let judged = self.judged.saturating_sub(earlier.judged);
        Counts {
            successes: judged.saturating_sub(faults + overruns),
            failures: faults,
            overruns,
        }
    }
}

/// Who is to blame for a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    /// The connection, or the server as a whole.
    Connection,
    /// The server, in what it did for this call.
    Server,
}

/// An endpoint of a channel, as it was at one moment.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct EndpointStatus {
    /// Where it is.
    pub address: Address,
    /// Whether it can take calls.
    pub state: EndpointState,
    /// Its share of the calls relative to the others'.
    pub weight: u32,
    /// Whether the registry has lost it together with most others: it gets calls only while nothing else is ready.
    pub last_resort: bool,
    /// How many connections to it are open.
    pub connections: usize,
    /// Calls whose response has not ended.
    pub in_flight: usize,
    /// The mean time to a response's head over the last seconds; none before the first call.
    pub latency: Option<Duration>,
    /// The round trip of the last connection's first PING.
    pub round_trip: Option<Duration>,
    /// Calls sent to it.
    pub calls: u64,
    /// Calls that it failed: connection lost, or a status that says the server is at fault.
    pub failures: u64,
    /// Whether it is ready but gets calls only while nothing else is, because it does not answer any more or has failed too many
    /// ([`OutlierDetection`](crate::OutlierDetection)).
    pub ejected: bool,
    /// Why the last connection attempt failed, or the last connection was lost.
    pub last_error: Option<String>,
}

/// The connectivity of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndpointState {
    /// No connection, and none being made: it waits for its turn, or is a last resort that is not dialled.
    Idle,
    /// A connection is being made.
    Connecting,
    /// A connection has answered and takes calls.
    Ready,
    /// The last attempt failed, and the next follows after a backoff; or it says itself that it does not serve
    /// ([`health_check`](crate::ChannelBuilder::health_check)).
    TransientFailure,
    /// Removed; its last calls are being finished.
    Draining,
}

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

    /// Takes over how many calls the peer allows.
    pub(super) fn follow_limit(&self) {
        self.load.set_limit(self.connection.max_streams());
    }

    /// Notes a failure that only the caller can tell, of a call or a stream. With a time since when the peer was to answer, a PING will tell
    /// whether it is there at all.
    pub(crate) fn on_complaint(&self, now: Instant, silent_since: Option<Instant>) {
        self.load
            .on_failure(Duration::ZERO, Ticks::at(now, self.epoch));
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

/// A place taken on a connection for one call. It is given up on drop, however the call ended.
#[derive(Debug)]
pub(crate) struct Ticket {
    member: Arc<Member>,
    /// When the call was sent, until its outcome is noted.
    sent: Option<Instant>,
}

impl Ticket {
    /// Wraps a place that was acquired on the member.
    pub(super) fn taken(member: &Arc<Member>) -> Self {
        Self {
            member: Arc::clone(member),
            sent: None,
        }
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.member.connection
    }

    pub(crate) fn member(&self) -> &Arc<Member> {
        &self.member
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.member.endpoint
    }

    /// The call is on its way.
    pub(crate) fn on_sent(&mut self, now: Instant) {
        self.sent = Some(now);
        self.member.endpoint.calls.fetch_add(1, Ordering::Relaxed);
    }

    /// The response's head is here, and with it perhaps a failure already.
    pub(crate) fn on_head(&mut self, now: Instant, failure: Option<Blame>) {
        let Some(sent) = self.sent.take() else {
            return;
        };
        let elapsed = now.saturating_duration_since(sent);
        match failure {
            Some(blame) => self.fail(elapsed, now, blame),
            None => self.member.load.on_head(elapsed, self.ticks(now)),
        }
    }

    /// The server, or the connection to it, has failed the call, before the head or after it.
    pub(crate) fn on_failure(&mut self, now: Instant, blame: Blame) {
        let sent = self.sent.take().unwrap_or(now);
        self.fail(now.saturating_duration_since(sent), now, blame);
    }

    /// The call has overrun its deadline. Whether the server is slow or not there any more, a PING will tell.
    pub(crate) fn on_overdue(&mut self, now: Instant) {
        self.member
            .endpoint
            .overruns
            .fetch_add(1, Ordering::Relaxed);
        // A response that has stopped coming is suspect from when the last of it came, which the connection knows.
        let silent_since = now.checked_sub(SUSPECT).unwrap_or(now);
        let sent = self.sent.take();
        self.member.connection.suspect(sent.unwrap_or(silent_since));
        if let Some(sent) = sent {
            let elapsed = now.saturating_duration_since(sent);
            self.member.load.on_abandoned(elapsed, self.ticks(now));
        }
    }

    /// The server has refused to look at the call: that says nothing of how fast it answers.
    pub(crate) fn on_refused(&mut self) {
        self.sent = None;
        self.unjudge();
    }

    fn fail(&self, elapsed: Duration, now: Instant, blame: Blame) {
        let endpoint = &self.member.endpoint;
        endpoint.failures.fetch_add(1, Ordering::Relaxed);
        if blame == Blame::Connection {
            endpoint.faults.fetch_add(1, Ordering::Relaxed);
        }
        self.member.load.on_failure(elapsed, self.ticks(now));
    }

    fn unjudge(&self) {
        let unjudged = &self.member.endpoint.unjudged;
        unjudged.fetch_add(1, Ordering::Relaxed);
    }

    fn ticks(&self, now: Instant) -> Ticks {
        Ticks::at(now, self.member.epoch)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(sent) = self.sent {
            let now = Instant::now();
            let elapsed = now.saturating_duration_since(sent);
            self.member.load.on_abandoned(elapsed, self.ticks(now));
            self.unjudge();
            // Callers that keep the time themselves drop the call.
            if elapsed >= SUSPECT {
                self.member.connection.suspect(sent);
            }
        }
        self.member.load.release();
        self.member.waiters.on_release();
    }
}

/// A call that was dropped earlier than this was not dropped because it took too long. Half of the shortest deadlines that are in use.
const SUSPECT: Duration = Duration::from_millis(100);

/// Calls that wait for a free place.
#[derive(Debug)]
pub(crate) struct Waiters {
    waiting: AtomicUsize,
    limit: usize,
    freed: Notify,
}

impl Waiters {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            waiting: AtomicUsize::new(0),
            limit,
            freed: Notify::new(),
        }
    }

    /// Joins the waiting, unless there are too many.
    pub(crate) fn join(self: &Arc<Self>) -> Option<Waiting> {
        // SeqCst: see `Load::acquire`. A place given up after this is announced to us.
        if self.waiting.fetch_add(1, Ordering::SeqCst) >= self.limit {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            return None;
        }
        Some(Waiting(Arc::clone(self)))
    }

    pub(crate) fn freed(&self) -> &Notify {
        &self.freed
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    fn on_release(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.freed.notify_one();
        }
    }
}

/// One of the waiting, until dropped.
#[derive(Debug)]
pub(crate) struct Waiting(Arc<Waiters>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
