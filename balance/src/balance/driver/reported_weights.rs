//! Weights from load reports: the factor of each endpoint's weight, and when the factors are computed again.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;

use crate::address::Address;
use crate::balance::load_weights::{LoadReports, Series, factors};
use crate::load_report::LoadReport;

/// The factors by which the weights of endpoints are multiplied.
#[derive(Debug)]
pub(super) struct ReportedWeights {
    /// `None` if no weights are computed from load reports.
    config: Option<LoadReports>,
    update_at: Option<Instant>,
    series: HashMap<Address, Series>,
    /// The factors as of the last update. Empty if fewer than two endpoints had a weight.
    factors: HashMap<Address, u32>,
    /// The factor of an endpoint that has become ready since the last update.
    mean: u32,
}

impl ReportedWeights {
    pub(super) fn new(config: Option<LoadReports>, now: Instant) -> Self {
        let update_at = config.as_ref().map(|config| now + config.update_period());
        Self {
            config,
            update_at,
            series: HashMap::new(),
            factors: HashMap::new(),
            mean: 1,
        }
    }

    /// Replaces the settings. If there were some, the weights stay until the next update: the reports of the servers are still known, so no
    /// endpoint needs another blackout period.
    pub(super) fn set_config(&mut self, config: Option<LoadReports>, now: Instant) {
        let (Some(_), Some(after)) = (&self.config, &config) else {
            *self = Self::new(config, now);
            return;
        };
        let update_at = now + after.update_period();
        self.update_at = Some(self.update_at.map_or(update_at, |at| at.min(update_at)));
        self.config = config;
    }

    /// Returns the time of the next update.
    pub(super) fn next(&self) -> Option<Instant> {
        self.update_at
    }

    /// Returns whether an update is due, and schedules the next one.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        let is_due = self.update_at.is_some_and(|at| at <= now);
        if is_due {
            let config = self.config.as_ref();
            self.update_at = config.map(|config| now + config.update_period());
        }
        is_due
    }

    /// Returns the factor for the weight of an endpoint.
    pub(super) fn factor(&self, address: &Address) -> u32 {
        if self.factors.is_empty() {
            return 1;
        }
        self.factors.get(address).copied().unwrap_or(self.mean)
    }

    /// Starts the blackout period of an endpoint again, or forgets an endpoint that was removed.
    pub(super) fn forget(&mut self, address: &Address) {
        self.series.remove(address);
    }

    /// Computes the factors from the last report of each ready endpoint. Returns the endpoints whose factor has changed. The flag of an
    /// endpoint is true if it gets ordinary picks. The others are not compared with, unless there are only such endpoints.
    pub(super) fn update(
        &mut self,
        endpoints: Vec<(Address, bool, Option<Arc<LoadReport>>)>,
        now: Instant,
    ) -> Vec<Address> {
        let Some(config) = &self.config else {
            return Vec::new();
        };
        let none_is_ordinary = endpoints.iter().all(|(_, is_ordinary, _)| !is_ordinary);
        let mut weights = Vec::with_capacity(endpoints.len());
        for (address, is_ordinary, report) in &endpoints {
            // An endpoint without a report needs no entry.
            let weight = report.as_ref().and_then(|report| {
                let series = self.series.entry(address.clone()).or_default();
                series.weight(Some(report), now, config)
            });
            weights.push((weight, *is_ordinary || none_is_ordinary));
        }
        let before: Vec<_> = endpoints
            .iter()
            .map(|(address, ..)| self.factor(address))
            .collect();
        let factors = factors(&weights).unwrap_or_default();
        let without_weight = weights.iter().position(|(weight, _)| weight.is_none());
        self.mean = without_weight
            .and_then(|index| factors.get(index).copied())
            .unwrap_or_else(|| {
                let ordinary = factors.iter().zip(&weights).filter(|(_, (_, is))| *is);
                let ordinary: Vec<_> = ordinary.map(|(factor, _)| *factor).collect();
                mean(&ordinary)
            });
        self.factors = endpoints
            .iter()
            .zip(factors)
            .map(|((address, ..), factor)| (address.clone(), factor))
            .collect();
        let changed = endpoints.into_iter().zip(before);
        changed
            .filter(|((address, ..), before)| self.factor(address) != *before)
            .map(|((address, ..), _)| address)
            .collect()
    }
}

