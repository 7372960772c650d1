//! Applies settings that change while the channel runs: the policy, the use of load reports, outlier detection and the health check.
//! Connections stay open.

use std::sync::Arc;

use tokio::time::Instant;

use super::driver::Driver;
use super::outlier_schedule::OutlierSchedule;
use super::reported_weights::ReportedWeights;
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
            load_reports,
            load_weights,
            outlier_detection,
            health_check,
        } = settings;
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
    }

    fn set_policy(&mut self, policy: LbPolicy, load_reports: bool) {
        self.options.policy = policy;
        self.options.load_reports = load_reports;
        self.shared.set_load_reports(load_reports);
        let picker = Picker::new(policy, self.options.seed).with_load_reports(load_reports);
        self.picker = Arc::new(picker);
        self.ready_sets.set_takes_turns(policy.takes_turns());
        self.selections.set_takes_turns(policy.takes_turns());
        self.shared.set_uses_hashes(policy == LbPolicy::RingHash);
        self.publication.now();
    }

    /// Replaces the settings of weights from load reports. All endpoints have the weights of the registry until the next update.
    fn set_load_weights(&mut self, weights: Option<LoadReports>) {
        tracing::info!(
            enabled = weights.is_some(),
            "weights from load reports change"
        );
        self.reported_weights = ReportedWeights::new(weights.clone(), Instant::now());
        self.options.load_weights = weights;
        let addresses: Vec<_> = self.endpoints.keys().cloned().collect();
        for address in addresses {
            self.update_ready_sets(&address);
        }
    }

    /// Replaces outlier detection. If it is disabled, all ejections end, because no later sweep would end them.
    fn set_outlier_detection(&mut self, detection: Option<OutlierDetection>) {
        tracing::info!(enabled = detection.is_some(), "outlier detection changes");
        self.detection = OutlierSchedule::new(detection.clone(), Instant::now());
        self.options.outlier_detection = detection;
        if self.options.outlier_detection.is_some() {
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
