//! How many calls of a channel may be sent again: a bucket of tokens.

use std::sync::atomic::{AtomicU32, Ordering};

/// A limit on what all retries and hedges of a channel together add to the load of servers that fail: "retry throttling" in gRPC's
/// [retry design (A6)][A6].
///
/// A bucket begins full. Each failure that a policy covers takes one token, each call that goes well puts a part of one back. While half
/// the bucket or less is left, nothing is sent again: the failure is the caller's.
///
/// Default 1 000 tokens, and 0.1 back. The part is that of A6's example: in the long run at most one call in ten is a retry. The size is
/// the largest that A6's implementations allow, and not the example's 10: one server that is killed fails every call that it has at that
/// moment, and a bucket of 10 is used up after five.
///
/// [A6]: https://github.com/grpc/proposal/blob/master/A6-client-retries.md
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a budget does nothing before a channel is given it"]
pub struct RetryBudget {
    /// Both in thousandths of a token: A6 has three decimal places.
    size: u32,
    ratio: u32,
}

impl RetryBudget {
    /// A bucket of so many tokens, 1 to 1 000, and the part of one, 0.001 to 1, that a call puts back when it goes well. What is beyond
    /// these limits, which are A6's, counts as the nearest.
    pub fn new(tokens: u32, ratio: f32) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped; what is no number becomes 0"
        )]
        let ratio = (ratio.clamp(0.0, 1.0) * 1_000.0).round() as u32;
        Self {
            size: tokens.clamp(1, MAX_TOKENS) * TOKEN,
            ratio: ratio.max(1),
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

/// The bucket.
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

    /// A call went well.
    pub(in crate::call) fn on_success(&self) {
        // Relaxed, here and below: the number is all there is, and nothing else hangs on it. A full bucket, the usual case, is only read,
        // so that callers on many threads do not fight for it.
        if self.left.load(Ordering::Relaxed) < self.budget.size {
            let add = |left: u32| Some((left + self.budget.ratio).min(self.budget.size));
            let _ = self
                .left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        }
    }

    /// A call has failed in a way that a policy covers. Says whether it may be sent again.
    pub(in crate::call) fn on_failure(&self) -> bool {
        let take = |left: u32| Some(left.saturating_sub(TOKEN));
        let _ = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        self.suffices()
    }

    /// Whether anything may be sent again.
    pub(in crate::call) fn suffices(&self) -> bool {
        self.left.load(Ordering::Relaxed) > self.budget.size / 2
    }
}

/// In the unit of the bucket.
const TOKEN: u32 = 1_000;
/// The bound on `maxTokens` in gRPC's service config.
const MAX_TOKENS: u32 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_the_bucket_is_for_retries_and_successes_fill_it_again() {
        let tokens = Tokens::new(RetryBudget::new(10, 0.1));
        // As in A6's example: from 10 down to 6 it goes on, at 5 it ends.
        assert_eq!((0..6).filter(|_| tokens.on_failure()).count(), 4);
        assert!(!tokens.suffices());
        // 4 are left; ten successes make one token, and more than half is needed.
        for _ in 0..10 {
            tokens.on_success();
            assert!(!tokens.suffices());
        }
        tokens.on_success();
        assert!(tokens.suffices());
    }

    #[test]
    fn the_bucket_never_overflows_nor_goes_below_nothing() {
        let tokens = Tokens::new(RetryBudget::new(2, 0.9));
        for _ in 0..100 {
            tokens.on_success();
        }
        assert!(!tokens.on_failure(), "it held two at most");
        for _ in 0..100 {
            tokens.on_failure();
        }
        tokens.on_success();
        assert!(!tokens.suffices());
        tokens.on_success();
        assert!(tokens.suffices(), "and had no debts");
    }

    #[test]
    fn what_is_out_of_bounds_counts_as_the_nearest() {
        assert_eq!(RetryBudget::new(0, -1.0), RetryBudget::new(1, 0.001));
        assert_eq!(RetryBudget::new(9_999, 7.0), RetryBudget::new(1_000, 1.0));
        assert_eq!(RetryBudget::new(9, f32::NAN), RetryBudget::new(9, 0.0));
        assert_eq!(RetryBudget::default(), RetryBudget::new(1_000, 0.1));
    }
}
