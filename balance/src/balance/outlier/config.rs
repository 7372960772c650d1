//! The configuration of outlier detection.

use std::time::Duration;

use crate::balance::limits::MAX_DURATION;

/// Ejects endpoints for a while if they fail far more calls than the others. This is gRPC's outlier detection (gRFC A50), with the defaults
/// of the gRFC. It is disabled unless a configuration is passed to
/// [`ChannelBuilder::outlier_detection`](crate::channel::ChannelBuilder::outlier_detection).
///
/// Three things count as failures: a lost connection, the status `UNAVAILABLE`, and a response that is not gRPC. A call that overran its
/// deadline counts only in the comparison of success rates. Unlike in the gRFC, errors of the application do not count. Calls that the
/// caller dropped do not count either.
///
/// An ejected endpoint keeps its connection. It gets calls only if no other endpoint is ready. A new
/// [generation](crate::channel::Attributes::with_generation) of the endpoint, such as a fresh registration in etcd, ends the ejection.
///
/// ```
/// use std::time::Duration;
/// use tonic_balance::{BalancedChannel, channel::OutlierDetection};
///
/// # fn run() {
/// let detection = OutlierDetection::new().base_ejection_time(Duration::from_secs(10));
/// let channel = BalancedChannel::builder()
///     .outlier_detection(detection)
///     .addresses(["10.0.0.5:50051", "10.0.0.6:50051"]).connect_lazy();
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
#[must_use = "it does nothing before it is given to a channel"]
pub struct OutlierDetection {
    pub(super) interval: Duration,
    pub(super) base_ejection_time: Duration,
    pub(super) max_ejection_time: Duration,
    pub(super) max_ejection_percent: u32,
    pub(super) success_rate: Option<SuccessRateEjection>,
    pub(super) failure_percentage: Option<FailurePercentageEjection>,
}

impl Default for OutlierDetection {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            base_ejection_time: Duration::from_secs(30),
            max_ejection_time: Duration::from_secs(300),
            max_ejection_percent: 10,
            success_rate: Some(SuccessRateEjection::new()),
            failure_percentage: Some(FailurePercentageEjection::new()),
        }
    }
}

impl OutlierDetection {
    /// Creates a configuration with both algorithms and the defaults of gRFC A50.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the time between two evaluations. Each evaluation judges the calls since the previous one. Default 10 s, minimum 1 ms.
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval.clamp(Duration::from_millis(1), MAX_DURATION);
        self
    }

    /// Sets the duration of the first ejection. Each further ejection of the endpoint is longer by this duration. For each interval in
    /// which the endpoint is not ejected, its next ejection is shorter by the same duration. Default 30 s.
    pub fn base_ejection_time(mut self, time: Duration) -> Self {
        self.base_ejection_time = time;
        self
    }

    /// Sets the limit on the duration of an ejection. A limit below [`base_ejection_time`](Self::base_ejection_time) counts as that time.
    /// Default 300 s.
    pub fn max_ejection_time(mut self, time: Duration) -> Self {
        self.max_ejection_time = time;
        self
    }

    /// Sets the percentage of endpoints that can be ejected at the same time. One endpoint can be ejected even if that exceeds the
    /// percentage. The last endpoint that is not ejected is never ejected. Default 10. Values above 100 count as 100.
    pub fn max_ejection_percent(mut self, percent: u32) -> Self {
        self.max_ejection_percent = percent.min(100);
        self
    }

    /// Sets the rule that compares success rates. Enabled by default.
    pub fn success_rate(mut self, rule: SuccessRateEjection) -> Self {
        self.success_rate = Some(rule);
        self
    }

    /// Disables the comparison of success rates.
    pub fn without_success_rate(mut self) -> Self {
        self.success_rate = None;
        self
    }

    /// Sets the rule that ejects endpoints with too high a percentage of failures. Enabled by default.
    pub fn failure_percentage(mut self, rule: FailurePercentageEjection) -> Self {
        self.failure_percentage = Some(rule);
        self
    }

    /// Disables the limit on the percentage of failures.
    pub fn without_failure_percentage(mut self) -> Self {
        self.failure_percentage = None;
        self
    }

    pub(in crate::balance) fn period(&self) -> Duration {
        self.interval
    }
}

