//! The deadline of a call, and the header `grpc-timeout`, which carries it to the server.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

/// The time by which a call must end, including the wait for an endpoint, retries and the response stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline {
    at: Instant,
    /// The timeout that the caller set, for the error message.
    timeout: Duration,
    /// Whether the timeout is what was left of the deadline of a call that is being served, for the error message.
    is_inherited: bool,
}

impl Deadline {
    /// Returns the deadline of a call that starts at `now`, or `None` if the clock cannot represent it.
    pub(crate) fn after(timeout: Duration, now: Instant) -> Option<Self> {
        let at = now.checked_add(timeout)?;
        Some(Self {
            at,
            timeout,
            is_inherited: false,
        })
    }

    /// Marks the deadline as inherited from a call that is being served.
    pub(crate) fn inherited(self) -> Self {
        Self {
            is_inherited: true,
            ..self
        }
    }

    pub(crate) fn at(&self) -> Instant {
        self.at
    }

    /// Describes the deadline for an error message, such as `deadline of 1s`.
    pub(crate) fn describe(&self) -> String {
        let timeout = self.timeout;
        if self.is_inherited {
            format!("deadline of {timeout:?}, inherited from the call that is being served,")
        } else {
            format!("deadline of {timeout:?}")
        }
    }

    /// Sets the header `grpc-timeout` to the remaining time.
    pub(crate) fn rewrite(&self, headers: &mut HeaderMap, now: Instant) {
        headers.insert(GRPC_TIMEOUT, format(self.at.saturating_duration_since(now)));
    }
}

/// Returns the timeout in the value of `grpc-timeout`, or `None` if the gRPC protocol does not allow the value.
pub(crate) fn parse(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let mut number = 0;
    for digit in digits {
        let digit = digit.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        number = number * 10 + u64::from(digit);
    }
    match unit {
        b'H' => Some(Duration::from_secs(number * 3600)),
        b'M' => Some(Duration::from_secs(number * 60)),
        b'S' => Some(Duration::from_secs(number)),
        b'm' => Some(Duration::from_millis(number)),
        b'u' => Some(Duration::from_micros(number)),
        b'n' => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// Formats a timeout for the header `grpc-timeout`, in the finest unit in which the number has at most eight digits.
#[must_use]
pub fn format(timeout: Duration) -> HeaderValue {
    let units = [
        (timeout.as_nanos(), 'n'),
        (timeout.as_micros(), 'u'),
        (timeout.as_millis(), 'm'),
        (timeout.as_secs().into(), 'S'),
        (u128::from(timeout.as_secs() / 60), 'M'),
        (u128::from(timeout.as_secs() / 3600), 'H'),
    ];
    let fitting = units.into_iter().find(|(number, _)| *number <= MAX_NUMBER);
    let (number, unit) = fitting.unwrap_or((MAX_NUMBER, 'H'));
    // Digits and a letter are always a valid header value.
    HeaderValue::try_from(format!("{number}{unit}"))
        .unwrap_or_else(|_| HeaderValue::from_static("99999999H"))
}

/// The timeout header of gRPC over HTTP/2.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// The largest number in the header. The gRPC protocol allows at most eight digits.
const MAX_NUMBER: u128 = 99_999_999;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(value: &str) -> Option<Duration> {
        parse(&value.parse().expect("a header value"))
    }

    #[test]
    fn every_unit_is_parsed() {
        assert_eq!(parsed("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parsed("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parsed("42S"), Some(Duration::from_secs(42)));
        assert_eq!(parsed("13m"), Some(Duration::from_millis(13)));
        assert_eq!(parsed("2u"), Some(Duration::from_micros(2)));
        assert_eq!(parsed("82n"), Some(Duration::from_nanos(82)));
    }

    #[test]
    fn invalid_timeouts_are_ignored() {
        for value in [
            "",
            "S",
            "1",
            "1s",
            "+1S",
            "-1S",
            "1.5S",
            "123456789n",
            "1 S",
            "aS",
        ] {
            assert_eq!(parsed(value), None, "{value:?}");
        }
    }

    #[test]
    fn the_longest_timeout_is_clipped() {
        assert_eq!(format(Duration::MAX), "99999999H");
    }

    proptest! {
        #[test]
        fn formatting_rounds_down_by_at_most_a_ten_thousandth(nanos in 0_u64..) {
            let timeout = Duration::from_nanos(nanos);
            let value = format(timeout);
            let back = parsed(value.to_str().expect("ASCII")).expect("a formatted timeout can be parsed");
            prop_assert!(back <= timeout);
            // If the timeout does not fit in nanoseconds, the number has at least six digits, because the factor between two units is at
            // most 1 000. Less than one unit is lost, so less than a hundred-thousandth of the timeout is lost. The assertion allows a
            // ten-thousandth.
            prop_assert!(timeout.saturating_sub(back) <= timeout / 10_000);
        }
    }
}
