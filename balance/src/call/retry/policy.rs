//! The policies that users set for retries and hedging.

use std::time::Duration;

use tonic::Code;

/// A retry policy: which failed calls are sent again, how often, and after which wait. It follows gRPC's [retry design (gRFC A6)][A6].
///
/// Retries are opt-in, because the server may have processed a failed call. They are enabled for a channel ([`ChannelBuilder::retry`]), or
/// for one service or method ([`ChannelBuilder::retry_for`]). Name only codes after which a method can safely run again. A call that the
/// server certainly did not process is sent again even without a policy. Such a transparent retry does not count as an attempt.
///
/// - A call is retried only if the caller has received no part of the response. These failures can be retried: a lost connection, no
///   reachable endpoint (both are `UNAVAILABLE`), a reset stream, and a response that consists only of an error. A server sends such a
///   response if the call fails before the server has sent a message.
/// - If the request is one message, the beginning of the response is buffered, so that the call can still be retried if the server is
///   killed while it responds. Buffering ends when the response is complete, when 64 KiB are buffered, 5 ms after the first frame, or 50 ms
///   after the head if no frame follows. A6 is stricter: a call is never retried after its response head was received.
/// - Each further attempt is sent to an endpoint that the call has not used. If no such endpoint is ready, the attempt is sent to any
///   endpoint except the endpoint that failed last. The endpoint that failed last is used only if no other endpoint is ready.
/// - A request of one message is sent again whatever its size: the bytes are shared, not copied. Of a request stream, the first message is
///   kept whatever its size, and further messages are kept while the total is at most 64 KiB. A call that has sent more is not retried.
/// - With the response header `grpc-retry-pushback-ms`, a server can replace the wait before the next attempt, or forbid retries.
/// - The call's deadline covers all attempts. A call whose deadline would pass during the wait fails at once.
/// - The retries of all calls of a channel together are limited by the channel's [`RetryBudget`].
///
/// The header `grpc-previous-rpc-attempts` contains the number of earlier attempts, in the request for the server and in the response for
/// the caller. If the call still fails, its error message ends with a list of the attempts.
///
/// ```
/// use std::time::Duration;
/// use tonic::Code;
/// use tonic_balance::RetryPolicy;
///
/// let policy = RetryPolicy::new([Code::Unavailable])
///     .max_attempts(3)
///     .initial_backoff(Duration::from_millis(20))
///     .max_backoff(Duration::from_millis(500));
/// ```
///
/// [A6]: https://github.com/grpc/proposal/blob/master/A6-client-retries.md
/// [`ChannelBuilder::retry`]: crate::channel::ChannelBuilder::retry
/// [`ChannelBuilder::retry_for`]: crate::channel::ChannelBuilder::retry_for
/// [`RetryBudget`]: crate::channel::RetryBudget
#[derive(Clone, Debug, PartialEq)]
#[must_use = "a policy does nothing until a channel is built with it"]
pub struct RetryPolicy {
    codes: Codes,
    attempts: u32,
    first: Duration,
    max: Duration,
    multiplier: f64,
}

impl RetryPolicy {
    /// Creates a policy that retries calls that failed with one of these codes. The other values are those of A6's example: 4 attempts,
    /// with waits of 0.1 s, 0.2 s and 0.4 s between them.
    pub fn new(codes: impl IntoIterator<Item = Code>) -> Self {
        Self {
            codes: codes.into_iter().collect(),
            attempts: ATTEMPTS,
            first: FIRST_BACKOFF,
            max: MAX_BACKOFF,
            multiplier: MULTIPLIER,
        }
    }

    /// Sets the maximum number of attempts, including the first. Default 4, as in A6's example. Values above 5, A6's limit, count as 5. The
    /// value 1 excludes a method from its channel's policy.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts.clamp(1, MAX_ATTEMPTS);
        self
    }

    /// Sets the wait before the second attempt. Default 0.1 s, as in A6's example. Each wait is up to 20 % longer or shorter at random, as
    /// in A6.
    pub fn initial_backoff(mut self, backoff: Duration) -> Self {
        self.first = backoff;
        self
    }

    /// Sets the limit on the wait between two attempts, before the random variation of 20 %. Default 1 s, as in A6's example.
    pub fn max_backoff(mut self, backoff: Duration) -> Self {
        self.max = backoff;
        self
    }

    /// Sets the factor between one wait and the next. Default 2, as in A6's example. NaN and values below 1 count as 1.
    pub fn multiplier(mut self, multiplier: f64) -> Self {
        self.multiplier = multiplier.max(1.0);
        self
    }

    /// Returns true if the policy retries calls that failed with this code.
    pub(in crate::call) fn covers(&self, code: Code) -> bool {
        self.codes.contains(code)
    }

    pub(in crate::call) fn attempt_limit(&self) -> u32 {
        self.attempts
    }

    /// Returns the wait before the next attempt. `waits` is the number of waits that the policy has already chosen for the call. `random`
    /// is between 0 and 1.
    pub(in crate::call) fn wait(&self, waits: u32, random: f64) -> Duration {
        let factor = self
            .multiplier
            .powi(i32::try_from(waits).unwrap_or(i32::MAX));
        let wait = (self.first.as_secs_f64() * factor).min(self.max.as_secs_f64());
        let jitter = 1.0 - JITTER + 2.0 * JITTER * random;
        Duration::try_from_secs_f64(wait * jitter).unwrap_or(self.max)
    }
}

