//! What users say about sending calls again.

use std::time::Duration;

use tonic::Code;

/// When a call that has failed is sent again, how often, and after which wait: gRPC's [retry design (A6)][A6].
///
/// It is opt-in, for a channel ([`ChannelBuilder::retry`]) or for a service or method of it ([`ChannelBuilder::retry_for`]), because the
/// server may have processed what has failed: name only codes that are safe to run a method again after. A call that was certainly not
/// processed is sent again without any policy, and does not count as an attempt.
///
/// - The failure has to come before the caller has anything of the response: a lost connection, no endpoint that can be reached (both
///   `UNAVAILABLE`), or an error that is the whole response, as servers send it when they have sent no message before.
/// - Where the request is one message, the response is held back until it is complete, but a stream's first message for 5 ms at most, and a
///   head that nothing follows for 50 ms: a server that is killed while it answers fails no call. A6 would give up at the head.
/// - Another attempt goes to an endpoint that the call has not been to; where there is none, to any but the one that has just failed; and to
///   that one only where no other is ready.
/// - A request of one message is sent again whatever its size: the bytes are shared, not copied. Of a stream of requests the first message
///   and up to 64 KiB are kept; a call that has sent more is not sent again.
/// - A server may ask for another wait, or for none of this, with the header `grpc-retry-pushback-ms`.
/// - The call's deadline spans all attempts. A call whose deadline would pass during the wait fails at once.
/// - All attempts of a channel together are limited by its [`RetryBudget`].
///
/// The server finds the number of attempts before in the header `grpc-previous-rpc-attempts`, the caller in the response's. The message of a
/// call that fails in spite of it all ends with a list of its attempts.
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
/// [`ChannelBuilder::retry`]: crate::ChannelBuilder::retry
/// [`ChannelBuilder::retry_for`]: crate::ChannelBuilder::retry_for
/// [`RetryBudget`]: crate::RetryBudget
#[derive(Clone, Debug, PartialEq)]
#[must_use = "a policy does nothing before a channel is given it"]
pub struct RetryPolicy {
    codes: Codes,
    attempts: u32,
    first: Duration,
    max: Duration,
    multiplier: f64,
}

impl RetryPolicy {
    /// Sends a call again that has failed with one of these codes. All else is as in A6's example: 4 attempts, with waits of 0.1 s, 0.2 s
    /// and 0.4 s between them.
    pub fn new(codes: impl IntoIterator<Item = Code>) -> Self {
        Self {
            codes: codes.into_iter().collect(),
            attempts: ATTEMPTS,
            first: FIRST_BACKOFF,
            max: MAX_BACKOFF,
            multiplier: MULTIPLIER,
        }
    }

    /// How often a call is sent at most, the first time included. Default 4, as in A6's example; more than 5 count as 5, which is A6's limit.
    /// 1 is how a method is left out of its channel's policy.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts.clamp(1, MAX_ATTEMPTS);
        self
    }

    /// Sets the wait before the second attempt. Default 0.1 s, as in A6's example. Each wait is made up to 20 % longer or shorter at random,
    /// as in A6.
    pub fn initial_backoff(mut self, backoff: Duration) -> Self {
        self.first = backoff;
        self
    }

    /// Sets the longest wait between two attempts. Default 1 s, as in A6's example.
    pub fn max_backoff(mut self, backoff: Duration) -> Self {
        self.max = backoff;
        self
    }

    /// How many times as long as the one before each wait is. Default 2, as in A6's example; what is no number, or less than 1, counts as 1.
    pub fn multiplier(mut self, multiplier: f64) -> Self {
        self.multiplier = multiplier.max(1.0);
        self
    }

    pub(in crate::call) fn covers(&self, code: Code) -> bool {
        self.codes.contains(code)
    }

    pub(in crate::call) fn attempt_limit(&self) -> u32 {
        self.attempts
    }

    /// The wait after so many waits, for a random number from 0 to 1.
    pub(in crate::call) fn wait(&self, waits: u32, random: f64) -> Duration {
        let factor = self
            .multiplier
            .powi(i32::try_from(waits).unwrap_or(i32::MAX));
        let wait = (self.first.as_secs_f64() * factor).min(self.max.as_secs_f64());
        let jitter = 1.0 - JITTER + 2.0 * JITTER * random;
        Duration::try_from_secs_f64(wait * jitter).unwrap_or(self.max)
    }
}

