//! The calls of other clients that are in flight at a server, from the load reports of the server.

use super::estimate::Ticks;

/// The calls in flight at a server, except for those on the connection on which the server has reported its load.
///
/// A pick adds the calls of its own connection to them. So the calls that this channel has sent since the report count at once, and those
/// that have ended since then do not count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ServerLoad {
    others: u32,
    at: Ticks,
}

impl ServerLoad {
    /// Creates the load from a report. `own`: the calls in flight on the connection of the report.
    pub(crate) fn new(reported: u32, own: u32, now: Ticks) -> Self {
        Self {
            // Calls that are on their way to the server are in flight on the connection, and not yet at the server.
            others: reported.saturating_sub(own),
            at: now,
        }
    }

    pub(crate) fn others(self) -> u32 {
        self.others
    }

    /// Returns whether the report is recent enough to represent the load of its server.
    pub(crate) fn is_recent(self, now: Ticks) -> bool {
        now.since(self.at) < RECENT
    }

    /// Returns the calls of other clients at the later time `now`. The number approaches the median of all servers, so that a server that
    /// was busy once is tried again.
    pub(crate) fn decayed(self, median: u32, now: Ticks) -> u32 {
        let left = (-f64::from(now.since(self.at) / TIME_CONSTANT)).exp();
        let (others, median) = (f64::from(self.others), f64::from(median));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the number is between two numbers of this type"
        )]
        let others = (median + (others - median) * left).round() as u32;
        others
    }

    /// Returns a word that is not 0.
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.others) << 32 | u64::from(self.at.to_bits()) << 1 | 1
    }

    /// Returns the load in a word, or `None` for the word 0.
    pub(crate) fn unpack(word: u64) -> Option<Self> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "each half of the word has 32 bits"
        )]
        let (others, low) = ((word >> 32) as u32, word as u32);
        (word != 0).then_some(Self {
            others,
            at: Ticks::from_bits(low >> 1),
        })
    }
}

/// Returns the lower median of these numbers, or 0 if there are none.
pub(crate) fn median(numbers: &mut [u32]) -> u32 {
    let Some(last) = numbers.len().checked_sub(1) else {
        return 0;
    };
    *numbers.select_nth_unstable(last / 2).1
}

/// Age in seconds up to which a report counts for the median of all servers.
const RECENT: f32 = 10.0;
/// Time constant in seconds with which a report is forgotten. The number of calls in flight changes faster than the latency, so the constant
/// is not longer on a channel with few calls.
const TIME_CONSTANT: f32 = 1.0;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use tokio::time::Instant;

    use super::*;

    fn at(millis: u64) -> Ticks {
        let start = Instant::now();
        Ticks::at(start + Duration::from_millis(millis), start)
    }

    #[test]
    fn the_calls_of_the_own_connection_are_not_those_of_others() {
        assert_eq!(ServerLoad::new(50, 10, at(0)).others(), 40);
        assert_eq!(ServerLoad::new(5, 10, at(0)).others(), 0);
    }

    #[test]
    fn a_report_is_forgotten_within_seconds() {
        let busy = ServerLoad::new(100, 0, at(1_000));
        assert_eq!(busy.decayed(10, at(1_000)), 100);
        assert_eq!(busy.decayed(10, at(2_000)), 43);
        assert_eq!(busy.decayed(10, at(9_000)), 10);
        let idle = ServerLoad::new(0, 0, at(1_000));
        assert_eq!(idle.decayed(10, at(9_000)), 10);
        assert!(busy.is_recent(at(10_000)) && !busy.is_recent(at(12_000)));
    }

    #[test]
    fn the_median_of_an_even_number_is_the_lower_one() {
        assert_eq!(median(&mut []), 0);
        assert_eq!(median(&mut [9, 1]), 1);
        assert_eq!(median(&mut [9, 1, 4]), 4);
    }

    proptest! {
        #[test]
        fn unpacking_returns_the_packed_load(others: u32, millis in 0..u64::from(u32::MAX)) {
            let load = ServerLoad { others, at: at(millis) };
            prop_assert_eq!(ServerLoad::unpack(load.pack()), Some(load));
            prop_assert_eq!(ServerLoad::unpack(0), None);
        }
    }
}