/// The comparison of success rates: ejects an endpoint whose success rate is far below the mean of the compared endpoints. This is gRPC's
/// `success_rate_ejection` (gRFC A50).
///
/// ```
/// use tonic_balance::channel::{OutlierDetection, SuccessRateEjection};
///
/// let rule = SuccessRateEjection::new().stdev_factor(2_500).minimum_hosts(3);
/// let detection = OutlierDetection::new().success_rate(rule);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use = "it does nothing before it is given to an `OutlierDetection`"]
pub struct SuccessRateEjection {
    pub(super) stdev_factor: u32,
    pub(super) minimum_hosts: usize,
    pub(super) request_volume: u64,
    pub(super) enforcement_percentage: u32,
}

impl Default for SuccessRateEjection {
    fn default() -> Self {
        Self {
            stdev_factor: 1_900,
            minimum_hosts: 5,
            request_volume: 100,
            enforcement_percentage: 100,
        }
    }
}

impl SuccessRateEjection {
    /// Creates the rule with the defaults of gRFC A50.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how far below the mean a success rate must be for an ejection, in thousandths of a standard deviation. Default 1900.
    pub fn stdev_factor(mut self, thousandths: u32) -> Self {
        self.stdev_factor = thousandths;
        self
    }

    /// Sets how many endpoints must have the [`request_volume`](Self::request_volume). With fewer, no endpoint is ejected. Default 5.
    pub fn minimum_hosts(mut self, hosts: usize) -> Self {
        self.minimum_hosts = hosts;
        self
    }

    /// Sets how many calls an endpoint must have had within an interval to be compared with the others. Default 100.
    pub fn request_volume(mut self, calls: u64) -> Self {
        self.request_volume = calls;
        self
    }

    /// Sets the probability in percent with which an outlier is ejected. 0 disables the rule. Default 100. Values above 100 count as 100.
    pub fn enforcement_percentage(mut self, percent: u32) -> Self {
        self.enforcement_percentage = percent.min(100);
        self
    }
}

/// The limit on the percentage of failures: ejects an endpoint that fails too large a part of its calls, whatever the rates of the other
/// endpoints are. This is gRPC's `failure_percentage_ejection` (gRFC A50).
///
/// ```
/// use tonic_balance::channel::{FailurePercentageEjection, OutlierDetection};
///
/// let rule = FailurePercentageEjection::new().threshold(50).request_volume(20);
/// let detection = OutlierDetection::new().failure_percentage(rule);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use = "it does nothing before it is given to an `OutlierDetection`"]
pub struct FailurePercentageEjection {
    pub(super) threshold: u32,
    pub(super) minimum_hosts: usize,
    pub(super) request_volume: u64,
    pub(super) enforcement_percentage: u32,
}

impl Default for FailurePercentageEjection {
    fn default() -> Self {
        Self {
            threshold: 85,
            minimum_hosts: 5,
            request_volume: 50,
            enforcement_percentage: 100,
        }
    }
}

impl FailurePercentageEjection {
    /// Creates the rule with the defaults of gRFC A50, except for [`enforcement_percentage`](Self::enforcement_percentage).
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the percentage of failed calls above which an endpoint is ejected. Default 85. Values above 100 count as 100.
    pub fn threshold(mut self, percent: u32) -> Self {
        self.threshold = percent.min(100);
        self
    }

    /// Sets how many endpoints must have the [`request_volume`](Self::request_volume). With fewer, no endpoint is ejected. Default 5.
    pub fn minimum_hosts(mut self, hosts: usize) -> Self {
        self.minimum_hosts = hosts;
        self
    }

    /// Sets how many calls an endpoint must have had within an interval to be ejected. Default 50.
    pub fn request_volume(mut self, calls: u64) -> Self {
        self.request_volume = calls;
        self
    }

    /// Sets the probability in percent with which an endpoint above the threshold is ejected. 0 disables the rule. Default 100, unlike in
    /// gRFC A50, where the rule is disabled by default. Values above 100 count as 100.
    pub fn enforcement_percentage(mut self, percent: u32) -> Self {
        self.enforcement_percentage = percent.min(100);
        self
    }
}
