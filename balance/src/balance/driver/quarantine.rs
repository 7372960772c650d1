//! Quarantine of endpoints whose answers are not gRPC responses, such as error pages of a proxy, or answers of a different server at the
//! address.
//!
//! Such endpoints answer quickly, so latency-based picking would prefer them although every call fails. They are moved to the last-resort
//! set for a while, the *quarantine*. Then they get ordinary picks again, on *probation*. If an answer on probation is not gRPC, the next
//! quarantine is twice as long, up to a limit. If all endpoints are in quarantine, calls still use them.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::address::Address;

/// The endpoints that are in quarantine or on probation.
#[derive(Debug, Default)]
pub(super) struct Quarantines(HashMap<Address, Quarantine>);

#[derive(Clone, Copy, Debug)]
struct Quarantine {
    /// The end of the quarantine; `None` on probation. On probation, the next answer that is not gRPC starts a longer quarantine, and a
    /// gRPC answer ends the probation.
    until: Option<Instant>,
    length: Duration,
}

impl Quarantines {
    /// Handles a report about an endpoint that does not answer with gRPC. Starts a quarantine and returns its length. Returns `None` if the
    /// endpoint is already in quarantine: several calls that were in flight can report the same endpoint.
    pub(super) fn on_report(&mut self, address: &Address, now: Instant) -> Option<Duration> {
        if self.is_quarantined(address) {
            return None;
        }
        let before = self.0.get(address);
        let length = before.map_or(FIRST, |before| before.length * 2);
        let length = length.min(LONGEST);
        let quarantine = Quarantine {
            until: Some(now + length),
            length,
        };
        self.0.insert(address.clone(), quarantine);
        Some(length)
    }

    /// Returns whether any endpoint is in quarantine or on probation.
    pub(super) fn is_waiting(&self) -> bool {
        !self.0.is_empty()
    }

    /// Returns whether the endpoint is in quarantine, which excludes it from ordinary picks. Returns false on probation.
    pub(super) fn is_quarantined(&self, address: &Address) -> bool {
        let quarantine = self.0.get(address);
        quarantine.is_some_and(|quarantine| quarantine.until.is_some())
    }

    /// Returns whether the endpoint is in quarantine or on probation, so its last answers were not gRPC.
    pub(super) fn is_doubted(&self, address: &Address) -> bool {
        self.0.contains_key(address)
    }

    pub(super) fn forget(&mut self, address: &Address) {
        self.0.remove(address);
    }

    /// Ends the quarantines that have expired, and the probation of each endpoint whose last answer was gRPC. Returns the endpoints of both.
    /// Those whose quarantine has expired are on probation from now on. `is_grpc` returns whether the last answer of an endpoint was gRPC.
    pub(super) fn on_time(
        &mut self,
        now: Instant,
        is_grpc: impl Fn(&Address) -> bool,
    ) -> Vec<Address> {
        let mut changed = Vec::new();
        self.0.retain(|address, quarantine| match quarantine.until {
            Some(until) if until > now => true,
            Some(_) => {
                quarantine.until = None;
                changed.push(address.clone());
                true
            }
            None if is_grpc(address) => {
                changed.push(address.clone());
                false
            }
            None => true,
        });
        changed
    }
}

/// Length of the first quarantine. A server behind a proxy usually restarts in less time.
const FIRST: Duration = Duration::from_secs(1);
/// Limit on the length of a quarantine. It is shorter than the limit on an ejection (five minutes in gRFC A50), because a failed probation
/// costs only one call, or a few calls that are sent at the same time.
const LONGEST: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_probation_starts_a_longer_quarantine_and_a_grpc_answer_ends_the_probation() {
        let address: Address = "10.0.0.5:80".parse().expect("a valid address");
        let mut now = Instant::now();
        let mut quarantines = Quarantines::default();
        let mut lengths = Vec::new();
        for _ in 0..7 {
            let length = quarantines
                .on_report(&address, now)
                .expect("a report should start a quarantine");
            assert!(quarantines.is_quarantined(&address));
            assert_eq!(
                quarantines.on_report(&address, now),
                None,
                "a report during a quarantine must not start another one"
            );
            assert!(quarantines.on_time(now, |_| false).is_empty());
            now += length;
            assert_eq!(
                quarantines.on_time(now, |_| false),
                std::slice::from_ref(&address)
            );
            assert!(
                !quarantines.is_quarantined(&address),
                "an endpoint on probation must not count as quarantined"
            );
            assert!(quarantines.on_time(now, |_| false).is_empty());
            lengths.push(length.as_secs());
        }
        assert_eq!(lengths, [1, 2, 4, 8, 16, 30, 30]);
        assert!(quarantines.is_doubted(&address));
        assert_eq!(
            quarantines.on_time(now, |_| true),
            std::slice::from_ref(&address)
        );
        assert!(!quarantines.is_doubted(&address));
        let length = quarantines.on_report(&address, now);
        assert_eq!(length, Some(FIRST), "the probation must have ended");
    }

    #[test]
    fn forget_ends_the_quarantine_and_resets_its_length() {
        let address: Address = "10.0.0.5:80".parse().expect("a valid address");
        let now = Instant::now();
        let mut quarantines = Quarantines::default();
        quarantines.on_report(&address, now);
        quarantines.forget(&address);
        assert!(!quarantines.is_quarantined(&address));
        assert_eq!(quarantines.on_report(&address, now), Some(FIRST));
    }
}
