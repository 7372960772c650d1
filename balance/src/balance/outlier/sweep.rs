//! Outlier detection (gRFC A50): ejects endpoints that fail far more calls than the others.
//!
//! Performs no I/O. The input is the counts of each endpoint within an interval. The output is which endpoints are ejected.

use std::time::Duration;

use tokio::time::Instant;

use super::limits::MAX_DURATION;

/// Ejects endpoints for a while if they fail far more calls than the others. This is gRPC's outlier detection (gRFC A50), with the defaults
/// of the gRFC. Disabled unless it is passed to [`ChannelBuilder::outlier_detection`](crate::ChannelBuilder::outlier_detection).
///
/// Three things count as failures: a lost connection, the status `UNAVAILABLE`, and a response that is not gRPC. A call that overran its
/// deadline counts only in the comparison of success rates. Unlike in the gRFC, errors of the application do not count. Calls that the
/// caller dropped do not count either.
///
/// An ejected endpoint keeps its connection. It gets calls only if no other endpoint is ready. A fresh registration in etcd ends the
/// ejection.
///
/// ```
/// use std::time::Duration;
/// use tonic_balance::{BalancedChannel, OutlierDetection};
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
    interval: Duration,
    base_ejection_time: Duration,
    max_ejection_time: Duration,
    max_ejection_percent: u32,
    success_rate: Option<SuccessRateEjection>,
    failure_percentage: Option<FailurePercentageEjection>,
}

/// The comparison of success rates: ejects an endpoint whose success rate is far below the mean. This is gRPC's
/// `success_rate_ejection` (gRFC A50).
///
/// ```
/// use tonic_balance::{OutlierDetection, SuccessRateEjection};
///
/// let rule = SuccessRateEjection::new().stdev_factor(2_500).minimum_hosts(3);
/// let detection = OutlierDetection::new().success_rate(rule);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use = "it does nothing before it is given to an `OutlierDetection`"]
pub struct SuccessRateEjection {
    stdev_factor: u32,
    minimum_hosts: usize,
    request_volume: u64,
}

impl Default for SuccessRateEjection {
    fn default() -> Self {
        Self {
            stdev_factor: 1_900,
            minimum_hosts: 5,
            request_volume: 100,
        }
    }
}

impl SuccessRateEjection {
    /// Creates the rule with the defaults of gRFC A50.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how far below the mean a success rate must be, in thousandths of a standard deviation. Default 1900.
    pub fn stdev_factor(mut self, thousandths: u32) -> Self {
        self.stdev_factor = thousandths;
        self
    }

    /// Sets how many endpoints must have the [`request_volume`](Self::request_volume). With fewer, no endpoint is ejected. Default 5.
    pub fn minimum_hosts(mut self, hosts: usize) -> Self {
        self.minimum_hosts = hosts;
        self
    }

    /// Sets how many calls an endpoint must have had within an interval to be compared. Default 100.
    pub fn request_volume(mut self, calls: u64) -> Self {
        self.request_volume = calls;
        self
    }
}

/// The limit on failures: ejects an endpoint that fails too large a part of its calls, whatever the rates of the other endpoints are. This
/// is gRPC's `failure_percentage_ejection` (gRFC A50).
///
/// ```
/// use tonic_balance::{FailurePercentageEjection, OutlierDetection};
///
/// let rule = FailurePercentageEjection::new().threshold(50).request_volume(20);
/// let detection = OutlierDetection::new().failure_percentage(rule);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use = "it does nothing before it is given to an `OutlierDetection`"]
pub struct FailurePercentageEjection {
    threshold: u32,
    minimum_hosts: usize,
    request_volume: u64,
}

impl Default for FailurePercentageEjection {
    fn default() -> Self {
        Self {
            threshold: 85,
            minimum_hosts: 5,
            request_volume: 50,
        }
    }
}

impl FailurePercentageEjection {
    /// Creates the rule with the defaults of gRFC A50.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the percentage of failed calls above which an endpoint is ejected. Default 85.
    pub fn threshold(mut self, percent: u32) -> Self {
        self.threshold = percent;
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

    /// Sets the time of the first ejection. Each further ejection takes that much longer, and each interval without an ejection reduces the
    /// next one by that much. Default 30 s.
    pub fn base_ejection_time(mut self, time: Duration) -> Self {
        self.base_ejection_time = time;
        self
    }

    /// Sets the limit on the time of an ejection. Default 300 s.
    pub fn max_ejection_time(mut self, time: Duration) -> Self {
        self.max_ejection_time = time;
        self
    }

    /// Sets the percentage of endpoints that may be ejected at once. One endpoint may be ejected in any case, and never all of them.
    /// Default 10.
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

    /// Sets the rule that limits failures. Enabled by default.
    pub fn failure_percentage(mut self, rule: FailurePercentageEjection) -> Self {
        self.failure_percentage = Some(rule);
        self
    }

    /// Disables the limit on failures.
    pub fn without_failure_percentage(mut self) -> Self {
        self.failure_percentage = None;
        self
    }

    pub(super) fn period(&self) -> Duration {
        self.interval
    }
}

/// Counts of an endpoint's calls within an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) successes: u64,
    pub(super) failures: u64,
    /// Calls that overran their deadline.
    pub(super) overruns: u64,
}

