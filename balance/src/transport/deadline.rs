//! The deadline of a call, and the header that tells the server of it.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

/// When a call has to be over: waiting for an endpoint, retries and the response stream included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline {
    at: Instant,
    /// What the caller asked for, for the message.
    timeout: Duration,
}

impl Deadline {
    /// The deadline of a call that begins `now`; none if it is so far away that the clock cannot express it.
    pub(crate) fn after(timeout: Duration, now: Instant) -> Option<Self> {
        let at = now.checked_add(timeout)?;
        Some(Self { at, timeout })
    }

    pub(crate) fn at(&self) -> Instant {
        self.at
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Tells the server what is left of it.
    pub(crate) fn rewrite(&self, headers: &mut HeaderMap, now: Instant) {
        headers.insert(GRPC_TIMEOUT, format(self.at.saturating_duration_since(now)));
    }
}

/// The timeout that a call's headers name. A value that the gRPC protocol does not allow counts as none.
pub(crate) fn parse(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// A timeout as the header has it: at most eight digits, in the finest unit that they suffice for.
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
    // Digits and a letter are always a valid value.
    HeaderValue::try_from(format!("{number}{unit}"))
        .unwrap_or_else(|_| HeaderValue::from_static("99999999H"))
}

/// The header of gRPC over HTTP/2.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// Eight digits are what the protocol allows.
const MAX_NUMBER: u128 = 99_999_999;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_TIMEOUT, value.parse().expect("a header value"));
        parse(&headers)
    }

    #[test]
    fn every_unit_is_read() {
        assert_eq!(parsed("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parsed("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parsed("42S"), Some(Duration::from_secs(42)));
        assert_eq!(parsed("13m"), Some(Duration::from_millis(13)));
        assert_eq!(parsed("2u"), Some(Duration::from_micros(2)));
        assert_eq!(parsed("82n"), Some(Duration::from_nanos(82)));
        assert_eq!(parse(&HeaderMap::new()), None);
    }

    #[test]
    fn what_the_protocol_does_not_allow_is_no_timeout() {
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
        fn formatting_loses_less_than_a_unit_and_never_adds(nanos in 0_u64..) {
            let timeout = Duration::from_nanos(nanos);
            let value = format(timeout);
            let back = parsed(value.to_str().expect("ASCII")).expect("what we write, we read");
            prop_assert!(back <= timeout);
            // The number has at least five digits unless the finest unit sufficed: from seconds to minutes the step is 60.
            prop_assert!(timeout.saturating_sub(back) <= timeout / 10_000);
        }
    }
}
