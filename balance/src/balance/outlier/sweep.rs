//! The evaluation of the endpoints at the end of an interval.

use tokio::time::Instant;

use crate::metrics::EjectionCounts;

use super::config::{FailurePercentageEjection, OutlierDetection, SuccessRateEjection};

/// Counts of an endpoint's calls within an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::balance) struct Counts {
    pub(in crate::balance) successes: u64,
    pub(in crate::balance) failures: u64,
    /// Calls that overran their deadline.
    pub(in crate::balance) overruns: u64,
}

/// Whether an endpoint is ejected, and since when. The length of the ejection is `base_ejection_time` times `multiplier`, up to
/// `max_ejection_time`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::balance) struct Ejection {
    since: Option<Instant>,
    multiplier: u32,
}

impl Ejection {
    pub(in crate::balance) fn is_ejected(&self) -> bool {
        self.since.is_some()
    }

    fn eject(&mut self, now: Instant) {
        self.since = Some(now);
        self.multiplier = self.multiplier.saturating_add(1);
    }

    /// Returns true if the endpoint is ejected and the time of its ejection is over.
    fn is_over(&self, config: &OutlierDetection, now: Instant) -> bool {
        let longest = config.max_ejection_time.max(config.base_ejection_time);
        let time = config.base_ejection_time.saturating_mul(self.multiplier);
        self.since
            .is_some_and(|since| now.saturating_duration_since(since) >= time.min(longest))
    }
}

/// The ejections of one sweep, by the rule that has found the outlier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::balance) struct Ejections {
    pub(in crate::balance) success_rate: EjectionCounts,
    pub(in crate::balance) failure_percentage: EjectionCounts,
}

/// Evaluates the endpoints at the end of an interval: ejects outliers, and ends the ejections whose time is over.
pub(in crate::balance) fn sweep(
    config: &OutlierDetection,
    hosts: &mut [(Counts, Ejection)],
    now: Instant,
) -> Ejections {
    let mut ejections = Ejections::default();
    if let Some(rule) = &config.success_rate {
        ejections.success_rate = eject_by_success_rate(rule, config, hosts, now);
    }
    if let Some(rule) = &config.failure_percentage {
        ejections.failure_percentage = eject_by_failure_percentage(rule, config, hosts, now);
    }
    for (_, ejection) in hosts {
        if ejection.is_over(config, now) {
            ejection.since = None;
        } else if !ejection.is_ejected() {
            ejection.multiplier = ejection.multiplier.saturating_sub(1);
        }
    }
    ejections
}

/// Ejects the endpoints whose success rate is far below the mean.
#[expect(
    clippy::cast_precision_loss,
    reason = "the counts of calls within an interval are far below 2^53"
)]
fn eject_by_success_rate(
    rule: &SuccessRateEjection,
    config: &OutlierDetection,
    hosts: &mut [(Counts, Ejection)],
    now: Instant,
) -> EjectionCounts {
    let rate = |counts: &Counts| {
        let total = counts.successes + counts.failures + counts.overruns;
        (total >= rule.request_volume && total > 0).then(|| counts.successes as f64 / total as f64)
    };
    let rates: Vec<_> = hosts
        .iter()
        .filter_map(|(counts, _)| rate(counts))
        .collect();
    if rates.len() < rule.minimum_hosts.max(1) {
        return EjectionCounts::default();
    }
    let mean = rates.iter().sum::<f64>() / rates.len() as f64;
    let variance = rates.iter().map(|rate| (rate - mean).powi(2)).sum::<f64>() / rates.len() as f64;
    let threshold = mean - variance.sqrt() * (f64::from(rule.stdev_factor) / 1_000.0);
    eject_where(config, rule.enforcement_percentage, hosts, now, |counts| {
        rate(counts).is_some_and(|rate| rate < threshold)
    })
}

/// Ejects the endpoints that fail too large a part of their calls.
fn eject_by_failure_percentage(
    rule: &FailurePercentageEjection,
    config: &OutlierDetection,
    hosts: &mut [(Counts, Ejection)],
    now: Instant,
) -> EjectionCounts {
    let total = |counts: &Counts| counts.successes + counts.failures;
    let has_volume = |counts: &Counts| total(counts) >= rule.request_volume.max(1);
    let with_volume = hosts.iter().filter(|(counts, _)| has_volume(counts));
    if with_volume.count() < rule.minimum_hosts {
        return EjectionCounts::default();
    }
    eject_where(config, rule.enforcement_percentage, hosts, now, |counts| {
        has_volume(counts) && counts.failures * 100 > u64::from(rule.threshold) * total(counts)
    })
}

/// Ejects the outliers with the probability `enforcement`, in percent, as long as enough endpoints remain.
fn eject_where(
    config: &OutlierDetection,
    enforcement: u32,
    hosts: &mut [(Counts, Ejection)],
    now: Instant,
    is_outlier: impl Fn(&Counts) -> bool,
) -> EjectionCounts {
    let mut count = EjectionCounts::default();
    let all = hosts.len();
    let mut ejected = hosts.iter().filter(|(_, e)| e.is_ejected()).count();
    for (counts, ejection) in hosts {
        // The first ejection is allowed whatever the percentage is, because 10 % of a small set would be less than one endpoint. The last
        // endpoint that is not ejected is never ejected.
        let within =
            ejected == 0 || (ejected + 1) * 100 <= all * config.max_ejection_percent as usize;
        if ejection.is_ejected() || !is_outlier(counts) {
            continue;
        }
        if enforcement < 100 && fastrand::u32(..100) >= enforcement {
            count.by_chance += 1;
        } else if within && ejected + 1 < all {
            ejection.eject(now);
            ejected += 1;
            count.enforced += 1;
        } else {
            count.overflow += 1;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
    fn a_rule_is_enforced_with_its_probability() {
        let enforced = |percent| {
            let rule = SuccessRateEjection::new().enforcement_percentage(percent);
            let config = OutlierDetection::new()
                .without_failure_percentage()
                .success_rate(rule);
            let ejections = (0..300).map(|_| {
                let mut hosts = vec![counts(1_000, 1); 9];
                hosts.push(counts(700, 300));
                let swept = sweep(&config, &mut hosts, Instant::now()).success_rate;
                assert_eq!(swept.enforced + swept.by_chance, 1);
                swept.enforced
            });
            ejections.sum::<u64>()
        };
        assert_eq!((enforced(0), enforced(100)), (0, 300));
        // The standard deviation is below 9.
        assert!((100..=200).contains(&enforced(50)));
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
    fn an_endpoint_that_fails_nearly_all_calls_is_ejected_even_if_the_others_fail_often() {
        let config = OutlierDetection::new().without_success_rate();
        let mut hosts = vec![counts(20, 80), counts(20, 80), counts(10, 90)];
        hosts.extend([counts(20, 80), counts(15, 85)]);
        sweep(&config, &mut hosts, Instant::now());
        assert_eq!(ejected(&hosts), [2], "exactly 85 % must not eject");
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
