//! The status of an endpoint, as the users of a channel see it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::address::Address;
use crate::load_report::LoadReport;

/// The status of one endpoint of a channel at one moment.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct EndpointStatus {
    /// The address of the endpoint.
    pub address: Address,
    /// Whether the endpoint can take calls.
    pub state: EndpointState,
    /// The time at which the endpoint entered this state.
    pub since: Instant,
    /// The endpoint's share of the calls relative to other endpoints.
    pub weight: u32,
    /// Whether the endpoint is a last resort, for example because the source has lost it together with most other endpoints. A last resort
    /// gets calls only while no other endpoint is ready.
    pub last_resort: bool,
    /// Number of open connections.
    pub connections: usize,
    /// Calls whose response has not ended.
    pub in_flight: usize,
    /// The mean time until the head of a response. It covers the last few seconds, or the last few calls if calls are rare. `None` until the
    /// latency of a call is known.
    pub latency: Option<Duration>,
    /// The round-trip time of the first PING on the newest connection.
    pub round_trip: Option<Duration>,
    /// The last load report of the server. `None` without [load reports](crate::channel::ChannelBuilder::load_reports), and if the server
    /// has sent none.
    pub load_report: Option<Arc<LoadReport>>,
    /// Calls sent to the endpoint.
    pub calls: u64,
    /// Calls that failed because of the endpoint. The cause was a lost connection, a response that is not gRPC, or a status that indicates
    /// a fault of the server.
    pub failures: u64,
    /// Whether the endpoint is excluded from ordinary picks. If its connection does not answer, it gets no calls. If it has failed too many
    /// calls ([`OutlierDetection`](crate::channel::OutlierDetection)), does not answer with gRPC, or requests a wait (pushback), it gets calls
    /// only while no other endpoint is ready.
    pub ejected: bool,
    /// Why the endpoint is excluded from ordinary picks. `None` if it is not.
    pub ejection_reason: Option<EjectionReason>,
    /// The end of the wait that the server has requested when it refused a call (`grpc-retry-pushback-ms`), at most
    /// [`max_pushback`](crate::channel::ChannelBuilder::max_pushback) after the refusal. `None` if no such wait is in progress, and by default.
    /// If too many of the endpoints request a wait, all of them get calls.
    pub pushback_until: Option<Instant>,
    /// The time of the next attempt to connect: the end of the backoff after a failed attempt, or of the wait after an unused connection
    /// has ended. At this time, the endpoint is queued for a dial. `None` while a connection exists or is being dialled, and if no attempt
    /// is planned. A call that needs the endpoint or a new registration can lead to an earlier attempt.
    pub next_attempt: Option<Instant>,
    /// Number of consecutive attempts to connect that have failed. Zero once a connection is established.
    pub failed_attempts: usize,
    /// The last error: why an attempt to connect failed, why a connection was lost or gets no calls, or why a response did not count as
    /// gRPC.
    pub last_error: Option<String>,
}

/// One line for people, for example
/// `10.0.0.5:50051 READY for 12s, weight 1, 3 in flight, latency 1.2ms, 1200 calls, 0 failures`.
impl fmt::Display for EndpointStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let age = Instant::now().saturating_duration_since(self.since);
        let (address, state, weight) = (&self.address, self.state, self.weight);
        write!(f, "{address} {state} for {}, weight {weight}", Rounded(age))?;
        write!(f, ", {} in flight", self.in_flight)?;
        if let Some(latency) = self.latency {
            write!(f, ", latency {}", Rounded(latency))?;
        }
        if let Some(utilization) = self.load_report.as_ref().and_then(|one| one.utilization()) {
            write!(f, ", utilization {utilization:.2}")?;
        }
        write!(f, ", {} calls, {} failures", self.calls, self.failures)?;
        if self.last_resort {
            f.write_str(", last resort")?;
        }
        if self.ejected {
            f.write_str(", ejected")?;
        }
        if let Some(reason) = self.ejection_reason {
            write!(f, ": {reason}")?;
        }
        if let Some(until) = self.pushback_until {
            let wait = until.saturating_duration_since(Instant::now());
            write!(f, ", pushback for {}", Rounded(wait))?;
        }
        if self.failed_attempts > 0 {
            write!(f, ", {} failed attempts to connect", self.failed_attempts)?;
        }
        if let Some(next) = self.next_attempt {
            let wait = next.saturating_duration_since(Instant::now());
            write!(f, ", next attempt in {}", Rounded(wait))?;
        }
        match &self.last_error {
            Some(error) => write!(f, ", last error: {error}"),
            None => Ok(()),
        }
    }
}

/// A duration with two or three digits: `12s`, `350ms` or `1.2ms`.
struct Rounded(Duration);

impl fmt::Display for Rounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_secs_f64() * 1_000.0;
        match millis {
            10_000.0.. => write!(f, "{}s", self.0.as_secs()),
            1_000.0.. => write!(f, "{:.1}s", millis / 1_000.0),
            10.0.. => write!(f, "{millis:.0}ms"),
            _ => write!(f, "{millis:.1}ms"),
        }
    }
}

/// The name that gRPC gives to the state, for example `TRANSIENT_FAILURE`. gRPC has no name for `DRAINING`.
impl fmt::Display for EndpointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Idle => "IDLE",
            Self::Connecting => "CONNECTING",
            Self::Ready => "READY",
            Self::TransientFailure => "TRANSIENT_FAILURE",
            Self::Draining => "DRAINING",
        })
    }
}

/// The connectivity of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndpointState {
    /// No connection exists, and none is being dialled. There are three possible reasons. The endpoint waits for its turn to be dialled. It
    /// is a last resort, which is not dialled. Or its connection has ended while no call needed it; the endpoint is then dialled again when
    /// a call needs it, or after a wait.
    Idle,
    /// A connection is being dialled.
    Connecting,
    /// A connection has answered and takes calls.
    Ready,
    /// The endpoint takes no calls, for one of three reasons. The last attempt to connect failed, and the next one follows after a backoff.
    /// Or the connection does not answer any more. Or the endpoint reports that it is not serving
    /// ([`health_check`](crate::channel::ChannelBuilder::health_check)).
    TransientFailure,
    /// The endpoint was removed, and its last calls are still running.
    Draining,
}

/// Why an endpoint is excluded from ordinary picks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EjectionReason {
    /// It fails far more calls than the other endpoints ([`OutlierDetection`](crate::channel::OutlierDetection)).
    Outlier,
    /// Its responses are not gRPC.
    NotGrpc,
    /// None of its connections answers.
    NoAnswer,
    /// Its server has refused a call and requests a wait before the next one.
    Pushback,
}

impl fmt::Display for EjectionReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Outlier => "outlier",
            Self::NotGrpc => "not gRPC",
            Self::NoAnswer => "no answer",
            Self::Pushback => "pushback",
        })
    }
}
