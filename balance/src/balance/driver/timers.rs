//! The timers of subchannels. Each ends a backoff, or the wait of a resting subchannel, whose connection ended while no call needed it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use tokio::time::Instant;

use super::subchannel_table::SubchannelId;

/// Timers in the order of their times. A timer cannot be cancelled. When it expires, the driver checks whether the subchannel still waits
/// for it.
#[derive(Debug, Default)]
pub(super) struct Timers(BinaryHeap<Reverse<(Instant, SubchannelId)>>);

impl Timers {
    pub(super) fn push(&mut self, until: Instant, id: SubchannelId) {
        self.0.push(Reverse((until, id)));
    }

    /// Removes and returns the next timer that has expired.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<SubchannelId> {
        if self.next()? > now {
            return None;
        }
        self.0.pop().map(|Reverse((_, id))| id)
    }

    /// Returns the time of the next timer.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.peek().map(|Reverse((until, _))| *until)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn timers_expire_in_the_order_of_their_times() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut timers = Timers::default();
        for (seconds, id) in [(3, 30), (1, 10), (2, 20)] {
            timers.push(at(seconds), id);
        }
        assert_eq!(timers.next(), Some(at(1)));
        assert_eq!(timers.pop_due(now), None);
        assert_eq!(timers.pop_due(at(2)), Some(10));
        assert_eq!(timers.pop_due(at(2)), Some(20));
        assert_eq!(timers.pop_due(at(2)), None);
        assert_eq!(timers.next(), Some(at(3)));
    }
}
