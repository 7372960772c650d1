//! An endpoint: counters and state of one address, shared by calls and the driver.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use http::StatusCode;
use http::uri::Authority;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::dial_permit::DialPermit;
use super::load::{Estimate, LoadHandle};
use super::outlier::Counts;
use crate::address::Address;

/// One address with all its connections.
#[derive(Debug)]
pub(crate) struct Endpoint {
    address: Address,
    authority: Authority,
    calls: AtomicU64,
    failures: AtomicU64,
    /// The part of `failures` with [`Blame::Connection`].
    faults: AtomicU64,
    overruns: AtomicU64,
    /// Calls that are no evidence about the endpoint: the server refused them unprocessed, or the caller dropped them.
    unjudged: AtomicU64,
    /// The longest silence after which a connection still answered, and the time of that check.
    trusted: Mutex<Option<(Duration, Instant)>>,
    /// The largest metadata, in bytes, that the endpoint has accepted on a connection for a single call.
    largest_metadata: AtomicUsize,
    /// Permits to dial a connection for a single call.
    trials: Arc<Semaphore>,
    /// Kind of the last recorded error. A repeated error is not formatted again.
    noted: AtomicU32,
    /// Consecutive responses that were not gRPC.
    foreign: AtomicU32,
    described: Mutex<Details>,
}

/// The cause of a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    /// The connection, or the server as a whole.
    Connection,
    /// The server, while it processed this call.
    Server,
}

/// The part of a connection that [`Endpoint::status`] reports.
#[derive(Debug)]
pub(super) struct Vitals {
    pub(super) load: LoadHandle,
    pub(super) round_trip: Duration,
}

/// State that an ordinary call does not touch. It is behind a lock.
#[derive(Debug)]
struct Details {
    state: EndpointState,
    weight: u32,
    last_resort: bool,
    ejected: bool,
    last_error: Option<Arc<str>>,
    connections: Vec<Weak<Vitals>>,
    /// The latency estimate of the last connection that was closed.
    estimate: Option<Estimate>,
}

