//! The retry budget of a channel: a bucket of tokens.

use std::sync::atomic::{AtomicU32, Ordering};

/// A limit on the load that all retries and hedges of a channel together add to failing servers: "retry throttling" in gRPC's [retry design
/// (gRFC A6)][A6].
///
/// The bucket is full at the start. Each failure that a policy covers takes one token, and each successful call returns a fraction of a
/// token. While half of the bucket or less is left, no policy sends a call again, and the failure is returned to the caller.
///
/// The default is 1 000 tokens and a fraction of 0.1. The fraction is that of the example in A6: in the long run, at most one call in ten
/// is a retry. The size of the bucket is the largest that implementations of A6 allow. The size in the example, 10, is too small: when a
/// server is killed, all its calls fail at once, and after five failures a bucket of 10 allows no retry.
///
/// [A6]: https://github.com/grpc/proposal/blob/master/A6-client-retries.md
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a budget does nothing until a channel is built with it"]
pub struct RetryBudget {
    /// `size` and `ratio` are in thousandths of a token, because A6 allows three decimal places.
    size: u32,
    ratio: u32,
}

impl RetryBudget {
    /// Creates a budget with a bucket of `tokens`, 1 to 1 000. A successful call returns `ratio` of a token, 0.001 to 1. Values beyond
    /// these limits of A6 count as the nearest allowed value.
    pub fn new(tokens: u32, ratio: f32) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the value is clamped, and the cast turns NaN into 0"
        )]
        let ratio = (ratio.clamp(0.0, 1.0) * 1_000.0).round() as u32;
        Self {
            size: tokens.clamp(1, MAX_TOKENS) * TOKEN,
            ratio: ratio.max(1),
        }
    }
}

#[cfg(feature = "service-config")]
impl RetryBudget {
    /// Creates the budget of a service config, whose numbers are not limited to whole tokens. `tokens` is above 0 and at most 1 000, and
    /// `ratio` is above 0.
    pub(crate) fn of_service_config(tokens: f64, ratio: f64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the value is clamped, and the cast turns NaN into 0"
        )]
        let thousandths = |number: f64| {
            let limit = f64::from(MAX_TOKENS * TOKEN);
            (number * f64::from(TOKEN)).round().clamp(1.0, limit) as u32
        };
        Self {
            size: thousandths(tokens),
            ratio: thousandths(ratio),
        }
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self {
            size: MAX_TOKENS * TOKEN,
            ratio: 100,
        }
    }
}

/// The bucket of tokens.
#[derive(Debug)]
pub(in crate::call) struct Tokens {
    left: AtomicU32,
    budget: RetryBudget,
}

impl Tokens {
    pub(in crate::call) fn new(budget: RetryBudget) -> Self {
        Self {
            left: AtomicU32::new(budget.size),
            budget,
        }
    }

    /// Returns a fraction of a token to the bucket after a successful call.
    pub(in crate::call) fn on_success(&self) {
        // Relaxed, here and below: no other memory depends on the number. A full bucket, the usual case, is only read and not written, so
        // that callers on many threads do not contend for the cache line.
        if self.left.load(Ordering::Relaxed) < self.budget.size {
            let add = |left: u32| Some((left + self.budget.ratio).min(self.budget.size));
            let _ = self
                .left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        }
    }

    /// Takes a token after a failure that a policy covers. Returns true if the budget allows another send of the call, and false if half of
    /// the bucket or less is left.
    pub(in crate::call) fn on_failure(&self) -> bool {
        let take = |left: u32| Some(left.saturating_sub(TOKEN));
        let _ = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        self.allows_retry()
    }

    /// Returns true if more than half of the bucket is left, so that failed calls can be sent again.
    pub(in crate::call) fn allows_retry(&self) -> bool {
        self.left.load(Ordering::Relaxed) > self.budget.size / 2
    }
}

/// One token, in thousandths of a token.
const TOKEN: u32 = 1_000;
/// The limit on `maxTokens` in gRPC's service config.
const MAX_TOKENS: u32 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_use_half_of_the_bucket_and_successes_refill_it() {
        let tokens = Tokens::new(RetryBudget::new(10, 0.1));
        // As in A6's example, calls are sent again while 9 to 6 tokens are left, and not when 5 are left.
        assert_eq!((0..6).filter(|_| tokens.on_failure()).count(), 4);
        assert!(!tokens.allows_retry());
        // 4 tokens are left. Ten successes return one token, and 5 tokens are only half of the bucket.
        for _ in 0..10 {
            tokens.on_success();
            assert!(!tokens.allows_retry());
        }
        tokens.on_success();
        assert!(tokens.allows_retry());
    }

    #[test]
    fn the_bucket_stays_between_zero_and_its_size() {
        let tokens = Tokens::new(RetryBudget::new(2, 0.9));
        tokens.on_failure();
        for _ in 0..100 {
            tokens.on_success();
        }
        assert!(
            !tokens.on_failure(),
            "the bucket must not hold more than its size"
        );
        for _ in 0..100 {
            tokens.on_failure();
        }
        tokens.on_success();
        assert!(!tokens.allows_retry());
        tokens.on_success();
        assert!(tokens.allows_retry(), "the bucket must not be negative");
    }

    #[test]
    fn budget_parameters_out_of_range_are_clamped() {
        assert_eq!(RetryBudget::new(0, -1.0), RetryBudget::new(1, 0.001));
        assert_eq!(RetryBudget::new(9_999, 7.0), RetryBudget::new(1_000, 1.0));
        assert_eq!(RetryBudget::new(9, f32::NAN), RetryBudget::new(9, 0.0));
        assert_eq!(RetryBudget::default(), RetryBudget::new(1_000, 0.1));
    }
}
