//! The load of a server, as its layer and its program record it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use prost::Message;
use tokio::time::Instant;

use super::traffic::Traffic;
use crate::load_report::{OrcaLoadReport, REQUESTS_IN_FLIGHT};

/// Records the load of a server for its reports. Clones share one load.
///
/// The program sets what only it knows: its own utilization, and metrics with a name. A number that is negative, infinite or not a number is
/// ignored. Each number is in all reports until it is set again.
///
/// ```
/// use tonic_balance::orca::LoadRecorder;
///
/// let recorder = LoadRecorder::new();
/// // Three of four workers are busy.
/// recorder.set_application_utilization(0.75);
/// recorder.set_named_metric("queue_length", 12.0);
/// recorder.remove_named_metric("queue_length");
/// ```
#[derive(Clone)]
pub struct LoadRecorder(Arc<Recorded>);

struct Recorded {
    traffic: Traffic,
    application_utilization: Number,
    cpu_utilization: Number,
    memory_utilization: Number,
    /// Whether the log has a warning that the reports are too large for a trailer.
    has_warned: AtomicBool,
    /// Replaced as a whole with each change, because reports are more frequent than changes.
    named: ArcSwap<Named>,
}

/// A number that the program sets, as the bits of an `f64`. 0 if it is not set, as in the message.
#[derive(Debug, Default)]
struct Number(AtomicU64);

/// The numbers with a name.
#[derive(Clone, Debug, Default)]
struct Named {
    metrics: BTreeMap<String, f64>,
    utilizations: BTreeMap<String, f64>,
}

impl Number {
    fn set(&self, number: f64) {
        if is_valid(number) {
            self.0.store(number.to_bits(), Ordering::Relaxed);
        }
    }

    fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }
}

fn is_valid(number: f64) -> bool {
    number.is_finite() && number >= 0.0
}

impl LoadRecorder {
    /// Creates a recorder without calls.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Recorded {
            traffic: Traffic::new(Instant::now()),
            application_utilization: Number::default(),
            cpu_utilization: Number::default(),
            memory_utilization: Number::default(),
            has_warned: AtomicBool::new(false),
            named: ArcSwap::default(),
        }))
    }

    /// Sets the utilization as the application defines it: a fraction of its capacity, which can be above 1. For the weights of gRFC A58, it
    /// takes precedence over the utilization of the CPU. 0 is not reported.
    pub fn set_application_utilization(&self, utilization: f64) {
        self.0.application_utilization.set(utilization);
    }

    /// Sets the utilization of the CPU as a fraction, in place of that of the operating system. 0 removes the number again.
    pub fn set_cpu_utilization(&self, utilization: f64) {
        self.0.cpu_utilization.set(utilization);
    }

    /// Sets the utilization of the memory, as a fraction. 0 is not reported.
    pub fn set_memory_utilization(&self, utilization: f64) {
        self.0.memory_utilization.set(utilization);
    }

    /// Sets a metric with a name, for example the length of a queue.
    pub fn set_named_metric(&self, name: impl Into<String>, value: f64) {
        if is_valid(value) {
            let name = name.into();
            self.change(|named| {
                named.metrics.insert(name.clone(), value);
            });
        }
    }

    /// Removes a metric from the reports.
    pub fn remove_named_metric(&self, name: &str) {
        self.change(|named| {
            named.metrics.remove(name);
        });
    }

    /// Sets the utilization of a resource with a name, for example of a pool, as a fraction.
    pub fn set_named_utilization(&self, name: impl Into<String>, utilization: f64) {
        if is_valid(utilization) {
            let name = name.into();
            self.change(|named| {
                named.utilizations.insert(name.clone(), utilization);
            });
        }
    }

    /// Removes the utilization of a resource from the reports.
    pub fn remove_named_utilization(&self, name: &str) {
        self.change(|named| {
            named.utilizations.remove(name);
        });
    }

    /// Returns the number of calls in flight: calls whose response has not ended.
    #[must_use]
    pub fn requests_in_flight(&self) -> u32 {
        self.0.traffic.in_flight()
    }

    fn change(&self, change: impl Fn(&mut Named)) {
        self.0.named.rcu(|named| {
            let mut named = Named::clone(named);
            change(&mut named);
            named
        });
    }

    pub(super) fn traffic(&self) -> &Traffic {
        &self.0.traffic
    }

    /// Returns the encoded report at `now` for the trailers of a response. A report that is too large has no names of the program.
    pub(super) fn trailer(&self, now: Instant) -> Vec<u8> {
        let mut report = self.report(now);
        let size = report.encoded_len();
        if size > MAX_TRAILER {
            if !self.0.has_warned.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    size,
                    "the load report is too large for a trailer and is sent without named metrics"
                );
            }
            report.utilization.clear();
            report
                .named_metrics
                .retain(|name, _| name == REQUESTS_IN_FLIGHT);
        }
        report.encode_to_vec()
    }

    /// Returns the report at `now`.
    pub(super) fn report(&self, now: Instant) -> OrcaLoadReport {
        let sample = self.0.traffic.sample(now);
        let named = Named::clone(&self.0.named.load());
        let mut named_metrics = named.metrics;
        named_metrics
            .entry(REQUESTS_IN_FLIGHT.to_owned())
            .or_insert_with(|| sample.in_flight.into());
        let cpu = self.0.cpu_utilization.get();
        OrcaLoadReport {
            cpu_utilization: if cpu > 0.0 {
                cpu
            } else {
                sample.cpu_utilization
            },
            mem_utilization: self.0.memory_utilization.get(),
            utilization: named.utilizations,
            rps_fractional: sample.calls_per_second,
            eps: sample.failures_per_second,
            named_metrics,
            application_utilization: self.0.application_utilization.get(),
            ..OrcaLoadReport::default()
        }
    }
}