/// A hedging policy: a call is sent again before the first attempt has failed, and the first response is used. It follows gRPC's [retry
/// design (gRFC A6)][A6].
///
/// Hedging shortens the slowest calls, but servers may run a call more than once. Use hedging only for methods that can safely run more
/// than once. Hedging is opt-in, with [`ChannelBuilder::hedge`] or [`ChannelBuilder::hedge_for`]. A channel, service or method has either a
/// hedging policy or a [`RetryPolicy`]: the policy that was set last.
///
/// - Each hedge is sent to an endpoint that the call has not used. If no such endpoint is ready, no hedge is sent.
/// - The first success or fatal failure ends the call. The other attempts are cancelled.
/// - After a failure that is not fatal, the next hedge is sent at once. With the response header `grpc-retry-pushback-ms`, a server can
///   delay or forbid the next hedge.
/// - The hedges of all calls of a channel together are limited by the channel's [`RetryBudget`](crate::channel::RetryBudget).
/// - A call is hedged only if its whole request is available when the call is made, such as a request of one message.
///
/// ```
/// use std::time::Duration;
/// use tonic_balance::channel::HedgingPolicy;
///
/// let policy = HedgingPolicy::new(2, Duration::from_millis(50));
/// ```
///
/// [A6]: https://github.com/grpc/proposal/blob/master/A6-client-retries.md
/// [`ChannelBuilder::hedge`]: crate::channel::ChannelBuilder::hedge
/// [`ChannelBuilder::hedge_for`]: crate::channel::ChannelBuilder::hedge_for
#[derive(Clone, Debug, PartialEq)]
#[must_use = "a policy does nothing until a channel is built with it"]
pub struct HedgingPolicy {
    attempts: u32,
    delay: Duration,
    non_fatal: Codes,
}

impl HedgingPolicy {
    /// Creates a policy that sends a call up to `attempts` times, `delay` apart, until a response is received. Values above 5, A6's limit,
    /// count as 5. The value 1 excludes a method from its channel's policy. A `delay` of zero sends all attempts at once. A good `delay` is
    /// the time within which 95 of 100 calls are answered.
    pub fn new(attempts: u32, delay: Duration) -> Self {
        Self {
            attempts: attempts.clamp(1, MAX_ATTEMPTS),
            delay,
            non_fatal: [Code::Unavailable].into_iter().collect(),
        }
    }

    /// Sets the non-fatal codes: after a failure with one of these codes, the call continues with its other attempts and further hedges.
    /// Default `UNAVAILABLE`, the first code of A6's example. A6 itself has no default.
    pub fn non_fatal_codes(mut self, codes: impl IntoIterator<Item = Code>) -> Self {
        self.non_fatal = codes.into_iter().collect();
        self
    }

    /// Returns true if a failure with this code ends the call and cancels its other attempts.
    pub(in crate::call) fn is_fatal(&self, code: Code) -> bool {
        !self.non_fatal.contains(code)
    }

    pub(in crate::call) fn attempt_limit(&self) -> u32 {
        self.attempts
    }

    pub(in crate::call) fn delay(&self) -> Duration {
        self.delay
    }
}

/// A set of codes, with one bit for each code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Codes(u32);

impl Codes {
    fn contains(self, code: Code) -> bool {
        self.0 & Self::bit(code) != 0
    }

    fn bit(code: Code) -> u32 {
        1 << (i32::from(code) & 31)
    }
}

impl FromIterator<Code> for Codes {
    /// Drops [`Code::Ok`], because a successful call is not a failure.
    fn from_iter<I: IntoIterator<Item = Code>>(codes: I) -> Self {
        let failures = codes.into_iter().filter(|code| *code != Code::Ok);
        Self(failures.fold(0, |codes, code| codes | Self::bit(code)))
    }
}

/// The values of A6's example policy.
const ATTEMPTS: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
const MULTIPLIER: f64 = 2.0;
/// Limit on the number of attempts: "Limits on Retries and Hedges" in A6.
const MAX_ATTEMPTS: u32 = 5;
/// Random variation of a wait, as a fraction: "Exponential Backoff" in A6, as amended in 2024.
const JITTER: f64 = 0.2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit_and_vary_by_a_fifth() {
        let policy = RetryPolicy::new([Code::Unavailable]);
        for (waits, expected) in [
            (0, 0.1),
            (1, 0.2),
            (2, 0.4),
            (3, 0.8),
            (4, 1.0),
            (5_000, 1.0),
        ] {
            for (random, factor) in [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)] {
                let wait = policy.wait(waits, random).as_secs_f64();
                assert!((wait - expected * factor).abs() < 1e-6, "{waits}: {wait}");
            }
        }
    }

    #[test]
    fn extreme_parameters_are_clamped() {
        let policy = RetryPolicy::new([])
            .multiplier(f64::NAN)
            .initial_backoff(Duration::MAX)
            .max_backoff(Duration::MAX)
            .max_attempts(0);
        assert_eq!(policy.wait(u32::MAX, 1.0), Duration::MAX);
        assert_eq!(policy.attempt_limit(), 1);
        assert_eq!(policy.max_attempts(9).attempt_limit(), 5);
        assert_eq!(HedgingPolicy::new(9, Duration::ZERO).attempt_limit(), 5);
        let zero = RetryPolicy::new([])
            .initial_backoff(Duration::ZERO)
            .max_backoff(Duration::ZERO)
            .multiplier(f64::INFINITY);
        assert_eq!(zero.wait(3, 1.0), Duration::ZERO);
    }

    #[test]
    fn exactly_the_listed_codes_are_covered() {
        let policy = RetryPolicy::new([Code::Ok, Code::Unavailable, Code::Unauthenticated]);
        let covered: Vec<_> = (0..=16)
            .map(Code::from_i32)
            .filter(|code| policy.covers(*code))
            .collect();
        assert_eq!(covered, [Code::Unavailable, Code::Unauthenticated]);
    }
}
