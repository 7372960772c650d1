//! The times at which the services of one registry send their periodic requests.

use std::time::Duration;

use tokio::time::Instant;

/// The slots of one registry: equally spaced times. The distance between two slots, the width, is an argument of [`align`](Self::align).
/// All services of the registry share the slots, so that their periodic requests are due together and can be sent as one.
///
/// The first slot has a random offset. Without it, processes that started together would send their requests together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots {
    start: Instant,
    /// The time from `start` to the first slot, as a fraction of the width.
    phase: f64,
}

impl Slots {
    pub(crate) fn new(start: Instant, rng: &mut fastrand::Rng) -> Self {
        let phase = rng.f64();
        Self { start, phase }
    }

    /// Returns the later of two times: the last slot that is not after `at`, and the first slot that is not before `earliest`.
    pub(crate) fn align(&self, at: Instant, earliest: Instant, width: Duration) -> Instant {
        let first = self.start + width.mul_f64(self.phase);
        let at = at.max(earliest);
        let since = at.saturating_duration_since(first).as_nanos();
        let into = u64::try_from(since % width.as_nanos().max(1)).unwrap_or(0);
        let into = Duration::from_nanos(into);
        if into <= at - earliest {
            at - into
        } else {
            at - into + width
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aligned_time_is_a_slot_within_the_bounds() {
        let mut rng = fastrand::Rng::with_seed(1);
        let (start, width) = (Instant::now(), Duration::from_secs(15));
        for _ in 0..1_000 {
            let slots = Slots::new(start, &mut rng);
            let earliest = start + Duration::from_secs_f64(100.0 + rng.f64() * 100.0);
            let at = earliest + Duration::from_secs_f64(rng.f64() * 100.0);
            let aligned = slots.align(at, earliest, width);
            assert!(aligned >= earliest && aligned < at + width);
            let since = aligned - (start + width.mul_f64(slots.phase));
            assert_eq!(since.as_nanos() % width.as_nanos(), 0);
            assert!(
                aligned <= at || at - earliest < width,
                "the slot is after `at`, but an earlier slot was in the range"
            );
        }
    }

    #[test]
    fn registries_that_start_together_have_different_slots() {
        let mut rng = fastrand::Rng::with_seed(2);
        let (start, width) = (Instant::now(), Duration::from_secs(15));
        let at = start + Duration::from_secs(100);
        let mut times: Vec<_> = (0..100)
            .map(|_| Slots::new(start, &mut rng).align(at, start, width))
            .collect();
        times.sort();
        times.dedup();
        assert_eq!(times.len(), 100);
    }
}