impl Endpoint {
    pub(super) fn new(address: Address) -> Self {
        // Host and port of an address always form a valid authority.
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
            trusted: Mutex::new(None),
            largest_metadata: AtomicUsize::new(0),
            trials: Arc::new(Semaphore::new(TRIALS)),
            noted: AtomicU32::new(0),
            foreign: AtomicU32::new(0),
            described: Mutex::new(Details {
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

    /// Returns all counters up to now. The caller subtracts an earlier tally.
    pub(super) fn tally(&self) -> Tally {
        let described = self.lock();
        let connections = described.connections.iter().filter_map(Weak::upgrade);
        let in_flight = connections.map(|connection| u64::from(connection.load.in_flight()));
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
        self.noted.store(0, Ordering::Relaxed);
        self.lock().last_error = Some(error);
    }

    /// Records a response from a gRPC server.
    pub(super) fn on_answer(&self) {
        // Loads before it stores: all calls read this cache line, and hardly any call must write to it.
        if self.foreign.load(Ordering::Relaxed) > 0 {
            self.foreign.store(0, Ordering::Relaxed);
        }
    }

    /// Records a response that was not gRPC. Returns the number of such responses in a row.
    pub(super) fn on_foreign(&self) -> u32 {
        self.foreign.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Returns whether the last response was gRPC. Also true before the first response.
    pub(super) fn is_grpc(&self) -> bool {
        self.foreign.load(Ordering::Relaxed) == 0
    }

    /// Records a fault that a call found in the endpoint's response.
    pub(super) fn note(&self, noted: AnswerFault, describe: impl FnOnce() -> String) {
        let noted = match noted {
            AnswerFault::Unfinished => 1,
            AnswerFault::Foreign(http) => u32::from(http.as_u16()),
        };
        if self.noted.swap(noted, Ordering::Relaxed) != noted {
            self.lock().last_error = Some(describe().into());
        }
    }

    /// Returns the longest silence of a connection after which a call is sent on it without a check.
    pub(super) fn trusted_silence(&self, now: Instant) -> Duration {
        let trusted = *self.trusted();
        let recent =
            |(_, found): &(Duration, Instant)| now.saturating_duration_since(*found) < TRUST;
        trusted
            .filter(recent)
            .map_or(SILENCE, |(silence, _)| silence.max(SILENCE))
    }

    /// Records the result of a check after a silence. A silence that a connection survived is not checked again for a while: the timeouts
    /// of middleboxes do not change from minute to minute.
    pub(super) fn on_checked(&self, silence: Duration, is_alive: bool, now: Instant) {
        let longest = self.trusted_silence(now).max(silence);
        *self.trusted() = is_alive.then_some((longest, now));
    }

    fn trusted(&self) -> MutexGuard<'_, Option<(Duration, Instant)>> {
        self.trusted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the longest trusted silence. A connection was found dead, so a silence that earlier connections survived proves nothing any
    /// more.
    pub(super) fn forget_silence(&self) {
        *self.trusted() = None;
    }

    /// Discards all observations of the old server. Called for a fresh registration, which may be a different server.
    pub(super) fn forget(&self) {
        self.forget_silence();
        self.largest_metadata.store(0, Ordering::Relaxed);
        self.foreign.store(0, Ordering::Relaxed);
    }

    pub(crate) fn largest_metadata(&self) -> usize {
        self.largest_metadata.load(Ordering::Relaxed)
    }

    pub(super) fn on_metadata(&self, size: usize) {
        self.largest_metadata.fetch_max(size, Ordering::Relaxed);
    }

    /// Waits for a permit to dial a connection for a single call.
    pub(crate) async fn trial(&self) -> DialPermit {
        let trials = Arc::clone(&self.trials);
        DialPermit::new(trials.acquire_owned().await.ok())
    }

    pub(super) fn add_connection(&self, vitals: &Arc<Vitals>) {
        let mut described = self.lock();
        described
            .connections
            .retain(|known| known.strong_count() > 0);
        described.connections.push(Arc::downgrade(vitals));
    }

    /// Keeps the estimate of a closed connection for the next one.
    pub(super) fn keep_estimate(&self, estimate: Option<Estimate>) {
        let mut described = self.lock();
        described.estimate = estimate.or(described.estimate);
    }

    pub(super) fn estimate(&self) -> Option<Estimate> {
        self.lock().estimate
    }

    /// Returns the number of calls sent to the endpoint.
    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Counts a call that was sent to the endpoint.
    pub(super) fn on_call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn on_failure(&self, blame: Blame) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        if blame == Blame::Connection {
            self.faults.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a call that overran its deadline.
    pub(super) fn on_overrun(&self) {
        self.overruns.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a call that was sent but is no evidence about the endpoint.
    pub(super) fn on_unjudged(&self) {
        self.unjudged.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the current status of the endpoint.
    pub(super) fn status(&self) -> EndpointStatus {
        let described = self.lock();
        let connections = described.connections.iter().filter_map(Weak::upgrade);
        let connections: Vec<_> = connections.collect();
        let latency = connections
            .iter()
            .find_map(|connection| connection.load.estimate())
            .or(described.estimate);
        EndpointStatus {
            address: self.address.clone(),
            state: described.state,
            weight: described.weight,
            last_resort: described.last_resort,
            connections: connections.len(),
            in_flight: connections
                .iter()
                .map(|connection| connection.load.in_flight() as usize)
                .sum(),
            latency: latency.map(|estimate| estimate.latency()),
            round_trip: connections.last().map(|connection| connection.round_trip),
            calls: self.calls.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            ejected: described.ejected,
            last_error: described.last_error.as_deref().map(str::to_owned),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Details> {
        // No code panics while it holds this lock, and the data would be consistent even then.
        self.described
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A fault in an endpoint's response.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AnswerFault {
    /// A response ended without a gRPC status.
    Unfinished,
    /// A response was not gRPC.
    Foreign(StatusCode),
}

/// Counters of an endpoint since it was added.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    judged: u64,
    faults: u64,
    overruns: u64,
}

impl Tally {
    /// Returns the difference to an earlier tally.
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

/// The status of one endpoint of a channel at one moment.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct EndpointStatus {
    /// The address of the endpoint.
    pub address: Address,
    /// Whether the endpoint can take calls.
    pub state: EndpointState,
    /// The endpoint's share of the calls relative to other endpoints.
    pub weight: u32,
    /// Whether the endpoint is a last resort: the registry has lost it together with most other endpoints. It gets calls only while no
    /// other endpoint is ready.
    pub last_resort: bool,
    /// Number of open connections.
    pub connections: usize,
    /// Calls whose response has not ended.
    pub in_flight: usize,
    /// The mean time until the head of a response over the last seconds; `None` before the first call.
    pub latency: Option<Duration>,
    /// The round-trip time of the first PING on the newest connection.
    pub round_trip: Option<Duration>,
    /// Calls sent to the endpoint.
    pub calls: u64,
    /// Calls that failed because of the endpoint: a lost connection, a response that is not gRPC, or a status that indicates a fault of the
    /// server.
    pub failures: u64,
    /// Whether the endpoint is excluded from ordinary picks. It gets no calls if its connection does not answer. It gets calls only while
    /// no other endpoint is ready if it has failed too many calls ([`OutlierDetection`](crate::OutlierDetection)) or does not answer with
    /// gRPC.
    pub ejected: bool,
    /// Why the last attempt to connect failed, why the last connection was lost, or why the last response did not count as gRPC.
    pub last_error: Option<String>,
}

/// The connectivity of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndpointState {
    /// No connection exists and none is being dialled. The endpoint waits for its turn to be dialled, or it is a last resort and is not
    /// dialled, or its server closed a connection that no call used, and it is dialled again when a call needs it.
    Idle,
    /// A connection is being dialled.
    Connecting,
    /// A connection has answered and takes calls.
    Ready,
    /// The last attempt failed and the next one follows after a backoff, or the connection does not answer any more, or the endpoint
    /// reports that it is not serving ([`health_check`](crate::ChannelBuilder::health_check)).
    TransientFailure,
    /// The endpoint was removed, and its last calls are still running.
    Draining,
}

/// A connection is not checked after a silence of up to this length.
pub(super) const SILENCE: Duration = Duration::from_secs(1);
/// How long a survived silence remains trusted.
const TRUST: Duration = Duration::from_secs(600);
/// Permits per endpoint for dialling a connection for a single call: enough for the few calls that may break a connection, and no load on a
/// server.
const TRIALS: usize = 8;
