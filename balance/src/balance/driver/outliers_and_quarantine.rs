//! Excludes endpoints from ordinary picks, either because too many of their calls failed (ejection), or because their responses are not
//! gRPC (quarantine). Such an endpoint gets calls only while no other endpoint is ready.

use std::sync::Arc;

use tokio::time::Instant;

use super::driver::Driver;
use super::endpoint_entry::EndpointEntry;
use crate::address::Address;

impl Driver {
    /// Runs the outlier detection on the calls since the last sweep.
    pub(super) fn detect_outliers(&mut self, now: Instant) {
        let entries = self.endpoints.values_mut();
        let mut hosts: Vec<_> = entries.map(EndpointEntry::sweep).collect();
        let ejections = self.detection.sweep(&mut hosts, now);
        if let Some(metrics) = &self.options.metrics {
            metrics.on_ejections(ejections.success_rate, ejections.failure_percentage);
        }
        let mut moved = Vec::new();
        for (entry, (counts, ejection)) in self.endpoints.values_mut().zip(hosts) {
            let address = entry.endpoint.address();
            let before = std::mem::replace(&mut entry.ejection, ejection);
            match (before.is_ejected(), ejection.is_ejected()) {
                (false, true) => {
                    tracing::warn!(%address, ?counts, "endpoint ejected: it fails far more calls than the other endpoints");
                }
                (true, false) => tracing::info!(%address, "endpoint is no longer ejected"),
                _ => continue,
            }
            moved.extend(entry.subchannels.iter().copied());
        }
        for id in moved {
            self.update_ready_set(id);
        }
    }

    /// Starts the quarantine of the endpoints that calls have reported.
    pub(super) fn quarantine_reported(&mut self) {
        let now = Instant::now();
        for endpoint in self.shared.take_not_grpc() {
            let address = endpoint.address();
            let Some(entry) = self.endpoints.get(address) else {
                continue;
            };
            // A report is ignored if it is about an old endpoint, whose address was removed and added again in the meantime. It is also
            // ignored if the endpoint has sent a gRPC response since the report.
            if !Arc::ptr_eq(&entry.endpoint, &endpoint) || endpoint.is_grpc() {
                continue;
            }
            if let Some(length) = self.quarantines.on_report(address, now) {
                tracing::warn!(%address, ?length, "endpoint is in quarantine: its responses are not gRPC");
                self.update_ready_sets(address);
                // A subset needs another endpoint in place of this one.
                self.reclassify(address);
            }
        }
    }

    /// Ends the quarantines that have expired. Their endpoints get ordinary picks again, on probation: the next response that is not gRPC
    /// starts a longer quarantine.
    pub(super) fn end_quarantines(&mut self, now: Instant) {
        let endpoints = &self.endpoints;
        let is_grpc = |address: &Address| {
            let entry = endpoints.get(address);
            entry.is_none_or(|entry| entry.endpoint.is_grpc())
        };
        for address in self.quarantines.on_time(now, is_grpc) {
            self.update_ready_sets(&address);
            self.reclassify(&address);
        }
    }
}
