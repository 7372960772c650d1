//! The backoff between attempts to connect.

use std::time::Duration;

/// The backoff of gRPC's connection backoff document. The first wait is 1 s, and each further wait is 1.6 times as long as the one before.
/// Waits are limited to the maximum. A random jitter of ±20 % is then applied to each wait, so a wait can be up to 20 % longer than the
/// maximum.
#[derive(Clone, Debug)]
pub(super) struct ConnectBackoff {
    max: Duration,
    step: Duration,
}

impl ConnectBackoff {
    pub(super) fn new(max: Duration) -> Self {
        Self {
            max,
            step: FIRST.min(max),
        }
    }

    pub(super) fn next(&mut self, rng: &mut fastrand::Rng) -> Duration {
        let step = self.step;
        self.step = step.mul_f64(FACTOR).min(self.max);
        step.mul_f64(1.0 - JITTER + 2.0 * JITTER * rng.f64())
    }

    pub(super) fn reset(&mut self) {
        self.step = FIRST.min(self.max);
    }
}

const FIRST: Duration = Duration::from_secs(1);
const FACTOR: f64 = 1.6;
const JITTER: f64 = 0.2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_follow_the_grpc_connection_backoff_document() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut backoff = ConnectBackoff::new(Duration::from_secs(120));
        let mut step = 1.0_f64;
        for _ in 0..30 {
            let wait = backoff.next(&mut rng).as_secs_f64();
            assert!(
                (step * 0.8..=step * 1.2).contains(&wait),
                "a wait of {wait} s is not within 20 % of {step} s"
            );
            step = (step * 1.6).min(120.0);
        }
        backoff.reset();
        assert!(backoff.next(&mut rng) <= Duration::from_millis(1200));
    }
}
