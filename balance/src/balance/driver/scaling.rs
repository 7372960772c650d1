//! Additional connections: when to scan for endpoints that need one, and when to check whether an endpoint still needs its additional
//! connection.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::address::Address;

/// The endpoints with an additional connection, and the times of the scans for endpoints that need one.
#[derive(Debug)]
pub(super) struct Scaling {
    scan_at: Option<Instant>,
    scanned_at: Instant,
    /// The time when the additional connection of each endpoint was added.
    added: HashMap<Address, Instant>,
}

impl Scaling {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            scan_at: None,
            scanned_at: now,
            added: HashMap::new(),
        }
    }

    /// Schedules a scan. Called whenever calls have requested something from the driver, because a call may then wait for a stream.
    pub(super) fn request(&mut self, now: Instant) {
        let earliest = self.scanned_at + SCAN_INTERVAL;
        self.scan_at.get_or_insert(earliest.max(now));
    }

    /// Returns the time of the next scan.
    pub(super) fn next(&self) -> Option<Instant> {
        self.scan_at
    }

    /// Returns whether a scan is due, and marks it as done.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        let due = self.scan_at.take_if(|at| *at <= now).is_some();
        if due {
            self.scanned_at = now;
        }
        due
    }

    /// Records an additional connection.
    pub(super) fn on_added(&mut self, address: Address, now: Instant) {
        self.added.insert(address, now);
    }

    pub(super) fn forget(&mut self, address: &Address) {
        self.added.remove(address);
    }

    /// Returns the endpoints whose additional connection has reached its minimum lifetime.
    pub(super) fn old(&self, now: Instant) -> Vec<Address> {
        let is_old = |since: Instant| now.saturating_duration_since(since) >= MIN_LIFETIME;
        let old = self.added.iter().filter(|(_, since)| is_old(**since));
        old.map(|(address, _)| address.clone()).collect()
    }
}

/// Minimum interval between scans for endpoints that need another connection. Without it, every waiting call would cause a scan.
const SCAN_INTERVAL: Duration = Duration::from_millis(5);
/// Minimum lifetime of an additional connection. With a shorter lifetime, connections would be dialled and closed in step with bursts of
/// calls.
const MIN_LIFETIME: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_requests_cause_one_scan_and_scans_have_a_minimum_interval() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut scaling = Scaling::new(start);
        assert_eq!(scaling.next(), None);
        scaling.request(at(1));
        scaling.request(at(2));
        assert_eq!(scaling.next(), Some(at(5)));
        assert!(!scaling.take_due(at(4)));
        assert!(scaling.take_due(at(6)));
        assert!(!scaling.take_due(at(6)), "a scan must be due only once");
        scaling.request(at(100));
        assert_eq!(scaling.next(), Some(at(100)));
    }

    #[test]
    fn an_additional_connection_is_kept_for_its_minimum_lifetime() {
        let address: Address = "10.0.0.5:80".parse().expect("a valid address");
        let start = Instant::now();
        let mut scaling = Scaling::new(start);
        scaling.on_added(address.clone(), start);
        assert!(scaling.old(start + Duration::from_secs(29)).is_empty());
        let later = start + Duration::from_secs(30);
        assert_eq!(scaling.old(later), std::slice::from_ref(&address));
        scaling.forget(&address);
        assert!(scaling.old(later).is_empty());
    }
}
