//! The computation of weights from load reports.

use tokio::time::Instant;

use super::config::LoadReports;
use crate::load_report::LoadReport;

/// The uninterrupted reports of one endpoint.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Series {
    /// The time of the first report. `None` if there is no report, or if the last one has expired.
    since: Option<Instant>,
}

impl Series {
    /// Returns the weight of the endpoint at `now`, or `None` if it has none that can be used. `last`: the last report from which a weight
    /// can be computed.
    pub(crate) fn weight(
        &mut self,
        last: Option<&LoadReport>,
        now: Instant,
        config: &LoadReports,
    ) -> Option<f64> {
        let age = |since| now.saturating_duration_since(since);
        let is_fresh =
            |report: &&LoadReport| age(report.received_at()) < config.weight_expiration_period;
        let Some(report) = last.filter(is_fresh) else {
            self.since = None;
            return None;
        };
        let since = *self.since.get_or_insert(report.received_at());
        if age(since) < config.blackout_period {
            return None;
        }
        weight(report, config.error_utilization_penalty)
    }
}

/// Returns whether a weight can be computed from a report.
pub(crate) fn has_weight(report: &LoadReport) -> bool {
    report.utilization().is_some() && report.requests_per_second().is_some()
}

/// Returns the weight of a report: the calls per second that the server would serve at full utilization. Failed calls count as utilization.
fn weight(report: &LoadReport, error_utilization_penalty: f64) -> Option<f64> {
    let (utilization, requests) = (report.utilization()?, report.requests_per_second()?);
    let errors = report.errors_per_second().unwrap_or_default() / requests;
    let weight = requests / (utilization + errors * error_utilization_penalty);
    (weight.is_finite() && weight > 0.0).then_some(weight)
}

/// Converts the weights of all endpoints to integers from 1 to [`MAX_FACTOR`] in the same proportion. An endpoint without a weight gets the
/// mean of the others. Returns `None` if fewer than two endpoints have a weight, because there is nothing to compare then.
///
/// The flag of an endpoint is true if it gets ordinary picks. The scale depends only on such endpoints, because a server whose calls all fail at
/// once seems to have a large capacity. No weight counts as more than [`MAX_RATIO`] times the median, so that the absurd report of one server
/// does not round the weights of all others to 1.
pub(crate) fn factors(weights: &[(Option<f64>, bool)]) -> Option<Vec<u32>> {
    let ordinary = weights.iter().filter(|(_, is_ordinary)| *is_ordinary);
    let mut ordinary: Vec<f64> = ordinary.filter_map(|(weight, _)| *weight).collect();
    let number = ordinary.len();
    if number < 2 {
        return None;
    }
    ordinary.sort_by(f64::total_cmp);
    let (lower, upper) = (ordinary.get((number - 1) / 2)?, ordinary.get(number / 2)?);
    let limit = (lower / 2.0 + upper / 2.0) * MAX_RATIO;
    let known = || ordinary.iter().map(|weight| weight.min(limit));
    let largest = known().fold(f64::MIN_POSITIVE, f64::max);
    // The quotients are at most 1, so their sum is finite, however large the weights are.
    #[expect(
        clippy::cast_precision_loss,
        reason = "a set has far fewer than 2^52 endpoints"
    )]
    let mean = known().map(|weight| weight / largest).sum::<f64>() / number as f64;
    let factor = |(weight, _): &(Option<f64>, bool)| {
        let share = weight.map_or(mean, |weight| weight.min(largest) / largest);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share is between 0 and 1"
        )]
        let factor = (share * f64::from(MAX_FACTOR)).round() as u32;
        factor.max(1)
    };
    Some(weights.iter().map(factor).collect())
}

