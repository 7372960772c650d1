//! An endpoint: what callers and the driver count and know of an address.

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
    /// Calls that show nothing of the endpoint: refused unseen, or dropped by the caller.
    unjudged: AtomicU64,
    /// The longest silence after which a connection still worked, and when that was found.
    trusted: Mutex<Option<(Duration, Instant)>>,
    /// The largest metadata, in bytes, that was accepted on a connection of its own.
    largest_metadata: AtomicUsize,
    /// Connections for one call each that may be open at once.
    trials: Arc<Semaphore>,
    /// Kind of the last noted error; a repeated error is not formatted again.
    noted: AtomicU32,
    /// Answers in a row that were not gRPC's.
    foreign: AtomicU32,
    described: Mutex<Details>,
}

/// Who is to blame for a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    /// The connection, or the server as a whole.
    Connection,
    /// The server, in what it did for this call.
    Server,
}

/// What an endpoint shows of one of its connections.
#[derive(Debug)]
pub(super) struct Vitals {
    pub(super) load: LoadHandle,
    pub(super) round_trip: Duration,
}

/// What only the driver and [`Endpoint::status`] touch.
#[derive(Debug)]
struct Details {
    state: EndpointState,
    weight: u32,
    last_resort: bool,
    ejected: bool,
    last_error: Option<Arc<str>>,
    connections: Vec<Weak<Vitals>>,
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

    /// All that was counted so far, for whoever takes the difference.
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

    /// A gRPC server has answered.
    pub(super) fn on_answer(&self) {
        // Read first: of many calls hardly one writes to what all of them read.
        if self.foreign.load(Ordering::Relaxed) > 0 {
            self.foreign.store(0, Ordering::Relaxed);
        }
    }

    /// An answer was not gRPC's. Returns how many there were in a row.
    pub(super) fn on_foreign(&self) -> u32 {
        self.foreign.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether the last answer was gRPC's, or there was none.
    pub(super) fn is_grpc(&self) -> bool {
        self.foreign.load(Ordering::Relaxed) == 0
    }

    /// Notes what a call has found wrong with the endpoint's answer.
    pub(super) fn note(&self, noted: AnswerFault, describe: impl FnOnce() -> String) {
        let noted = match noted {
            AnswerFault::Unfinished => 1,
            AnswerFault::Foreign(http) => u32::from(http.as_u16()),
        };
        if self.noted.swap(noted, Ordering::Relaxed) != noted {
            self.lock().last_error = Some(describe().into());
        }
    }

    /// The longest silence of a connection after which a call is sent on it without a check.
    pub(super) fn trusted_silence(&self, now: Instant) -> Duration {
        let trusted = *self.trusted();
        let recent =
            |(_, found): &(Duration, Instant)| now.saturating_duration_since(*found) < TRUST;
        trusted
            .filter(recent)
            .map_or(SILENCE, |(silence, _)| silence.max(SILENCE))
    }

    /// A connection has answered a check after a silence, or has not. What a path has survived is not checked again for a while: the timeouts
    /// of middleboxes do not change from minute to minute.
    pub(super) fn on_checked(&self, silence: Duration, is_alive: bool, now: Instant) {
        let longest = self.trusted_silence(now).max(silence);
        *self.trusted() = is_alive.then_some((longest, now));
    }

    fn trusted(&self) -> MutexGuard<'_, Option<(Duration, Instant)>> {
        self.trusted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection has been found dead: what earlier ones have survived means nothing any more.
    pub(super) fn forget_silence(&self) {
        *self.trusted() = None;
    }

    /// A fresh registration: what was learned of the old server does not count for the new one.
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

    /// Acquires the leave to dial a connection for a single call.
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

    /// Remembers what a connection that goes knew, for the next one.
    pub(super) fn keep_estimate(&self, estimate: Option<Estimate>) {
        let mut described = self.lock();
        described.estimate = estimate.or(described.estimate);
    }

    pub(super) fn estimate(&self) -> Option<Estimate> {
        self.lock().estimate
    }

    /// How many calls were sent to it.
    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// A call was sent to it.
    pub(super) fn on_call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn on_failure(&self, blame: Blame) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        if blame == Blame::Connection {
            self.faults.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A call has overrun its deadline.
    pub(super) fn on_overrun(&self) {
        self.overruns.fetch_add(1, Ordering::Relaxed);
    }

    /// A call that was sent says nothing of it.
    pub(super) fn on_unjudged(&self) {
        self.unjudged.fetch_add(1, Ordering::Relaxed);
    }

    /// How the endpoint is now.
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
        // Nothing panics while it is held; and the data would be whole even then.
        self.described
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is wrong with an endpoint's answers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AnswerFault {
    /// A response ended without a gRPC status.
    Unfinished,
    /// A response was not gRPC's.
    Foreign(StatusCode),
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
    /// Whether it gets no calls because it does not answer any more, or only while nothing else is ready because it has failed too many
    /// ([`OutlierDetection`](crate::OutlierDetection)).
    pub ejected: bool,
    /// Why the last connection attempt failed, the last connection was lost, or the last answer was no gRPC response.
    pub last_error: Option<String>,
}

/// The connectivity of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndpointState {
    /// No connection, and none being made: it waits for its turn, is a last resort that is not dialled, or has closed a connection that no
    /// call used, and is dialled when one wants it.
    Idle,
    /// A connection is being made.
    Connecting,
    /// A connection has answered and takes calls.
    Ready,
    /// The last attempt failed, and the next follows after a backoff; or its connection does not answer any more; or it reports itself that
    /// it does not serve ([`health_check`](crate::ChannelBuilder::health_check)).
    TransientFailure,
    /// Removed; its last calls are being finished.
    Draining,
}

/// A connection that was silent for no longer is not checked.
pub(super) const SILENCE: Duration = Duration::from_secs(1);
/// How long it counts that a path has survived a silence.
const TRUST: Duration = Duration::from_secs(600);
/// Connections for one call each, at once and per endpoint: what a few misbehaving calls need, and no load on a server.
const TRIALS: usize = 8;
