//! Applies settings that change while the channel runs: the policy, the use of load reports, the traffic split of the service config, outlier
//! detection, the health check and the size of the subset. The connections to endpoints that the channel still uses stay open.

use std::sync::Arc;

use tokio::time::Instant;

use super::driver::Driver;
use super::endpoint_entry::EndpointEntry;
use super::outlier_schedule::OutlierSchedule;
use crate::balance::health_status::Health;
use crate::balance::load_weights::LoadReports;
use crate::balance::options::Reconfiguration;
use crate::balance::outlier::{Ejection, OutlierDetection};
use crate::balance::picker::{LbPolicy, Picker};
use crate::transport::health_client::HealthCheck;

impl Driver {
    /// Applies the settings that were requested since this function last ran.
    pub(super) fn reconfigure(&mut self) {
        let Some(settings) = self.shared.take_reconfiguration() else {
            return;
        };
        let Reconfiguration {
            policy,
            hash_header,
            split,
            load_reports,
            load_weights,
            outlier_detection,
            health_check,
            subset_size,
        } = settings;
        self.shared.set_hash_header(hash_header);
        self.shared.set_split_of_service_config(split);
        if policy != self.options.policy {
            tracing::info!(?policy, "the load-balancing policy changes");
        }
        if (policy, load_reports) != (self.options.policy, self.options.load_reports) {
            self.set_policy(policy, load_reports);
        }
        if load_weights != self.options.load_weights {
            self.set_load_weights(load_weights);
        }
        if outlier_detection != self.options.outlier_detection {
            self.set_outlier_detection(outlier_detection);
        }
        if health_check != self.options.health_check {
            self.set_health_check(health_check);
        }
        if subset_size != self.options.subset_size {
            tracing::info!(?subset_size, "the size of the subset changes");
            self.options.subset_size = subset_size;
            self.set_subset_size(subset_size);
        }
    }

    fn set_policy(&mut self, policy: LbPolicy, load_reports: bool) {
        self.options.policy = policy;
        self.options.load_reports = load_reports;
        self.shared.set_load_reports(load_reports);
        let picker = Picker::new(policy, self.options.seed).with_load_reports(load_reports);
        self.picker = Arc::new(picker);
        self.ready_sets.set_takes_turns(policy.takes_turns());
        self.selections.set_takes_turns(policy.takes_turns());
        let is_hashed = policy == LbPolicy::RingHash;
        self.ready_sets.set_hashed(is_hashed);
        self.selections.set_hashed(is_hashed);
        self.shared.set_uses_hashes(is_hashed);
        // The consistent hash ignores pushbacks.
        self.pushbacks.recheck(Instant::now());
        self.publication.now();
    }

    /// Replaces the settings of weights from load reports. If they were disabled, all endpoints have the weights of the registry until the next
    /// update.
    fn set_load_weights(&mut self, weights: Option<LoadReports>) {
        tracing::info!(
            enabled = weights.is_some(),
            "weights from load reports change"
        );
        self.reported_weights
            .set_config(weights.clone(), Instant::now());
        self.options.load_weights = weights;
        let addresses: Vec<_> = self.endpoints.keys().cloned().collect();
        for address in addresses {
            self.update_ready_sets(&address);
        }
    }

    /// Replaces outlier detection. If it is enabled, the first sweep ignores all calls up to now, whose age is unknown. If it is disabled, all
    /// ejections end, because no later sweep would end them.
    fn set_outlier_detection(&mut self, detection: Option<OutlierDetection>) {
        tracing::info!(enabled = detection.is_some(), "outlier detection changes");
        self.detection = OutlierSchedule::new(detection.clone(), Instant::now());
        let before = std::mem::replace(&mut self.options.outlier_detection, detection);
        if self.options.outlier_detection.is_some() {
            if before.is_none() {
                let entries = self.endpoints.values_mut();
                entries.for_each(EndpointEntry::discard_calls);
            }
            return;
        }
        let mut moved = Vec::new();
        for (address, entry) in &mut self.endpoints {
            if std::mem::take(&mut entry.ejection) != Ejection::default() {
                moved.push(address.clone());
            }
        }
        for address in moved {
            self.update_ready_sets(&address);
        }
    }

