//! Excludes endpoints from ordinary picks: because too many of their calls failed (ejection), because their responses are not gRPC
//! (quarantine), or because their servers request a wait (pushback). Such an endpoint gets calls only while no other endpoint is ready.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::time::Instant;

use super::driver::Driver;
use super::endpoint_entry::EndpointEntry;
use super::pushbacks::take_effect;
use super::subchannel_table::SubchannelId;
use crate::address::Address;
use crate::balance::endpoint_status::EjectionReason;
use crate::balance::health_status::Health;
use crate::balance::picker::LbPolicy;

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

    /// Adds the pushbacks that calls have reported.
    pub(super) fn add_pushbacks(&mut self) {
        let now = Instant::now();
        for endpoint in self.shared.take_pushed_back() {
            let address = endpoint.address();
            let entry = self.endpoints.get(address);
            let is_current = entry.is_some_and(|entry| Arc::ptr_eq(&entry.endpoint, &endpoint));
            if let Some(end) = endpoint.current_pushback(now).filter(|_| is_current) {
                self.pushbacks.add(address, end, now);
            }
        }
    }

    /// Decides which endpoints get no ordinary calls because of a pushback.
    pub(super) fn check_pushbacks(&mut self, now: Instant) {
        let before = std::mem::take(&mut self.pushed_back);
        let endpoints = &self.endpoints;
        let end = |address: &Address| {
            let entry = endpoints.get(address)?;
            entry.endpoint.current_pushback(now)
        };
        let mut after = self.pushbacks.check(now, end);
        // The consistent hash has a bound on the load of each server, and moving all keys of a server costs the others more than its calls.
        let is_hashed = self.options.policy == LbPolicy::RingHash;
        if is_hashed || !self.pushbacks_take_effect(&after, !before.is_empty(), now) {
            after.clear();
        }
        for address in before.union(&after) {
            let is_pushed_back = after.contains(address);
            let Some(entry) = self.endpoints.get_mut(address) else {
                continue;
            };
            if std::mem::replace(&mut entry.is_pushed_back, is_pushed_back) != is_pushed_back {
                tracing::debug!(%address, is_pushed_back, "the pushback of an endpoint has begun or ended");
                self.update_ready_sets(address);
            }
        }
        self.pushed_back = after;
    }

    /// Returns whether the pushbacks of these endpoints take effect. Endpoints that are excluded for another reason do not count.
    fn pushbacks_take_effect(
        &self,
        addresses: &HashSet<Address>,
        took_effect: bool,
        now: Instant,
    ) -> bool {
        if addresses.is_empty() {
            return false;
        }
        let (mut pushed_back, mut all) = (0_u64, 0_u64);
        for (address, entry) in &self.endpoints {
            if self.is_ordinary(entry) {
                let weight = u64::from(self.current_weight(entry, now).max(1));
                all += weight;
                if addresses.contains(address) {
                    pushed_back += weight;
                }
            }
        }
        take_effect(pushed_back, all, took_effect)
    }

    /// Returns whether calls pick the endpoint, or would pick it if it had sent no pushback.
    fn is_ordinary(&self, entry: &EndpointEntry) -> bool {
        let is_excluded = !matches!(
            self.ejection_reason(entry),
            None | Some(EjectionReason::Pushback)
        );
        let answers = |id: &SubchannelId| {
            let ready = self.subchannels.ready(*id);
            ready.is_some_and(|(_, subchannel)| {
                *subchannel.health() == Health::Serving && !subchannel.is_stalled()
            })
        };
        !is_excluded && !entry.attributes.is_last_resort() && entry.subchannels.iter().any(answers)
    }
}
