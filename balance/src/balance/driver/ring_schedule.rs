//! Limits how often the rings of the consistent hash are computed.

use std::time::Duration;

use tokio::time::Instant;

use crate::balance::hash_ring::RingBudget;

/// The computations that are allowed at the moment. A few changes in a row are applied at once. After that, changes are collected: a ring that
/// is not computed yet passes the calls of removed endpoints on to other endpoints. Without the limit, the end of 500 connections at once would
/// keep the driver busy for seconds.
#[derive(Debug)]
pub(super) struct RingSchedule {
    left: u32,
    refilled: Instant,
}

impl RingSchedule {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            refilled: now,
        }
    }

    /// Returns the budget of a publication.
    pub(super) fn budget(&mut self, now: Instant) -> RingBudget {
        let since = now.saturating_duration_since(self.refilled);
        let refills = since.as_nanos() / INTERVAL.as_nanos();
        if refills > 0 {
            let left = u128::from(self.left) + refills;
            self.left = u32::try_from(left).unwrap_or(BURST).min(BURST);
            self.refilled = now;
        }
        RingBudget::new(self.left)
    }

    /// Takes back the budget of a publication, after its rings were computed. Returns the time of the next publication, if a ring was left
    /// stale.
    pub(super) fn settle(&mut self, budget: &RingBudget, now: Instant) -> Option<Instant> {
        if budget.left() < self.left {
            // The interval begins after the computation, whose time depends on the machine.
            self.refilled = now;
        }
        self.left = budget.left();
        budget.is_exceeded().then(|| self.refilled + INTERVAL)
    }
}

/// Number of computations without a wait.
const BURST: u32 = 8;
/// Interval between further computations. A computation takes a few milliseconds, so the driver spends a small part of its time on them.
const INTERVAL: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::hash_ring::HashRingBuilder;

    #[test]
    fn after_a_burst_of_changes_the_rings_are_computed_at_intervals() {
        let mut now = Instant::now();
        let mut schedule = RingSchedule::new(now);
        let mut builder = HashRingBuilder::default();
        let all: Vec<_> = (1..=500).map(|hash| (hash, 1)).collect();
        let computed = std::cell::Cell::new(0);
        // An endpoint is removed in each publication.
        let mut publish = |left: usize, now| {
            let mut budget = schedule.budget(now);
            let ring = builder.build(all[..left].iter().copied(), &mut budget);
            computed.set(computed.get() + u32::from(!ring.is_stale()));
            (ring.is_stale(), schedule.settle(&budget, now))
        };
        for left in (2..=500).rev() {
            publish(left, now);
        }
        let (is_stale, next) = publish(2, now);
        assert!(is_stale);
        now = next.expect("a publication");
        assert_eq!(publish(2, now), (false, None));
        assert_eq!(computed.get(), BURST + 1);
        // After a pause, a change is applied at once.
        now += INTERVAL * 100;
        for left in 3..11 {
            assert_eq!(publish(left, now), (false, None));
        }
        assert!(publish(11, now).0);
    }
}