/// Whether an endpoint is ejected, and for which multiple of the base time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ejection {
    since: Option<Instant>,
    multiplier: u32,
}

impl Ejection {
    pub(super) fn is_ejected(&self) -> bool {
        self.since.is_some()
    }

    fn eject(&mut self, now: Instant) {
        self.since = Some(now);
        self.multiplier = self.multiplier.saturating_add(1);
    }

    /// Returns whether the time of the ejection is over.
    fn is_over(&self, config: &OutlierDetection, now: Instant) -> bool {
        let longest = config.max_ejection_time.max(config.base_ejection_time);
        let time = config.base_ejection_time.saturating_mul(self.multiplier);
        self.since
            .is_some_and(|since| now.saturating_duration_since(since) >= time.min(longest))
    }
}

/// Evaluates the endpoints at the end of an interval.
pub(super) fn sweep(config: &OutlierDetection, hosts: &mut [(Counts, Ejection)], now: Instant) {
    if let Some(rule) = &config.success_rate {
        rule.eject(config, hosts, now);
    }
    if let Some(rule) = &config.failure_percentage {
        rule.eject(config, hosts, now);
    }
    for (_, ejection) in hosts {
        if ejection.is_over(config, now) {
            ejection.since = None;
        } else if !ejection.is_ejected() {
            ejection.multiplier = ejection.multiplier.saturating_sub(1);
        }
    }
}

impl SuccessRateEjection {
    #[expect(
        clippy::cast_precision_loss,
        reason = "rates need no more digits than calls within an interval have"
    )]
    fn eject(self, config: &OutlierDetection, hosts: &mut [(Counts, Ejection)], now: Instant) {
        let rate = |counts: &Counts| {
            let total = counts.successes + counts.failures + counts.overruns;
            (total >= self.request_volume && total > 0)
                .then(|| counts.successes as f64 / total as f64)
        };
        let rates: Vec<_> = hosts
            .iter()
            .filter_map(|(counts, _)| rate(counts))
            .collect();
        if rates.len() < self.minimum_hosts.max(1) {
            return;
        }
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        let variance =
            rates.iter().map(|rate| (rate - mean).powi(2)).sum::<f64>() / rates.len() as f64;
        let threshold = mean - variance.sqrt() * (f64::from(self.stdev_factor) / 1_000.0);
        eject_where(config, hosts, now, |counts| {
            rate(counts).is_some_and(|rate| rate < threshold)
        });
    }
}

impl FailurePercentageEjection {
    fn eject(self, config: &OutlierDetection, hosts: &mut [(Counts, Ejection)], now: Instant) {
        let total = |counts: &Counts| counts.successes + counts.failures;
        let has_volume = |counts: &Counts| total(counts) >= self.request_volume.max(1);
        let with_volume = hosts.iter().filter(|(counts, _)| has_volume(counts));
        if with_volume.count() < self.minimum_hosts {
            return;
        }
        eject_where(config, hosts, now, |counts| {
            has_volume(counts) && counts.failures * 100 > u64::from(self.threshold) * total(counts)
        });
    }
}