/// Limit on the size of a report in a trailer. Clients limit the size of all trailers of a response, often to 8 KiB or 16 KiB, and base64 adds a
/// third. A response whose trailers are too large fails.
const MAX_TRAILER: usize = 4 * 1024;

impl Default for LoadRecorder {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for LoadRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LoadRecorder")
            .field(&self.report(Instant::now()))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load_report::LoadReport;

    fn read(recorder: &LoadRecorder) -> LoadReport {
        let now = Instant::now();
        let bytes = recorder.report(now).encode_to_vec();
        LoadReport::decode(&bytes, now).expect("a report")
    }

    #[test]
    fn a_report_contains_what_the_program_has_set() {
        let recorder = LoadRecorder::new();
        recorder.set_application_utilization(0.7);
        recorder.set_cpu_utilization(1.5);
        recorder.set_memory_utilization(0.4);
        recorder.set_named_metric("queue_length", 12.0);
        recorder.set_named_metric("gone", 1.0);
        recorder.set_named_utilization("pool", 0.9);
        let report = read(&recorder.clone());
        assert_eq!(report.application_utilization(), Some(0.7));
        assert_eq!(report.cpu_utilization(), Some(1.5));
        assert_eq!(report.memory_utilization(), Some(0.4));
        assert_eq!(report.named_metric("queue_length"), Some(12.0));
        assert_eq!(report.named_utilization("pool"), Some(0.9));
        assert_eq!(report.requests_in_flight(), Some(0));
        recorder.remove_named_metric("gone");
        recorder.remove_named_utilization("pool");
        let report = read(&recorder);
        assert_eq!(report.named_metric("gone"), None);
        assert_eq!(report.named_utilization("pool"), None);
    }

    #[test]
    fn a_report_that_is_too_large_for_a_trailer_has_no_names() {
        let recorder = LoadRecorder::new();
        recorder.set_application_utilization(0.7);
        let now = Instant::now();
        let read = || LoadReport::decode(&recorder.trailer(now), now).expect("a report");
        recorder.set_named_metric("queue_length", 12.0);
        assert_eq!(read().named_metric("queue_length"), Some(12.0));
        for number in 0..500 {
            recorder.set_named_utilization(format!("pool-{number}"), 0.5);
        }
        assert!(recorder.trailer(now).len() < MAX_TRAILER);
        assert_eq!(read().named_metric("queue_length"), None);
        assert_eq!(read().named_utilization("pool-1"), None);
        assert_eq!(read().requests_in_flight(), Some(0));
        assert_eq!(read().application_utilization(), Some(0.7));
    }

    #[test]
    fn numbers_without_a_meaning_are_ignored() {
        let recorder = LoadRecorder::new();
        recorder.set_application_utilization(0.7);
        for number in [-0.1, f64::NAN, f64::INFINITY] {
            recorder.set_application_utilization(number);
            recorder.set_named_metric("queue_length", number);
        }
        let report = read(&recorder);
        assert_eq!(report.application_utilization(), Some(0.7));
        assert_eq!(report.named_metric("queue_length"), None);
    }

    #[test]
    fn the_program_can_replace_the_number_of_calls_in_flight() {
        let recorder = LoadRecorder::new();
        recorder.set_named_metric(REQUESTS_IN_FLIGHT, 40.0);
        assert_eq!(read(&recorder).requests_in_flight(), Some(40));
    }
}
