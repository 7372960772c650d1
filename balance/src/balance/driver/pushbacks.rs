//! The endpoints whose servers have sent a pushback: they have refused a call and request a wait.
//!
//! Such an endpoint is moved to the last-resort set until its pushback ends. If more than half of the connections are to endpoints in
//! pushback, the pushbacks are ignored: otherwise, the few other endpoints would get all calls and be overloaded as well. For the same reason,
//! an endpoint that is alone is used in any case.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::address::Address;

/// The pushbacks that have not ended, and the schedule of their checks.
#[derive(Debug, Default)]
pub(super) struct Pushbacks {
    ends: HashMap<Address, Instant>,
    checked: Option<Instant>,
    due: Option<Instant>,
}

impl Pushbacks {
    /// Adds the pushback of an endpoint. The next check is due at once, or [`INTERVAL`] after the last one.
    pub(super) fn add(&mut self, address: &Address, end: Instant, now: Instant) {
        self.ends.insert(address.clone(), end);
        self.schedule(now);
    }

    /// Removes the pushback of an endpoint.
    pub(super) fn forget(&mut self, address: &Address, now: Instant) {
        if self.ends.remove(address).is_some() {
            self.schedule(now);
        }
    }

    /// Makes a check due if any pushback has not ended, because the other endpoints may have changed.
    pub(super) fn recheck(&mut self, now: Instant) {
        if !self.ends.is_empty() {
            self.schedule(now);
        }
    }

    fn schedule(&mut self, at: Instant) {
        let earliest = self.checked.map(|checked| checked + INTERVAL);
        let at = earliest.map_or(at, |earliest| at.max(earliest));
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// Returns the time of the next check.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// Removes the pushbacks that have ended, and returns the endpoints of the others. `end` returns the current end of the pushback of an
    /// endpoint, which later responses may have extended.
    pub(super) fn check(
        &mut self,
        now: Instant,
        end: impl Fn(&Address) -> Option<Instant>,
    ) -> Vec<Address> {
        self.checked = Some(now);
        self.due = None;
        self.ends.retain(|address, known| {
            *known = end(address).unwrap_or(now);
            *known > now
        });
        if let Some(first) = self.ends.values().min().copied() {
            self.schedule(first);
        }
        self.ends.keys().cloned().collect()
    }
}

/// Returns whether pushbacks take effect. `pushed_back`: the number of connections to endpoints in pushback. `all`: the number of connections
/// to these and to all other endpoints that are not excluded for another reason.
pub(super) fn take_effect(pushed_back: usize, all: usize) -> bool {
    2 * pushed_back <= all
}

/// Minimum time between two checks. Each check can replace the ready set, and servers under load may refuse thousands of calls per second.
const INTERVAL: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: u8) -> Address {
        format!("10.0.0.{host}:80")
            .parse()
            .expect("a valid address")
    }

    #[test]
    fn a_check_follows_each_pushback_and_its_end_but_not_more_often_than_the_interval() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut pushbacks = Pushbacks::default();
        assert_eq!(pushbacks.next(), None);
        pushbacks.add(&address(1), at(100), at(0));
        assert!(pushbacks.is_due(at(0)));
        assert_eq!(pushbacks.check(at(0), |_| Some(at(100))), [address(1)]);
        assert_eq!(pushbacks.next(), Some(at(100)));
        pushbacks.add(&address(2), at(3), at(1));
        assert_eq!(pushbacks.next(), Some(at(5)), "5 ms after the last check");
        let ends = |host: &Address| Some(if *host == address(1) { at(200) } else { at(3) });
        assert_eq!(pushbacks.check(at(5), ends), [address(1)]);
        assert_eq!(pushbacks.next(), Some(at(200)), "the first was extended");
        assert!(pushbacks.check(at(200), ends).is_empty());
        assert_eq!(pushbacks.next(), None);
    }

    #[test]
    fn a_removed_endpoint_leads_to_another_check() {
        let now = Instant::now();
        let mut pushbacks = Pushbacks::default();
        pushbacks.forget(&address(1), now);
        pushbacks.recheck(now);
        assert_eq!(pushbacks.next(), None);
        pushbacks.add(&address(1), now + INTERVAL, now);
        pushbacks.check(now, |_| Some(now + INTERVAL * 2));
        pushbacks.recheck(now);
        assert!(pushbacks.is_due(now + INTERVAL));
        pushbacks.forget(&address(1), now);
        assert!(pushbacks.check(now, |_| None).is_empty());
        assert_eq!(pushbacks.next(), None);
    }

    #[test]
    fn pushbacks_take_effect_for_at_most_half_of_the_connections() {
        for (pushed_back, all, expected) in [
            (1, 1, false),
            (1, 2, true),
            (2, 2, false),
            (1, 3, true),
            (2, 3, false),
            (2, 4, true),
            (3, 4, false),
        ] {
            assert_eq!(
                take_effect(pushed_back, all),
                expected,
                "{pushed_back} of {all}"
            );
        }
    }
}