/// Returns the mean of the factors; 1 if there are none.
fn mean(factors: &[u32]) -> u32 {
    let sum: u64 = factors.iter().copied().map(u64::from).sum();
    let mean = sum.checked_div(u64::try_from(factors.len()).unwrap_or(u64::MAX));
    mean.and_then(|mean| u32::try_from(mean).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prost::Message;

    use super::*;
    use crate::load_report::OrcaLoadReport;

    fn address(port: u32) -> Address {
        format!("10.0.0.5:{port}").parse().expect("a valid address")
    }

    /// Returns a report of a server that serves 100 calls per second.
    fn report(utilization: f64, now: Instant) -> Option<Arc<LoadReport>> {
        let message = OrcaLoadReport {
            application_utilization: utilization,
            rps_fractional: 100.0,
            ..OrcaLoadReport::default()
        };
        LoadReport::decode(&message.encode_to_vec(), now).map(Arc::new)
    }

    fn weights(now: Instant) -> ReportedWeights {
        let config = LoadReports::new().blackout_period(Duration::ZERO);
        ReportedWeights::new(Some(config), now)
    }

    #[test]
    fn factors_follow_the_reports_and_only_changes_are_returned() {
        let now = Instant::now();
        let mut weights = weights(now);
        let endpoints = |second| {
            vec![
                (address(1), true, report(0.2, now)),
                (address(2), true, report(second, now)),
                (address(3), true, None),
            ]
        };
        assert_eq!(weights.factor(&address(1)), 1);
        let changed = weights.update(endpoints(0.8), now);
        assert_eq!(changed, [address(1), address(2), address(3)]);
        let factors = [1, 2, 3, 4].map(|port| weights.factor(&address(port)));
        assert_eq!(factors, [1_000, 250, 625, 625]);
        assert!(weights.update(endpoints(0.8), now).is_empty());
        let changed = weights.update(endpoints(0.4), now);
        assert_eq!(changed, [address(2), address(3)]);
    }

    #[test]
    fn with_the_reports_of_only_one_endpoint_all_factors_are_one() {
        let now = Instant::now();
        let mut weights = weights(now);
        weights.update(
            vec![
                (address(1), true, report(0.2, now)),
                (address(2), true, report(0.8, now)),
            ],
            now,
        );
        let left = vec![
            (address(1), true, report(0.2, now)),
            (address(2), true, None),
        ];
        let changed = weights.update(left, now);
        assert_eq!(changed, [address(1), address(2)]);
        assert_eq!(weights.factor(&address(2)), 1);
    }

    #[test]
    fn an_update_is_due_once_per_period() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut weights = weights(now);
        assert!(!weights.take_due(now));
        assert!(weights.take_due(at(1)));
        assert!(!weights.take_due(at(1)));
        assert_eq!(weights.next(), Some(at(2)));
        let mut disabled = ReportedWeights::new(None, now);
        assert!(!disabled.take_due(at(60)));
        assert_eq!(disabled.next(), None);
        let changed = disabled.update(vec![(address(1), true, report(0.5, now))], now);
        assert!(changed.is_empty());
    }

    #[test]
    fn a_forgotten_endpoint_has_a_new_blackout_period() {
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        let mut weights = ReportedWeights::new(Some(LoadReports::new()), now);
        let endpoints = |utilization, seconds| {
            vec![
                (address(1), true, report(0.2, after(seconds))),
                (address(2), true, report(utilization, after(seconds))),
            ]
        };
        weights.update(endpoints(0.8, 0), now);
        assert_eq!(weights.factor(&address(2)), 1);
        weights.update(endpoints(0.8, 10), after(10));
        assert_eq!(weights.factor(&address(2)), 250);
        weights.forget(&address(2));
        weights.update(endpoints(0.8, 11), after(11));
        assert_eq!(weights.factor(&address(2)), 1);
    }

    #[test]
    fn new_settings_start_no_new_blackout_period() {
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        let mut weights = ReportedWeights::new(Some(LoadReports::new()), now);
        let endpoints = |seconds| {
            vec![
                (address(1), true, report(0.2, after(seconds))),
                (address(2), true, report(0.8, after(seconds))),
            ]
        };
        weights.update(endpoints(0), now);
        weights.update(endpoints(10), after(10));
        assert!(weights.take_due(after(10)));
        let slower = LoadReports::new().weight_update_period(Duration::from_secs(60));
        weights.set_config(Some(slower), after(10));
        assert_eq!(weights.factor(&address(2)), 250);
        assert_eq!(
            weights.next(),
            Some(after(11)),
            "the update must not be late"
        );
        assert!(weights.update(endpoints(11), after(11)).is_empty());
        assert_eq!(weights.factor(&address(2)), 250);
        weights.set_config(None, after(12));
        assert_eq!((weights.factor(&address(2)), weights.next()), (1, None));
    }

    #[test]
    fn an_endpoint_without_ordinary_picks_does_not_determine_the_factors_of_the_others() {
        let now = Instant::now();
        let mut weights = weights(now);
        let endpoints = |is_ordinary| {
            vec![
                (address(1), true, report(0.2, now)),
                (address(2), true, report(0.4, now)),
                // This server seems to have 8 times the capacity, because its calls fail at once.
                (address(3), is_ordinary, report(0.025, now)),
            ]
        };
        weights.update(endpoints(true), now);
        let factors =
            |weights: &ReportedWeights| [1, 2, 3, 4].map(|port| weights.factor(&address(port)));
        assert_eq!(factors(&weights), [125, 63, 1_000, 396]);
        weights.update(endpoints(false), now);
        assert_eq!(factors(&weights), [1_000, 500, 1_000, 750]);
        // If there are only such endpoints, they are compared with each other.
        let last_resorts = endpoints(false).into_iter();
        let last_resorts = last_resorts.map(|(address, _, report)| (address, false, report));
        weights.update(last_resorts.collect(), now);
        assert_eq!(factors(&weights), [125, 63, 1_000, 396]);
    }
}