    /// Replaces the health watches of all connections. A connection keeps its health until its new watch reports one. Without a health
    /// check, all connections count as healthy.
    fn set_health_check(&mut self, check: Option<HealthCheck>) {
        tracing::info!(enabled = check.is_some(), "the health check changes");
        self.options.health_check = check;
        for (dial_id, id) in self.subchannels.connected() {
            let Some((address, subchannel)) = self.subchannels.ready(id) else {
                continue;
            };
            let (address, connection) = (address.clone(), Arc::clone(subchannel.connection()));
            let was_healthy = *subchannel.health() == Health::Serving;
            let watch = self.watch_health(dial_id, &connection);
            let Some((_, _, subchannel)) = self.subchannels.of_connection(dial_id) else {
                continue;
            };
            match watch {
                Some(watch) => subchannel.set_health_watch(watch),
                None => subchannel.end_health_watch(),
            }
            if !was_healthy && *subchannel.health() == Health::Serving {
                self.begin_weight(&address, Instant::now());
                self.update_ready_set(id);
                self.reclassify(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tower::discover::Change;

    use super::*;
    use crate::address::Address;
    use crate::attributes::Attributes;
    use crate::balance::FailurePercentageEjection;
    use crate::balance::endpoint::Blame;
    use crate::balance::options::Options;
    use crate::balance::shared::Shared;
    use crate::balance::updates::Batch;
    use crate::transport::connect::Connector;

    /// Returns a driver with two endpoints that were not dialled.
    fn driver() -> (Driver, [Address; 2]) {
        let options = Options::default();
        let connector = Arc::new(Connector::default());
        let shared = Arc::new(Shared::new(&options, Arc::clone(&connector)));
        let mut driver = Driver::new(shared, connector, options);
        let addresses = ["10.0.0.5:80", "10.0.0.6:80"].map(|text| text.parse().expect("valid"));
        for address in &addresses {
            insert(&mut driver, address, 0);
        }
        (driver, addresses)
    }

    fn insert(driver: &mut Driver, address: &Address, generation: u64) {
        let attributes = Attributes::new().with_generation(generation);
        let change: Result<_, std::io::Error> = Ok(Change::Insert(address.clone(), attributes));
        driver.on_batch(Batch {
            changes: vec![change],
            known: true,
        });
    }

    fn detection() -> OutlierDetection {
        let rule = FailurePercentageEjection::new()
            .threshold(50)
            .minimum_hosts(1)
            .request_volume(5);
        OutlierDetection::new()
            .max_ejection_percent(100)
            .without_success_rate()
            .failure_percentage(rule)
    }

    /// Records failed calls to an endpoint, and successful calls to the other one.
    fn call(driver: &Driver, failing: &Address) {
        for entry in driver.endpoints.values() {
            for _ in 0..20 {
                entry.endpoint.on_call();
                if entry.endpoint.address() == failing {
                    entry.endpoint.on_failure(Blame::Connection);
                }
            }
        }
    }

    fn is_ejected(driver: &mut Driver, address: &Address) -> bool {
        driver.detect_outliers(Instant::now());
        driver.endpoints[address].ejection.is_ejected()
    }

    #[tokio::test]
    async fn outlier_detection_that_is_enabled_later_judges_only_later_calls() {
        let (mut driver, [failing, _]) = driver();
        call(&driver, &failing);
        driver.set_outlier_detection(Some(detection()));
        assert!(!is_ejected(&mut driver, &failing));
        // Another change of its parameters discards nothing.
        call(&driver, &failing);
        driver.set_outlier_detection(Some(detection().max_ejection_percent(99)));
        assert!(is_ejected(&mut driver, &failing));
    }

    #[tokio::test]
    async fn a_new_generation_of_an_endpoint_is_not_judged_by_the_calls_of_the_old_one() {
        let (mut driver, [failing, _]) = driver();
        driver.set_outlier_detection(Some(detection()));
        call(&driver, &failing);
        insert(&mut driver, &failing, 1);
        assert!(!is_ejected(&mut driver, &failing));
        call(&driver, &failing);
        assert!(is_ejected(&mut driver, &failing));
    }
}
