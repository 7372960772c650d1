//! Load reports: what a server reports about its load in the trailers of its responses (ORCA, gRFC A51).

use std::collections::BTreeMap;

use prost::Message;
use tokio::time::Instant;

/// The load of a server, as the server has reported it: the message `xds.data.orca.v3.OrcaLoadReport` of ORCA (Open Request Cost
/// Aggregation).
///
/// A channel with [`load_reports`](crate::channel::ChannelBuilder::load_reports) keeps the last report of each endpoint. A
/// [`PickPolicy`](crate::channel::PickPolicy) reads it with [`ReadyEndpoint::load_report`](crate::channel::ReadyEndpoint::load_report), and
/// [`EndpointStatus`](crate::channel::EndpointStatus) contains it.
///
/// In the message, a number that is not set is 0, so the functions return `None` for 0. They also return `None` for a number that has no
/// meaning: a negative, an infinite one, or one that is not a number. Metrics and costs with a name can be 0.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadReport {
    message: OrcaLoadReport,
    received_at: Instant,
}

impl LoadReport {
    /// Decodes a report that was received at `now`. Returns `None` if it cannot be decoded, or if it is too large to be a report.
    pub(crate) fn decode(bytes: &[u8], now: Instant) -> Option<Self> {
        if bytes.len() > MAX_BYTES {
            return None;
        }
        let message = OrcaLoadReport::decode(bytes).ok()?;
        Some(Self {
            message,
            received_at: now,
        })
    }

    /// Returns the time at which the report was received.
    #[must_use]
    pub fn received_at(&self) -> Instant {
        self.received_at
    }

    /// Returns the utilization as the application defines it: a fraction of its capacity, which can be above 1.
    #[must_use]
    pub fn application_utilization(&self) -> Option<f64> {
        positive(self.message.application_utilization)
    }

    /// Returns the utilization of the CPU: a fraction of the CPU time that the server can use. Some servers report more than 1.
    #[must_use]
    pub fn cpu_utilization(&self) -> Option<f64> {
        positive(self.message.cpu_utilization)
    }

    /// Returns the utilization of the memory, as a fraction.
    #[must_use]
    pub fn memory_utilization(&self) -> Option<f64> {
        positive(self.message.mem_utilization)
    }

    /// Returns the utilization from which weights are computed: that of the application, or else that of the CPU (gRFC A58).
    #[must_use]
    pub fn utilization(&self) -> Option<f64> {
        self.application_utilization().or(self.cpu_utilization())
    }

    /// Returns the calls per second of all clients together.
    #[must_use]
    pub fn requests_per_second(&self) -> Option<f64> {
        positive(self.message.rps_fractional)
    }

    /// Returns the failed calls per second of all clients together. Which calls count as failed depends on the server.
    #[must_use]
    pub fn errors_per_second(&self) -> Option<f64> {
        positive(self.message.eps)
    }

    /// Returns the calls of all clients that were in flight at the server: the metric with the name `requests_in_flight`. Servers of this
    /// library report it. It is not part of the gRFCs, so most other servers do not.
    #[must_use]
    pub fn requests_in_flight(&self) -> Option<u32> {
        let number = self.named_metric(REQUESTS_IN_FLIGHT)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a cast to an integer saturates, and the number is not negative"
        )]
        let number = (number >= 0.0).then_some(number as u32);
        number
    }

    /// Returns a metric of the application by its name.
    #[must_use]
    pub fn named_metric(&self, name: &str) -> Option<f64> {
        finite(self.message.named_metrics.get(name))
    }

    /// Returns all metrics of the application, sorted by name.
    pub fn named_metrics(&self) -> impl Iterator<Item = (&str, f64)> {
        named(&self.message.named_metrics)
    }

    /// Returns the utilization of a resource of the application by its name, as a fraction.
    #[must_use]
    pub fn named_utilization(&self, name: &str) -> Option<f64> {
        finite(self.message.utilization.get(name))
    }

    /// Returns the utilizations of all resources of the application, sorted by name.
    pub fn named_utilizations(&self) -> impl Iterator<Item = (&str, f64)> {
        named(&self.message.utilization)
    }

    /// Returns a cost of the call with whose response the report was sent, by its name.
    #[must_use]
    pub fn request_cost(&self, name: &str) -> Option<f64> {
        finite(self.message.request_cost.get(name))
    }
}

fn positive(number: f64) -> Option<f64> {
    (number.is_finite() && number > 0.0).then_some(number)
}

fn finite(number: Option<&f64>) -> Option<f64> {
    number.copied().filter(|number| number.is_finite())
}

fn named(numbers: &BTreeMap<String, f64>) -> impl Iterator<Item = (&str, f64)> {
    let finite = numbers.iter().filter(|(_, number)| number.is_finite());
    finite.map(|(name, number)| (&**name, *number))
}

