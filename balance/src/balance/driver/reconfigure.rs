//! Applies settings that change while the channel runs: the policy, outlier detection, the health check and the size of the subset. The
//! connections to endpoints that the channel still uses stay open.

use std::sync::Arc;

use tokio::time::Instant;

use super::driver::Driver;
use super::outlier_schedule::OutlierSchedule;
use crate::balance::health_status::Health;
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
            outlier_detection,
            health_check,
            subset_size,
        } = settings;
        if policy != self.options.policy {
            self.set_policy(policy);
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

    fn set_policy(&mut self, policy: LbPolicy) {
        tracing::info!(?policy, "the load-balancing policy changes");
        self.options.policy = policy;
        self.picker = Arc::new(Picker::new(policy, self.options.seed));
        self.ready_sets.set_takes_turns(policy.takes_turns());
        self.selections.set_takes_turns(policy.takes_turns());
        self.shared.set_uses_hashes(policy == LbPolicy::RingHash);
        self.publication.now();
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
                self.begin_slow_start(&address, Instant::now());
                self.update_ready_set(id);
                self.reclassify(&address);
            }
        }
    }
}
