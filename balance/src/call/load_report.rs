//! Reads the load report of a response.

use http::HeaderMap;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;

use super::core::Core;
use crate::balance::Permit;
use crate::load_report::{LoadReport, TRAILER};

/// Records the load report in the trailers of a response, or in its head if the response has no other trailers.
pub(super) fn record_load_report(core: &Core, trailers: &HeaderMap, permit: &Permit) {
    if core.shared().reads_load_reports()
        && let Some(report) = load_report(trailers)
    {
        permit.on_load_report(report);
    }
}

/// Returns the load report in the trailers, if there is exactly one that can be decoded.
// Not inlined, so that a response without load reports needs little code.
#[inline(never)]
fn load_report(trailers: &HeaderMap) -> Option<LoadReport> {
    let mut values = trailers.get_all(TRAILER).iter();
    let value = values.next()?;
    if values.next().is_some() {
        return None;
    }
    // tonic decodes only values of a `MetadataMap`.
    let mut one = HeaderMap::with_capacity(1);
    one.insert(TRAILER, value.clone());
    let one = MetadataMap::from_headers(one);
    let bytes = one.get_bin(TRAILER)?.to_bytes().ok()?;
    LoadReport::decode(&bytes, Instant::now())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn trailers(values: &[&[u8]]) -> HeaderMap {
        let mut trailers = HeaderMap::new();
        for value in values {
            let value = HeaderValue::from_bytes(value).expect("a value");
            trailers.append(TRAILER, value);
        }
        trailers
    }

    /// The field `application_utilization` with the value 0.5, in Base64.
    const HALF: &[u8] = b"SQAAAAAAAOA/";

    #[test]
    fn one_report_is_decoded() {
        let report = load_report(&trailers(&[HALF])).expect("a report");
        assert_eq!(report.application_utilization(), Some(0.5));
        assert_eq!(load_report(&HeaderMap::new()), None);
    }

    #[test]
    fn trailers_that_are_not_a_report_are_ignored() {
        for values in [
            &[b"".as_slice()][..],
            &[b"%"],
            &[b"SQAAAAAAAOA"],
            &[b"\xff\xfe"],
            &[b"////"],
            &[HALF, HALF],
        ] {
            let report = load_report(&trailers(values));
            let utilization = report.and_then(|report| report.utilization());
            assert_eq!(utilization, None, "{values:?}");
        }
    }

    proptest! {
        #[test]
        fn any_trailer_is_decoded_or_ignored(value in "[ -~]{0,100}") {
            load_report(&trailers(&[value.as_bytes()]));
        }
    }
}