/// Sends a call a second time before it has failed, and takes the answer that comes first: hedging, as in gRPC's
/// [retry design (A6)][A6].
///
/// It cuts the slowest calls short, at the price of calls that run twice: only for methods that may. It is opt-in, by
/// [`ChannelBuilder::hedge`] or [`ChannelBuilder::hedge_for`], in place of a [`RetryPolicy`].
///
/// - Each copy goes to an endpoint that the call has not been to. Where none is ready, none is sent.
/// - The first answer that is no failure, or a failure that is fatal, is the call's. The other copies are cancelled.
/// - A failure that is not fatal sends the next copy at once. A server can put it off or call it off with the header
///   `grpc-retry-pushback-ms`.
/// - All copies of a channel together are limited by its [`RetryBudget`](crate::RetryBudget).
/// - Only calls whose request is there as a whole when they are made are hedged: those of one message.
///
/// ```
/// use std::time::Duration;
/// use tonic_balance::HedgingPolicy;
///
/// let policy = HedgingPolicy::new(2, Duration::from_millis(50));
/// ```
///
/// [A6]: https://github.com/grpc/proposal/blob/master/A6-client-retries.md
/// [`ChannelBuilder::hedge`]: crate::ChannelBuilder::hedge
/// [`ChannelBuilder::hedge_for`]: crate::ChannelBuilder::hedge_for
#[derive(Clone, Debug, PartialEq)]
#[must_use = "a policy does nothing before a channel is given it"]
pub struct HedgingPolicy {
    attempts: u32,
    delay: Duration,
    non_fatal: Codes,
}

impl HedgingPolicy {
    /// Sends a call up to `attempts` times, `delay` apart, until an answer is there. More than 5 times count as 5, which is A6's limit; 1 is
    /// how a method is left out. A `delay` of zero sends all copies at once; a good one is the time within which 95 of 100 calls are
    /// answered.
    pub fn new(attempts: u32, delay: Duration) -> Self {
        Self {
            attempts: attempts.clamp(1, MAX_ATTEMPTS),
            delay,
            non_fatal: [Code::Unavailable].into_iter().collect(),
        }
    }

    /// The codes after which another copy may still succeed. Default `UNAVAILABLE`, the first of A6's example; A6 itself names none.
    pub fn non_fatal_codes(mut self, codes: impl IntoIterator<Item = Code>) -> Self {
        self.non_fatal = codes.into_iter().collect();
        self
    }

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

/// A set of codes, a bit for each.
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
    /// A call that went well is no failure, whatever a set says.
    fn from_iter<I: IntoIterator<Item = Code>>(codes: I) -> Self {
        let failures = codes.into_iter().filter(|code| *code != Code::Ok);
        Self(failures.fold(0, |codes, code| codes | Self::bit(code)))
    }
}

/// A6's example of a policy.
const ATTEMPTS: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
const MULTIPLIER: f64 = 2.0;
/// "Limits on Retries and Hedges" in A6.
const MAX_ATTEMPTS: u32 = 5;
/// "Exponential Backoff" in A6, as amended in 2024.
const JITTER: f64 = 0.2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_the_bound_and_vary_by_a_fifth() {
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
    fn no_parameter_breaks_a_policy() {
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
    fn exactly_the_named_codes_are_covered() {
        let policy = RetryPolicy::new([Code::Ok, Code::Unavailable, Code::Unauthenticated]);
        let covered: Vec<_> = (0..=16)
            .map(Code::from_i32)
            .filter(|code| policy.covers(*code))
            .collect();
        assert_eq!(covered, [Code::Unavailable, Code::Unauthenticated]);
    }
}
