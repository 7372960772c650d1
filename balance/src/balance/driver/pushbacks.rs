//! The endpoints whose servers have sent a pushback: they have refused a call and request a wait.
//!
//! Such an endpoint is moved to the last-resort set until its pushback ends. If the endpoints in pushback have more than half of the weight of
//! all, the pushbacks are ignored: otherwise, the few other endpoints would get all calls and be overloaded as well. For the same reason, an
//! endpoint that is alone is used in any case. Each selection decides in the same way about its own endpoints (`ready_set_pair.rs`).

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::address::Address;

/// The pushbacks that have not ended, and the schedule of their checks.
#[derive(Debug, Default)]
pub(super) struct Pushbacks {
    ends: HashMap<Address, Instant>,
    /// Whether pushbacks were added since the last check.
    has_new: bool,
    /// The time of the last check with new pushbacks.
    begun: Option<Instant>,
    /// The time of the last check.
    checked: Option<Instant>,
    due: Option<Instant>,
}

impl Pushbacks {
    /// Adds the pushback of an endpoint. The next check is due at once, or [`INTERVAL`] after the last one with new pushbacks. It does not wait
    /// after a check in which pushbacks have only ended: an overloaded server that is used again refuses calls soon.
    pub(super) fn add(&mut self, address: &Address, end: Instant, now: Instant) {
        self.ends.insert(address.clone(), end);
        self.has_new = true;
        self.schedule_after(self.begun, now);
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
        self.schedule_after(self.checked, at);
    }

    fn schedule_after(&mut self, last: Option<Instant>, at: Instant) {
        let earliest = last.map(|last| last + INTERVAL);
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
    ) -> HashSet<Address> {
        self.checked = Some(now);
        if std::mem::take(&mut self.has_new) {
            self.begun = Some(now);
        }
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

/// Returns whether pushbacks take effect. `pushed_back`: the weight of the endpoints in pushback. `all`: the weight of these and of all other
/// endpoints that are not excluded for another reason. `took_effect`: whether pushbacks take effect now. They begin to at half of the weight at
/// most, and cease to above two thirds, so that servers near the limit do not replace the ready set all the time.
pub(super) fn take_effect(pushed_back: u64, all: u64, took_effect: bool) -> bool {
    if took_effect {
        pushed_back.saturating_mul(3) <= all.saturating_mul(2)
    } else {
        pushed_back.saturating_mul(2) <= all
    }
}

/// Minimum time between two checks with new pushbacks, and from a check to the next one in which pushbacks only end. Each check can replace the
/// ready set, which wakes all waiting calls, and servers under load may refuse thousands of calls per second.
const INTERVAL: Duration = Duration::from_millis(100);

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
        pushbacks.add(&address(1), at(300), at(0));
        assert!(pushbacks.is_due(at(0)));
        let first = HashSet::from([address(1)]);
        assert_eq!(pushbacks.check(at(0), |_| Some(at(300))), first);
        assert_eq!(pushbacks.next(), Some(at(300)));
        pushbacks.add(&address(2), at(50), at(1));
        assert_eq!(pushbacks.next(), Some(at(0) + INTERVAL));
        let ends = |host: &Address| Some(if *host == address(1) { at(400) } else { at(50) });
        assert_eq!(pushbacks.check(at(100), ends), first);
        assert_eq!(pushbacks.next(), Some(at(400)), "the first was extended");
        assert!(pushbacks.check(at(400), ends).is_empty());
        assert_eq!(pushbacks.next(), None);
        // The server is used again, and refuses another call.
        pushbacks.add(&address(1), at(450), at(410));
        assert!(pushbacks.is_due(at(410)));
        pushbacks.check(at(410), |_| Some(at(450)));
        assert_eq!(pushbacks.next(), Some(at(510)));
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
    fn pushbacks_begin_at_half_of_the_weight_and_cease_above_two_thirds() {
        for (pushed_back, all, begin, stay) in [
            (1, 1, false, false),
            (1, 2, true, true),
            (2, 2, false, false),
            (1, 3, true, true),
            (2, 3, false, true),
            (51, 100, false, true),
            (67, 100, false, false),
            (u64::MAX / 4, u64::MAX / 2, true, true),
        ] {
            let effects = [false, true].map(|took| take_effect(pushed_back, all, took));
            assert_eq!(effects, [begin, stay], "{pushed_back} of {all}");
        }
    }
}
