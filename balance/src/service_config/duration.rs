//! Durations in the JSON form of Protobuf: `"1.5s"`.

use std::time::Duration;

/// Parses a duration: digits, optionally a point and up to nine further digits, and the unit `s`. Either group of digits may be missing, as
/// in grpc-go. A negative duration has no meaning in a service config and is rejected, as in gRPC's C++ implementation.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let number = text.strip_suffix('s')?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    if fraction.len() > NANOS_DIGITS {
        return None;
    }
    let seconds = match whole {
        "" => 0,
        whole => whole.parse().ok().filter(|whole| *whole <= MAX_SECONDS)?,
    };
    // The digits of the fraction, as nanoseconds.
    let nanos = format!("{fraction:0<NANOS_DIGITS$}").parse().ok()?;
    Some(Duration::new(seconds, nanos))
}

/// The largest number of seconds in Protobuf's `Duration`: about 10 000 years.
const MAX_SECONDS: u64 = 315_576_000_000;
const NANOS_DIGITS: usize = 9;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_parsed() {
        for (text, duration) in [
            ("0s", Duration::ZERO),
            ("1s", Duration::from_secs(1)),
            ("1.5s", Duration::from_millis(1_500)),
            (".25s", Duration::from_millis(250)),
            ("3.s", Duration::from_secs(3)),
            ("0.000000001s", Duration::from_nanos(1)),
            ("315576000000s", Duration::from_secs(MAX_SECONDS)),
        ] {
            assert_eq!(parse(text), Some(duration), "{text}");
        }
    }

    #[test]
    fn other_texts_are_rejected() {
        for text in [
            "",
            "s",
            ".s",
            "1",
            "1ms",
            "-1s",
            "+1s",
            "1.-5s",
            "1.5.5s",
            "1 s",
            "1e3s",
            "0.1234567890s",
            "315576000001s",
            "99999999999999999999s",
            "\u{661}s",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn every_duration_of_protobuf_is_parsed(seconds in 0..=MAX_SECONDS, nanos in 0..1_000_000_000_u32) {
            let text = format!("{seconds}.{nanos:09}s");
            prop_assert_eq!(parse(&text), Some(Duration::new(seconds, nanos)));
        }
    }
}
