//! The serialized form of the status of an endpoint.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Serialize, Serializer};
use tokio::time::Instant;

use super::endpoint_status::{EjectionReason, EndpointState, EndpointStatus};
use crate::load_report::LoadReport;

/// The fields, in the order in which they are written. Times are relative, because an [`Instant`] has no meaning outside of its process.
#[derive(Serialize)]
struct Fields<'a> {
    address: &'a str,
    state: EndpointState,
    state_seconds: f64,
    weight: u32,
    last_resort: bool,
    connections: usize,
    in_flight: usize,
    latency_seconds: Option<f64>,
    round_trip_seconds: Option<f64>,
    load_report: Option<&'a LoadReport>,
    calls: u64,
    failures: u64,
    ejected: bool,
    ejection_reason: Option<EjectionReason>,
    pushback_seconds: Option<f64>,
    next_attempt_seconds: Option<f64>,
    failed_attempts: usize,
    last_error: Option<&'a str>,
}

/// Fields with the names of [`EndpointStatus`]. `state_seconds` is the time since [`since`](EndpointStatus::since). `next_attempt_seconds` is the
/// time until [`next_attempt`](EndpointStatus::next_attempt), and `pushback_seconds` the time until
/// [`pushback_until`](EndpointStatus::pushback_until), or zero if it has passed. Times are in seconds.
impl Serialize for EndpointStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let now = Instant::now();
        let until = |next: Instant| next.saturating_duration_since(now).as_secs_f64();
        let fields = Fields {
            address: self.address.as_str(),
            state: self.state,
            state_seconds: now.saturating_duration_since(self.since).as_secs_f64(),
            weight: self.weight,
            last_resort: self.last_resort,
            connections: self.connections,
            in_flight: self.in_flight,
            latency_seconds: self.latency.as_ref().map(Duration::as_secs_f64),
            round_trip_seconds: self.round_trip.as_ref().map(Duration::as_secs_f64),
            load_report: self.load_report.as_deref(),
            calls: self.calls,
            failures: self.failures,
            ejected: self.ejected,
            ejection_reason: self.ejection_reason,
            pushback_seconds: self.pushback_until.map(until),
            next_attempt_seconds: self.next_attempt.map(until),
            failed_attempts: self.failed_attempts,
            last_error: self.last_error.as_deref(),
        };
        fields.serialize(serializer)
    }
}

/// Fields with the names of the functions of [`LoadReport`], except for the costs of a call. `age_seconds` is the time since the report was
/// received.
impl Serialize for LoadReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a> {
            age_seconds: f64,
            application_utilization: Option<f64>,
            cpu_utilization: Option<f64>,
            memory_utilization: Option<f64>,
            requests_per_second: Option<f64>,
            errors_per_second: Option<f64>,
            requests_in_flight: Option<u32>,
            named_metrics: BTreeMap<&'a str, f64>,
            named_utilizations: BTreeMap<&'a str, f64>,
        }
        let age = Instant::now().saturating_duration_since(self.received_at());
        let fields = Fields {
            age_seconds: age.as_secs_f64(),
            application_utilization: self.application_utilization(),
            cpu_utilization: self.cpu_utilization(),
            memory_utilization: self.memory_utilization(),
            requests_per_second: self.requests_per_second(),
            errors_per_second: self.errors_per_second(),
            requests_in_flight: self.requests_in_flight(),
            named_metrics: self.named_metrics().collect(),
            named_utilizations: self.named_utilizations().collect(),
        };
        fields.serialize(serializer)
    }
}

/// The text of `Display`, for example `"READY"`.
impl Serialize for EndpointState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `"outlier"`, `"not_grpc"`, `"no_answer"` or `"pushback"`.
impl Serialize for EjectionReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::Outlier => "outlier",
            Self::NotGrpc => "not_grpc",
            Self::NoAnswer => "no_answer",
            Self::Pushback => "pushback",
        })
    }
}
