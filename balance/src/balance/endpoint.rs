//! An endpoint: the counters and the state of one address, which calls and the driver share.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use http::StatusCode;
use http::uri::Authority;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::dial_permit::DialPermit;
use super::endpoint_status::{EjectionReason, EndpointState, EndpointStatus};
use super::estimate::Estimate;
use super::hash_key::hash;
use super::hash_ring::Name;
use super::load::LoadHandle;
use super::load_weights::has_weight;
use super::outlier::Counts;
use crate::address::Address;
use crate::attributes::Attributes;
use crate::load_report::LoadReport;

/// One address with all its connections.
#[derive(Debug)]
pub(crate) struct Endpoint {
    address: Address,
    authority: Authority,
    calls: AtomicU64,
    failures: AtomicU64,
    /// The failures with [`Blame::Connection`]. They are also counted in `failures`.
    faults: AtomicU64,
    overruns: AtomicU64,
    /// Calls that are no evidence about the endpoint, because the server refused to process them, or the caller dropped them.
    inconclusive: AtomicU64,
    /// The longest silence (time without a read) after which a connection still answered, and the time of the last successful check.
    survived_silence: Mutex<Option<(Duration, Instant)>>,
    /// The size in bytes of the largest metadata that the endpoint has accepted on a private connection, which is dialled for one call.
    largest_metadata: AtomicUsize,
    /// Permits to dial private connections.
    dial_permits: Arc<Semaphore>,
    /// A code for the kind of the last fault in a response; 0 if there is none. If the same fault is repeated, its text is not formatted
    /// again.
    last_fault: AtomicU32,
    /// The number of consecutive responses that were not gRPC.
    not_grpc: AtomicU32,
    /// The attributes, for calls that select endpoints by them, and for the metrics.
    attributes: ArcSwap<Attributes>,
    /// The last load report of the server.
    load_report: ArcSwapOption<LoadReport>,
    /// The last load report from which a weight can be computed.
    weight_report: ArcSwapOption<LoadReport>,
    details: Mutex<Details>,
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
pub(super) struct ConnectionStats {
    pub(super) load: LoadHandle,
    pub(super) round_trip: Duration,
}

/// The part of the state that is behind a lock. An ordinary call does not access it.
#[derive(Debug)]
struct Details {
    state: EndpointState,
    /// The time of the last change of `state`.
    since: Instant,
    weight: u32,
    last_resort: bool,
    ejection: Option<EjectionReason>,
    /// The end of the last pushback of the server.
    pushback: Option<Instant>,
    /// The end of the backoff, while no connection exists and none is dialled.
    next_attempt: Option<Instant>,
    failed_attempts: usize,
    last_error: Option<Arc<str>>,
    connections: Vec<Weak<ConnectionStats>>,
    /// The latency estimate of the last connection that was closed.
    estimate: Option<Estimate>,
}

impl Endpoint {
    pub(super) fn new(address: Address) -> Self {
        // The host and the port of a TCP address always form a valid authority. The authority of a Unix socket is `localhost`.
        let authority = Authority::try_from(address.as_str())
            .unwrap_or_else(|_| Authority::from_static("localhost"));
        Self {
            address,
            authority,
            calls: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            overruns: AtomicU64::new(0),
            inconclusive: AtomicU64::new(0),
            survived_silence: Mutex::new(None),
            largest_metadata: AtomicUsize::new(0),
            dial_permits: Arc::new(Semaphore::new(DIAL_PERMITS)),
            last_fault: AtomicU32::new(0),
            not_grpc: AtomicU32::new(0),
            attributes: ArcSwap::from_pointee(Attributes::new()),
            load_report: ArcSwapOption::empty(),
            weight_report: ArcSwapOption::empty(),
            details: Mutex::new(Details {
                state: EndpointState::Idle,
                since: Instant::now(),
                weight: 1,
                last_resort: false,
                ejection: None,
                pushback: None,
                next_attempt: None,
                failed_attempts: 0,
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

    pub(super) fn state(&self) -> EndpointState {
        self.lock().state
    }

    pub(super) fn set_state(&self, state: EndpointState) {
        let mut details = self.lock();
        if details.state != state {
            details.state = state;
            details.since = Instant::now();
        }
    }

    pub(super) fn set_attributes(&self, attributes: &Attributes) {
        self.attributes.store(Arc::new(attributes.clone()));
        let mut details = self.lock();
        details.weight = attributes.weight();
        details.last_resort = attributes.is_last_resort();
    }

    /// Returns the hash of the endpoint's name for the consistent hash, and its weight. The weight is that of the attributes: neither slow
    /// start nor the zone moves keys.
    pub(super) fn name(&self) -> Name {
        let attributes = self.attributes();
        let name = attributes.hash_key().unwrap_or(self.address.as_str());
        (hash(name.as_bytes()), attributes.weight())
    }

    pub(crate) fn attributes(&self) -> Guard<Arc<Attributes>> {
        self.attributes.load()
    }

    /// Records a load report of the server.
    pub(super) fn on_load_report(&self, report: LoadReport) {
        let report = Arc::new(report);
        if has_weight(&report) {
            self.weight_report.store(Some(Arc::clone(&report)));
        }
        self.load_report.store(Some(report));
    }

    /// Returns the last load report of the server.
    pub(super) fn load_report(&self) -> Option<Arc<LoadReport>> {
        self.load_report.load_full()
    }

    /// Returns the last load report from which a weight can be computed.
    pub(super) fn weight_report(&self) -> Option<Arc<LoadReport>> {
        self.weight_report.load_full()
    }

    /// Discards the report from which a weight is computed, because the endpoint was not ready for a while.
    pub(super) fn forget_weight_report(&self) {
        self.weight_report.store(None);
    }

    pub(super) fn set_ejection(&self, reason: Option<EjectionReason>) {
        self.lock().ejection = reason;
    }

    /// Records a pushback of the server, which ends at `until`. Returns true if it begins one, and false if it only extends the current one.
    pub(super) fn extend_pushback(&self, until: Instant, now: Instant) -> bool {
        if until <= now {
            return false;
        }
        let mut details = self.lock();
        let current = details.pushback.filter(|current| *current > now);
        details.pushback = Some(current.map_or(until, |current| current.max(until)));
        current.is_none()
    }

    /// Returns the end of the last pushback of the server, if that is after `now`. Otherwise, the next pushback begins one: a call whose `now`
    /// is a little earlier must not extend a pushback that the driver has just seen end.
    pub(super) fn current_pushback(&self, now: Instant) -> Option<Instant> {
        let mut details = self.lock();
        details.pushback = details.pushback.filter(|until| *until > now);
        details.pushback
    }

    /// Sets the time of the next attempt to connect, and the number of consecutive attempts that have failed.
    pub(super) fn set_attempts(&self, next: Option<Instant>, failed: usize) {
        let mut details = self.lock();
        details.next_attempt = next;
        details.failed_attempts = failed;
    }

    /// Returns the counters since the endpoint was added. The caller subtracts an earlier tally.
    pub(super) fn tally(&self) -> Tally {
        let details = self.lock();
        let connections = details.connections.iter().filter_map(Weak::upgrade);
        let in_flight = connections.map(|connection| u64::from(connection.load.in_flight()));
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Tally {
            conclusive: count(&self.calls)
                .saturating_sub(in_flight.sum())
                .saturating_sub(count(&self.inconclusive)),
            faults: count(&self.faults),
            overruns: count(&self.overruns),
        }
    }

    pub(super) fn set_last_error(&self, error: Arc<str>) {
        self.last_fault.store(0, Ordering::Relaxed);
        self.lock().last_error = Some(error);
    }

    /// Records a response from a gRPC server.
    pub(super) fn on_answer(&self) {
        // The value is stored only if it changes, because all calls read this cache line.
        if self.not_grpc.load(Ordering::Relaxed) > 0 {
            self.not_grpc.store(0, Ordering::Relaxed);
        }
    }

    /// Records a response that was not gRPC. Returns the number of consecutive responses that were not gRPC.
    pub(super) fn on_not_grpc(&self) -> u32 {
        self.not_grpc.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Returns whether the last response was gRPC. Also true before the first response.
    pub(super) fn is_grpc(&self) -> bool {
        self.not_grpc.load(Ordering::Relaxed) == 0
    }

    /// Records a fault that a call found in the endpoint's response.
    pub(super) fn record_fault(&self, fault: AnswerFault, describe: impl FnOnce() -> String) {
        let code = match fault {
            AnswerFault::Unfinished => 1,
            AnswerFault::NotGrpc(http) => u32::from(http.as_u16()),
        };
        if self.last_fault.swap(code, Ordering::Relaxed) != code {
            self.lock().last_error = Some(describe().into());
        }
    }

    /// Returns the longest silence after which a call uses a connection without a check.
    pub(super) fn trusted_silence(&self, now: Instant) -> Duration {
        let survived = *self.survived_silence();
        let recent = |(_, found): &(Duration, Instant)| {
            now.saturating_duration_since(*found) < TRUST_DURATION
        };
        survived
            .filter(recent)
            .map_or(UNCHECKED_SILENCE, |(silence, _)| {
                silence.max(UNCHECKED_SILENCE)
            })
    }

    /// Records the result of a check after a silence. If the connection is alive, a silence of up to this length is trusted during the next
    /// [`TRUST_DURATION`]: after such a silence, calls use a connection without a check. The reason is that the timeouts of middleboxes do
    /// not change from minute to minute. If the connection is dead, the longest trusted silence is discarded.
    pub(super) fn on_checked(&self, silence: Duration, is_alive: bool, now: Instant) {
        let longest = self.trusted_silence(now).max(silence);
        *self.survived_silence() = is_alive.then_some((longest, now));
    }

    fn survived_silence(&self) -> MutexGuard<'_, Option<(Duration, Instant)>> {
        self.survived_silence
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Discards the longest trusted silence. Called when a connection did not respond within its time limit. This shows that a silence that
    /// earlier connections survived may now end a connection, so other silent connections are checked again.
    pub(super) fn forget_silence(&self) {
        *self.survived_silence() = None;
    }

    /// Discards the observations of the old server, except for its latency, its last error and the counters. Called for a new generation of
    /// the endpoint, because the address may belong to a different server now.
    pub(super) fn forget(&self) {
        self.forget_silence();
        self.largest_metadata.store(0, Ordering::Relaxed);
        self.not_grpc.store(0, Ordering::Relaxed);
        self.load_report.store(None);
        self.weight_report.store(None);
        self.lock().pushback = None;
    }

    pub(crate) fn largest_metadata(&self) -> usize {
        self.largest_metadata.load(Ordering::Relaxed)
    }

    pub(super) fn on_metadata_accepted(&self, size: usize) {
        self.largest_metadata.fetch_max(size, Ordering::Relaxed);
    }

    /// Waits for a permit to dial a private connection, which carries a single call.
    pub(crate) async fn dial_permit(&self) -> DialPermit {
        let dial_permits = Arc::clone(&self.dial_permits);
        DialPermit::new(dial_permits.acquire_owned().await.ok())
    }

    pub(super) fn add_connection(&self, stats: &Arc<ConnectionStats>) {
        let mut details = self.lock();
        details.connections.retain(|known| known.strong_count() > 0);
        details.connections.push(Arc::downgrade(stats));
    }

    /// Keeps the latency estimate of a closed connection for the next connection.
    pub(super) fn keep_estimate(&self, estimate: Option<Estimate>) {
        let mut details = self.lock();
        details.estimate = estimate.or(details.estimate);
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
    pub(super) fn on_inconclusive(&self) {
        self.inconclusive.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the current status of the endpoint.
    pub(super) fn status(&self) -> EndpointStatus {
        let now = Instant::now();
        let details = self.lock();
        let connections = details.connections.iter().filter_map(Weak::upgrade);
        let connections: Vec<_> = connections.collect();
        let latency = connections
            .iter()
            .find_map(|connection| connection.load.estimate())
            .or(details.estimate);
        EndpointStatus {
            address: self.address.clone(),
            state: details.state,
            since: details.since,
            weight: details.weight,
            last_resort: details.last_resort,
            connections: connections.len(),
            in_flight: connections
                .iter()
                .map(|connection| connection.load.in_flight() as usize)
                .sum(),
            latency: latency.map(|estimate| estimate.latency()),
            round_trip: connections.last().map(|connection| connection.round_trip),
            load_report: self.load_report(),
            calls: self.calls.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            ejected: details.ejection.is_some(),
            ejection_reason: details.ejection,
            pushback_until: details.pushback.filter(|until| *until > now),
            // A removed endpoint is not dialled any more.
            next_attempt: details
                .next_attempt
                .filter(|_| details.state != EndpointState::Draining),
            failed_attempts: details.failed_attempts,
            last_error: details.last_error.as_deref().map(str::to_owned),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Details> {
        // No code panics while it holds this lock, and the data would be consistent even then.
        self.details.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A fault in an endpoint's response.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AnswerFault {
    /// A response ended without a gRPC status.
    Unfinished,
    /// A response was not gRPC.
    NotGrpc(StatusCode),
}

/// Counters of an endpoint since it was added.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    /// Calls that have ended and are evidence about the endpoint.
    conclusive: u64,
    faults: u64,
    overruns: u64,
}

impl Tally {
    /// Returns the counts since an earlier tally.
    pub(super) fn since(self, earlier: Self) -> Counts {
        let faults = self.faults.saturating_sub(earlier.faults);
        let overruns = self.overruns.saturating_sub(earlier.overruns);
        let conclusive = self.conclusive.saturating_sub(earlier.conclusive);
        Counts {
            successes: conclusive.saturating_sub(faults + overruns),
            failures: faults,
            overruns,
        }
    }
}

/// After a silence of up to this length, a connection is used without a check. If the tasks of the connections share one thread with the
/// callers, a shorter limit applies (see [`Permit::is_doubtful`](super::permit::Permit::is_doubtful)).
pub(super) const UNCHECKED_SILENCE: Duration = Duration::from_secs(1);
/// Time for which a silence remains trusted after a connection has survived it.
const TRUST_DURATION: Duration = Duration::from_secs(600);
/// Maximum number of concurrent dials of private connections to one endpoint. It is sufficient, because few calls need a private
/// connection. It is also small enough that these dials put hardly any load on a server.
const DIAL_PERMITS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// A call reads the clock before it takes the lock, so its time may be earlier than that of the driver.
    #[test]
    fn a_pushback_that_was_seen_to_end_begins_again() {
        let endpoint = Endpoint::new("10.0.0.1:80".parse().expect("a valid address"));
        let now = Instant::now();
        let [end, later] = [1, 2].map(|seconds| now + Duration::from_secs(seconds));
        assert!(endpoint.extend_pushback(end, now));
        assert!(!endpoint.extend_pushback(end, now));
        assert_eq!(endpoint.current_pushback(now), Some(end));
        assert_eq!(endpoint.current_pushback(end), None);
        assert!(endpoint.extend_pushback(later, now));
        assert_eq!(endpoint.current_pushback(end), Some(later));
    }
}
