//! The waits between attempts.

use std::time::Duration;

/// Exponential backoff with equal jitter. The step doubles after each wait, up to a maximum. Each wait is a random time between half of the
/// step and the whole step.
///
/// The caller resets the backoff when the peer has worked properly for a while, not when it has merely connected. Otherwise a peer that
/// accepts connections and then fails would be retried after the shortest wait forever.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, max: Duration) -> Self {
        Self {
            first,
            max,
            next: first.min(max),
        }
    }

    /// Returns the next wait and doubles the step.
    pub(crate) fn next(&mut self, rng: &mut fastrand::Rng) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.max);
        jittered(step, rng)
    }

    /// Limits the step of the next wait to `longest`.
    pub(crate) fn cap_next(&mut self, longest: Duration) {
        self.next = self.next.min(longest);
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first.min(self.max);
    }
}

/// Returns a random duration between one half of `step` and `step`.
pub(crate) fn jittered(step: Duration, rng: &mut fastrand::Rng) -> Duration {
    step.mul_f64(0.5 + rng.f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_limit_and_never_fall_below_half_a_step() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(3));
        let mut step = Duration::from_millis(100);
        for _ in 0..20 {
            let wait = backoff.next(&mut rng);
            assert!(
                wait >= step / 2 && wait <= step,
                "{wait:?} is not between half of {step:?} and {step:?}"
            );
            step = (step * 2).min(Duration::from_secs(3));
        }
        backoff.reset();
        assert!(backoff.next(&mut rng) <= Duration::from_millis(100));
    }

    #[test]
    fn waits_are_spread_by_jitter() {
        let mut rng = fastrand::Rng::with_seed(7);
        let step = Duration::from_secs(3);
        let mut waits: Vec<_> = (0..100).map(|_| jittered(step, &mut rng)).collect();
        waits.sort();
        waits.dedup();
        assert!(waits.len() > 90, "only {} of 100 differ", waits.len());
        assert!(waits[0] < step * 2 / 3 && waits[waits.len() - 1] > step * 5 / 6);
    }

    #[test]
    fn the_limit_applies_from_the_first_wait() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(1));
        assert!(backoff.next(&mut rng) <= Duration::from_secs(1));
    }
}