/// The factor of the endpoint with the largest weight. grpc-go scales weights to 65 535. This number is smaller, because it is multiplied by
/// the weight of the endpoint, and by the factors of slow start and of the zone.
const MAX_FACTOR: u32 = 1_000;
/// The largest weight as a multiple of the median. Servers of one service rarely differ more.
const MAX_RATIO: f64 = 10.0;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::load_report::OrcaLoadReport;

    fn at(message: &OrcaLoadReport, now: Instant) -> LoadReport {
        LoadReport::decode(&message.encode_to_vec(), now).expect("a report")
    }

    fn message(application: f64, cpu: f64, requests: f64, errors: f64) -> OrcaLoadReport {
        OrcaLoadReport {
            application_utilization: application,
            cpu_utilization: cpu,
            rps_fractional: requests,
            eps: errors,
            ..OrcaLoadReport::default()
        }
    }

    fn near(left: Option<f64>, right: f64) -> bool {
        left.is_some_and(|left| (left - right).abs() <= right * 1e-9)
    }

    /// The numbers of the tests of grpc-go.
    #[test]
    fn a_weight_is_the_calls_per_second_divided_by_the_utilization() {
        let now = Instant::now();
        let of = |application, cpu, requests, errors, penalty| {
            weight(
                &at(&message(application, cpu, requests, errors), now),
                penalty,
            )
        };
        assert!(near(of(0.0, 1.0, 10.0, 0.0, 1.0), 10.0));
        assert!(near(of(0.0, 0.1, 100.0, 0.0, 1.0), 1_000.0));
        // The utilization of the application is preferred to that of the CPU.
        assert!(near(of(0.5, 2.0, 10.0, 0.0, 1.0), 20.0));
        // A tenth of the calls fail, so 0.1 times the penalty is added to the utilization.
        assert!(near(of(0.9, 0.0, 10.0, 1.0, 1.0), 10.0));
        assert!(near(of(0.9, 0.0, 10.0, 1.0, 0.0), 10.0 / 0.9));
        assert!(near(of(0.0, 0.9, 10.0, 1.0, 11.0), 5.0));
    }

    #[test]
    fn a_report_without_utilization_or_without_calls_has_no_weight() {
        let now = Instant::now();
        for message in [
            message(0.0, 0.0, 10.0, 0.0),
            message(0.5, 0.5, 0.0, 0.0),
            message(f64::NAN, -1.0, 10.0, 0.0),
            message(0.5, 0.0, f64::INFINITY, 0.0),
        ] {
            let report = at(&message, now);
            assert!(!has_weight(&report));
            assert_eq!(weight(&report, 1.0), None);
        }
        let overflowing = at(&message(f64::MIN_POSITIVE, 0.0, f64::MAX, 0.0), now);
        assert_eq!(weight(&overflowing, 1.0), None);
    }

    #[test]
    fn a_weight_is_used_after_the_blackout_and_until_it_expires() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let report = |seconds| at(&message(0.5, 0.0, 10.0, 0.0), after(seconds));
        let config = LoadReports::new();
        let mut series = Series::default();
        assert_eq!(series.weight(None, start, &config), None);
        assert_eq!(series.weight(Some(&report(1)), after(1), &config), None);
        assert_eq!(series.weight(Some(&report(9)), after(10), &config), None);
        let used = series.weight(Some(&report(10)), after(11), &config);
        assert!(near(used, 20.0), "ten seconds have passed");
        let used = series.weight(Some(&report(10)), after(189), &config);
        assert!(near(used, 20.0), "the report is not yet three minutes old");
        let expired = series.weight(Some(&report(10)), after(190), &config);
        assert_eq!(expired, None);
        // The blackout applies again.
        let fresh = series.weight(Some(&report(200)), after(201), &config);
        assert_eq!(fresh, None);
        assert!(near(
            series.weight(Some(&report(209)), after(210), &config),
            20.0
        ));
    }

    #[test]
    fn without_a_blackout_the_first_report_is_used() {
        let now = Instant::now();
        let config = LoadReports::new().blackout_period(Duration::ZERO);
        let report = at(&message(0.5, 0.0, 10.0, 0.0), now);
        let weight = Series::default().weight(Some(&report), now, &config);
        assert!(near(weight, 20.0));
    }

    /// Returns the factors of endpoints that all get ordinary picks.
    fn factors(weights: &[Option<f64>]) -> Option<Vec<u32>> {
        let ordinary: Vec<_> = weights.iter().map(|weight| (*weight, true)).collect();
        super::factors(&ordinary)
    }

    #[test]
    fn an_absurd_weight_does_not_flatten_the_others() {
        let weights = [Some(10.0), Some(1e12), Some(20.0), Some(20.0)];
        assert_eq!(factors(&weights), Some(vec![50, 1_000, 100, 100]));
    }

    #[test]
    fn a_penalty_is_a_finite_number() {
        let now = Instant::now();
        let report = at(&message(0.5, 0.0, 10.0, 0.0), now);
        for (penalty, used) in [
            (f64::INFINITY, 1e6),
            (f64::NAN, 0.0),
            (-1.0, 0.0),
            (2.0, 2.0),
        ] {
            let config = LoadReports::new()
                .blackout_period(Duration::ZERO)
                .error_utilization_penalty(penalty);
            assert!(config.error_utilization_penalty.total_cmp(&used).is_eq());
            let weight = Series::default().weight(Some(&report), now, &config);
            assert!(near(weight, 20.0), "no call fails");
        }
    }

    #[test]
    fn endpoints_without_a_weight_get_the_mean_of_the_others() {
        let weights = [Some(10.0), None, Some(30.0), None];
        assert_eq!(factors(&weights), Some(vec![333, 667, 1_000, 667]));
        let far_apart = [Some(f64::MAX), Some(f64::MIN_POSITIVE)];
        assert_eq!(factors(&far_apart), Some(vec![1_000, 1]));
    }

    #[test]
    fn with_fewer_than_two_weights_there_are_no_factors() {
        assert_eq!(factors(&[]), None);
        assert_eq!(factors(&[None, None]), None);
        assert_eq!(factors(&[Some(10.0), None, None]), None);
    }

    proptest! {
        #[test]
        fn factors_are_in_proportion_to_the_weights(
            weights in proptest::collection::vec(proptest::option::of(100.0..1_000.0_f64), 0..20),
        ) {
            let known = weights.iter().flatten().count();
            let factors = factors(&weights);
            prop_assert_eq!(factors.is_some(), known >= 2);
            let largest = weights.iter().flatten().copied().fold(0.0, f64::max);
            for (weight, factor) in weights.iter().zip(factors.unwrap_or_default()) {
                prop_assert!((1..=MAX_FACTOR).contains(&factor));
                if let Some(weight) = weight {
                    let exact = weight / largest * f64::from(MAX_FACTOR);
                    prop_assert!((f64::from(factor) - exact).abs() <= 0.5);
                }
            }
        }
    }
}