/// Ejects the outliers, as long as enough endpoints remain.
fn eject_where(
    config: &OutlierDetection,
    hosts: &mut [(Counts, Ejection)],
    now: Instant,
    is_outlier: impl Fn(&Counts) -> bool,
) {
    let all = hosts.len();
    let mut out = hosts.iter().filter(|(_, e)| e.is_ejected()).count();
    for (counts, ejection) in hosts {
        // The first ejection is allowed whatever the percentage is: 10 % of a small set would be less than one endpoint. One endpoint
        // always remains.
        let within = out == 0 || (out + 1) * 100 <= all * config.max_ejection_percent as usize;
        if !ejection.is_ejected() && within && out + 1 < all && is_outlier(counts) {
            ejection.eject(now);
            out += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counts(successes: u64, failures: u64) -> (Counts, Ejection) {
        let counts = Counts {
            successes,
            failures,
            overruns: 0,
        };
        (counts, Ejection::default())
    }

    fn ejected(hosts: &[(Counts, Ejection)]) -> Vec<usize> {
        let ejected = hosts
            .iter()
            .enumerate()
            .filter(|(_, (_, e))| e.is_ejected());
        ejected.map(|(index, _)| index).collect()
    }

    #[test]
    fn an_endpoint_that_fails_much_more_than_the_others_is_ejected() {
        let config = OutlierDetection::new().without_failure_percentage();
        let mut hosts = vec![counts(1_000, 1); 9];
        hosts.push(counts(700, 300));
        sweep(&config, &mut hosts, Instant::now());
        assert_eq!(ejected(&hosts), [9]);
    }

    #[test]
    fn overruns_count_only_for_the_success_rate() {
        let slow = Counts {
            successes: 0,
            failures: 0,
            overruns: 1_000,
        };
        let mut hosts = vec![counts(1_000, 0); 9];
        hosts.push((slow, Ejection::default()));
        let alone = OutlierDetection::new().without_success_rate();
        sweep(&alone, &mut hosts, Instant::now());
        assert!(ejected(&hosts).is_empty());
        sweep(&OutlierDetection::new(), &mut hosts, Instant::now());
        assert_eq!(ejected(&hosts), [9]);
    }

    #[test]
    fn an_endpoint_that_fails_nearly_all_calls_is_ejected_even_among_failing_ones() {
        let config = OutlierDetection::new().without_success_rate();
        let mut hosts = vec![counts(20, 80), counts(20, 80), counts(10, 90)];
        hosts.extend([counts(20, 80), counts(15, 85)]);
        sweep(&config, &mut hosts, Instant::now());
        assert_eq!(ejected(&hosts), [2], "85 percent itself is not enough");
    }

    #[test]
    fn few_endpoints_or_few_calls_cause_no_ejection() {
        let mut few = vec![counts(1_000, 0), counts(1_000, 0), counts(0, 1_000)];
        sweep(&OutlierDetection::new(), &mut few, Instant::now());
        assert!(ejected(&few).is_empty());
        let mut quiet = vec![counts(10, 0); 9];
        quiet.push(counts(0, 10));
        sweep(&OutlierDetection::new(), &mut quiet, Instant::now());
        assert!(ejected(&quiet).is_empty());
    }

    #[test]
    fn ejections_grow_up_to_a_limit_and_shrink_after_good_intervals() {
        let config = OutlierDetection::new();
        let mut now = Instant::now();
        let bad = || {
            let mut hosts = vec![counts(1_000, 0); 9];
            hosts.push(counts(0, 1_000));
            hosts
        };
        let mut hosts = bad();
        let mut lengths = Vec::new();
        for _ in 0..12 {
            sweep(&config, &mut hosts, now);
            assert_eq!(ejected(&hosts), [9]);
            let since = now;
            // An ejected endpoint gets no calls.
            hosts[9].0 = Counts::default();
            while hosts[9].1.is_ejected() {
                now += config.interval;
                sweep(&config, &mut hosts, now);
            }
            lengths.push((now - since).as_secs());
            hosts[9].0 = bad()[9].0;
        }
        assert_eq!(lengths[..3], [30, 60, 90]);
        assert_eq!(lengths[11], 300);
        hosts[9].0 = counts(1_000, 0).0;
        for _ in 0..12 {
            sweep(&config, &mut hosts, now);
        }
        assert_eq!(hosts[9].1.multiplier, 0);
    }

    proptest! {
        #[test]
        fn at_most_the_configured_share_is_ejected_and_never_all(
            hosts in proptest::collection::vec((0..200_u64, 0..200_u64), 0..40),
            percent in 0..=100_u32,
            sweeps in 1..6_u64,
        ) {
            let config = OutlierDetection::new()
                .max_ejection_percent(percent)
                .success_rate(
                    SuccessRateEjection::new()
                        .stdev_factor(0)
                        .minimum_hosts(1)
                        .request_volume(1),
                )
                .failure_percentage(
                    FailurePercentageEjection::new()
                        .threshold(0)
                        .minimum_hosts(1)
                        .request_volume(1),
                );
            let mut hosts: Vec<_> = hosts.into_iter().map(|(s, f)| counts(s, f)).collect();
            let start = Instant::now();
            for sweep_number in 0..sweeps {
                sweep(&config, &mut hosts, start + Duration::from_secs(10 * sweep_number));
                let out = ejected(&hosts).len();
                prop_assert!(out < hosts.len() || out == 0);
                prop_assert!(out <= 1 || out * 100 <= hosts.len() * percent as usize);
            }
        }
    }
}