/// The message `xds.data.orca.v3.OrcaLoadReport`, without its deprecated field `rps`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct OrcaLoadReport {
    #[prost(double, tag = "1")]
    pub(crate) cpu_utilization: f64,
    #[prost(double, tag = "2")]
    pub(crate) mem_utilization: f64,
    #[prost(btree_map = "string, double", tag = "4")]
    pub(crate) request_cost: BTreeMap<String, f64>,
    #[prost(btree_map = "string, double", tag = "5")]
    pub(crate) utilization: BTreeMap<String, f64>,
    #[prost(double, tag = "6")]
    pub(crate) rps_fractional: f64,
    #[prost(double, tag = "7")]
    pub(crate) eps: f64,
    #[prost(btree_map = "string, double", tag = "8")]
    pub(crate) named_metrics: BTreeMap<String, f64>,
    #[prost(double, tag = "9")]
    pub(crate) application_utilization: f64,
}

/// The key of the trailer that contains a report (gRFC A51).
pub(crate) const TRAILER: &str = "endpoint-load-metrics-bin";
/// The name of the metric with the calls in flight.
pub(crate) const REQUESTS_IN_FLIGHT: &str = "requests_in_flight";
/// Limit on the size of a report. A channel keeps the last reports of each endpoint, so a server could fill its memory with larger ones.
const MAX_BYTES: usize = 8 << 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn received(message: &OrcaLoadReport) -> Option<LoadReport> {
        LoadReport::decode(&message.encode_to_vec(), Instant::now())
    }

    #[test]
    fn a_report_is_read_with_the_field_numbers_of_the_protocol() {
        let entry = |field: u8, name: &[u8; 1], number: f64| {
            let tag = [field << 3 | 2, 12, 0x0a, 1, name[0], 0x11];
            [&tag[..], &number.to_le_bytes()].concat()
        };
        let double = |field: u8, number: f64| {
            let tag = [field << 3 | 1];
            [&tag[..], &number.to_le_bytes()].concat()
        };
        let bytes = [
            double(1, 0.1),
            double(2, 0.2),
            // The deprecated field 3, and a field of a later version.
            vec![3 << 3, 7, 15 << 3, 7],
            entry(4, b"d", 4.0),
            entry(5, b"e", 0.5),
            double(6, 600.0),
            double(7, 7.0),
            entry(8, b"h", 0.0),
            double(9, 0.9),
        ]
        .concat();
        let now = Instant::now();
        let report = LoadReport::decode(&bytes, now).expect("a report");
        assert_eq!(report.received_at(), now);
        assert_eq!(report.cpu_utilization(), Some(0.1));
        assert_eq!(report.memory_utilization(), Some(0.2));
        assert_eq!(report.request_cost("d"), Some(4.0));
        assert_eq!(report.named_utilization("e"), Some(0.5));
        assert_eq!(report.requests_per_second(), Some(600.0));
        assert_eq!(report.errors_per_second(), Some(7.0));
        assert_eq!(report.named_metrics().collect::<Vec<_>>(), [("h", 0.0)]);
        assert_eq!(report.application_utilization(), Some(0.9));
        assert_eq!(report.utilization(), Some(0.9));
        assert_eq!(report.requests_in_flight(), None);
    }

    #[test]
    fn numbers_that_are_not_set_or_have_no_meaning_are_none() {
        let empty = received(&OrcaLoadReport::default()).expect("an empty report");
        assert_eq!(empty.utilization(), None);
        assert_eq!(empty.requests_per_second(), None);
        for number in [-1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let named = BTreeMap::from([(REQUESTS_IN_FLIGHT.to_owned(), number)]);
            let report = received(&OrcaLoadReport {
                cpu_utilization: 0.5,
                application_utilization: number,
                rps_fractional: number,
                eps: number,
                named_metrics: named,
                ..OrcaLoadReport::default()
            });
            let report = report.expect("a report");
            assert_eq!(report.utilization(), Some(0.5));
            assert_eq!(report.requests_per_second(), None);
            assert_eq!(report.errors_per_second(), None);
            assert_eq!(report.requests_in_flight(), None);
        }
        let named = [("a", 0.0), (REQUESTS_IN_FLIGHT, 1e300)];
        let named = named.map(|(name, number)| (name.to_owned(), number));
        let report = received(&OrcaLoadReport {
            named_metrics: BTreeMap::from(named),
            ..OrcaLoadReport::default()
        });
        let report = report.expect("a report");
        assert_eq!(report.named_metric("a"), Some(0.0));
        assert_eq!(report.requests_in_flight(), Some(u32::MAX));
    }

    #[test]
    fn a_report_that_is_too_large_is_ignored() {
        let name = "x".repeat(MAX_BYTES);
        let report = received(&OrcaLoadReport {
            named_metrics: BTreeMap::from([(name, 1.0)]),
            ..OrcaLoadReport::default()
        });
        assert_eq!(report, None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_ignored(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(report) = LoadReport::decode(&bytes, Instant::now()) {
                prop_assert!(report.utilization().is_none_or(|utilization| utilization > 0.0));
                prop_assert!(report.named_metrics().all(|(_, number)| number.is_finite()));
            }
        }
    }
}
