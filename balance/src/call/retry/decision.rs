//! The decision whether a failed call is sent again. This module performs no I/O.

use std::time::Duration;

use http::HeaderMap;
use http::HeaderName;
use tonic::Code;

use super::budget::Tokens;
use super::policy::RetryPolicy;

/// The server's pushback: its instruction about further attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::call) enum Pushback {
    /// No instruction.
    None,
    /// Another attempt is allowed after this wait.
    After(Duration),
    /// No further attempt is allowed.
    Never,
}

impl Pushback {
    /// Parses the pushback header. A duplicate, negative or non-numeric header means "do not retry" (gRFC A6).
    pub(in crate::call) fn of(headers: &HeaderMap) -> Self {
        let mut values = headers.get_all(PUSHBACK).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return if headers.contains_key(PUSHBACK) {
                Self::Never
            } else {
                Self::None
            };
        };
        let millis = value
            .to_str()
            .ok()
            .and_then(|text| text.parse::<i32>().ok());
        match millis.map(u64::try_from) {
            Some(Ok(millis)) => Self::After(Duration::from_millis(millis)),
            _ => Self::Never,
        }
    }
}

/// The decision after a failed attempt.
#[derive(Debug, PartialEq)]
pub(in crate::call) enum Decision {
    /// The call is sent again after this wait.
    Again(Duration),
    /// The call is not sent again. The reason is `None` if the policy does not cover the failure.
    GiveUp(Option<&'static str>),
}

/// The progress of a call under its retry policy.
#[derive(Debug)]
pub(in crate::call) struct Progress {
    made: u32,
    /// The number of waits that the policy has chosen since the server last chose one.
    waits: u32,
}

impl Progress {
    /// Creates the progress of a call whose first attempt is in flight.
    pub(in crate::call) fn new() -> Self {
        Self { made: 1, waits: 0 }
    }

    /// Returns the number of attempts before the current one.
    pub(in crate::call) fn previous(&self) -> u32 {
        self.made - 1
    }

    /// Records that another attempt is in flight.
    pub(in crate::call) fn advance(&mut self) {
        self.made += 1;
    }

    /// Decides what follows a failed attempt. `random` is between 0 and 1.
    pub(in crate::call) fn next(
        &mut self,
        policy: &RetryPolicy,
        code: Code,
        pushback: Pushback,
        tokens: &Tokens,
        random: f64,
    ) -> Decision {
        let covered = policy.covers(code);
        // A pushback that forbids retries takes a token whatever the code is, so that retries of other calls also become less likely.
        let counts = covered || pushback == Pushback::Never;
        let allows_retry = !counts || tokens.on_failure();
        if !covered {
            return Decision::GiveUp(None);
        }
        if pushback == Pushback::Never {
            return Decision::GiveUp(Some("the server requests no retry"));
        }
        if self.made >= policy.attempt_limit() {
            return Decision::GiveUp(Some("the policy allows no further attempt"));
        }
        if !allows_retry {
            return Decision::GiveUp(Some("the retry budget is used up"));
        }
        if let Pushback::After(wait) = pushback {
            self.waits = 0;
            return Decision::Again(wait);
        }
        let wait = policy.wait(self.waits, random);
        self.waits += 1;
        Decision::Again(wait)
    }
}

/// The header that carries the pushback (gRFC A6).
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

#[cfg(test)]
mod tests {
    use super::super::budget::RetryBudget;
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(PUSHBACK, value.parse().expect("a value"));
        }
        headers
    }

    #[test]
    fn pushback_is_parsed_as_in_grfc_a6() {
        let after = |millis| Pushback::After(Duration::from_millis(millis));
        for (values, expected) in [
            (&[][..], Pushback::None),
            (&["0"], after(0)),
            (&["250"], after(250)),
            (&["2147483647"], after(2_147_483_647)),
            (&["2147483648"], Pushback::Never),
            (&["-1"], Pushback::Never),
            (&["soon"], Pushback::Never),
            (&[""], Pushback::Never),
            (&["1", "1"], Pushback::Never),
        ] {
            assert_eq!(Pushback::of(&headers(values)), expected, "{values:?}");
        }
    }

    /// Repeats the failures until the call is given up. Returns the waits and the reason.
    fn run(
        policy: &RetryPolicy,
        tokens: &Tokens,
        failures: &[(Code, Pushback)],
    ) -> (Vec<u128>, Option<&'static str>) {
        let mut progress = Progress::new();
        let mut waits = Vec::new();
        for (code, pushback) in failures.iter().cycle() {
            match progress.next(policy, *code, *pushback, tokens, 0.5) {
                Decision::Again(wait) => {
                    waits.push(wait.as_millis());
                    progress.advance();
                }
                Decision::GiveUp(why) => return (waits, why),
            }
        }
        unreachable!("the list of failures is empty")
    }

    #[test]
    fn decisions_follow_each_rule_of_grfc_a6() {
        let policy = RetryPolicy::new([Code::Unavailable]);
        let all = Some("the policy allows no further attempt");
        let lost = (Code::Unavailable, Pushback::None);
        let pushed = (Code::Unavailable, Pushback::After(Duration::from_millis(7)));
        let tokens = || Tokens::new(RetryBudget::default());
        let decision = |failures: &[_]| run(&policy, &tokens(), failures);
        assert_eq!(decision(&[lost]), (vec![100, 200, 400], all));
        assert_eq!(
            decision(&[(Code::NotFound, Pushback::None)]),
            (vec![], None)
        );
        // The policy must cover the code, even if the server requests another attempt.
        let pushed_elsewhere = (Code::NotFound, Pushback::After(Duration::ZERO));
        assert_eq!(decision(&[pushed_elsewhere]), (vec![], None));
        // After a wait that the server chose, the policy's waits start from the first again.
        assert_eq!(decision(&[lost, pushed]), (vec![100, 7, 100], all));
        assert_eq!(decision(&[pushed]), (vec![7, 7, 7], all));
        let never = (Code::Unavailable, Pushback::Never);
        let quiet = Some("the server requests no retry");
        assert_eq!(decision(&[lost, never]), (vec![100], quiet));
    }

    #[test]
    fn the_budget_ends_retries_and_counts_failures_as_in_grfc_a6() {
        let policy = RetryPolicy::new([Code::Unavailable]);
        let lost = (Code::Unavailable, Pushback::None);
        let tokens = Tokens::new(RetryBudget::new(4, 0.001));
        // The bucket has 4 tokens at first. After the second failure, half of it is left.
        let used_up = Some("the retry budget is used up");
        assert_eq!(run(&policy, &tokens, &[lost]), (vec![100], used_up));

        let tokens = Tokens::new(RetryBudget::new(2, 0.001));
        run(&policy, &tokens, &[(Code::NotFound, Pushback::None)]);
        assert!(
            tokens.allows_retry(),
            "a code outside the policy must not take a token"
        );
        run(&policy, &tokens, &[(Code::NotFound, Pushback::Never)]);
        assert!(
            !tokens.allows_retry(),
            "a pushback that forbids retries must take a token"
        );
    }
}
