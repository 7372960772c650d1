//! Endpoints whose answers are not gRPC responses, such as error pages of a proxy or answers of another server at the address.
//!
//! Such endpoints answer quickly, so latency-based picking prefers them although every call fails. They are removed from the set for a
//! while and then tried again; the interval grows each time. If all endpoints are like that, calls use them nevertheless.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::driver::Driver;
use super::quarantine::Quarantine;

impl Driver {
    /// Removes the endpoints that calls have reported from the primary set.
    pub(super) fn isolate_foreign(&mut self) {
        let reported = std::mem::take(&mut *self.shared.foreign());
        let now = Instant::now();
        for endpoint in reported {
            let address = endpoint.address();
            let Some(entry) = self.endpoints.get_mut(address) else {
                continue;
            };
            // The address may have been removed and added again. The report is then about the old endpoint.
            if !Arc::ptr_eq(&entry.endpoint, &endpoint) {
                continue;
            }
            // Several calls in flight may report the same endpoint, some of them after it was quarantined.
            let is_out = entry
                .quarantine
                .is_some_and(|quarantine| !quarantine.is_over());
            if is_out || endpoint.is_grpc() {
                continue;
            }
            let length = entry.quarantine.map_or(FIRST, |before| before.length * 2);
            let length = length.min(LONGEST);
            entry.quarantine = Some(Quarantine {
                until: Some(now + length),
                length,
            });
            tracing::warn!(%address, ?length, "endpoint does not answer with gRPC: no calls for a while");
            self.quarantined.push(address.clone());
            for id in entry.subchannels.clone() {
                self.update_ready_set(id);
            }
        }
    }

    /// Returns endpoints whose quarantine has expired to the set, on probation.
    pub(super) fn try_foreign(&mut self, now: Instant) {
        for address in std::mem::take(&mut self.quarantined) {
            let Some(entry) = self.endpoints.get_mut(&address) else {
                continue;
            };
            let Some(quarantine) = &mut entry.quarantine else {
                continue;
            };
            match quarantine.until {
                Some(until) if until > now => self.quarantined.push(address),
                Some(_) => {
                    quarantine.until = None;
                    for id in entry.subchannels.clone() {
                        self.update_ready_set(id);
                    }
                    self.quarantined.push(address);
                }
                // A gRPC answer has ended the probation.
                None if entry.endpoint.is_grpc() => entry.quarantine = None,
                None => self.quarantined.push(address),
            }
        }
    }
}

/// The first quarantine: usually longer than a server behind a proxy needs for a restart.
const FIRST: Duration = Duration::from_secs(1);
/// The longest quarantine. gRFC A50's ejections grow up to five minutes; here each probation costs only one call or a few.
const LONGEST: Duration = Duration::from_secs(30);
