//! The properties that must hold when any value is decoded at any key. The fuzz targets and `tests/formats.rs` check them.

use tonic_etcd::{AddressPolicy, Format};

/// Checks one key and one value. Decoding must not panic. It must return only addresses that the policy accepts, weights from 1 to
/// 1 000 000, and errors shorter than 300 bytes.
///
/// Encoding a decoded instance at the same key must succeed, unless the encoded value exceeds the size limit. If the encoded value is
/// decoded and encoded once more, the result must be the same value. This round trip is skipped for `Mixed`, which cannot encode.
pub fn check(format: &Format, key: &str, value: &[u8]) {
    let network = "10.0.0.0/8".parse().expect("a valid network");
    for policy in [
        AddressPolicy::default(),
        AddressPolicy::default().forbid_loopback().allow(network),
    ] {
        match format.decode(key, value, &policy) {
            Ok(Some(instance)) => {
                policy
                    .check(instance.address())
                    .expect("the policy must accept the decoded address");
                assert!((1..=1_000_000).contains(&instance.weight()));
                if *format == Format::Mixed {
                    continue;
                }
                // `encode` itself checks that the encoded value decodes to equal attributes. An instance also keeps the fields of its
                // original value that the format does not know. `encode` does not compare these fields, but the assertion below does: it
                // compares the values of two successive encodings.
                match format.encode(key, &instance) {
                    Ok(written) => {
                        let again = format.decode(key, &written, &policy);
                        let again = again.ok().flatten().expect("the encoded value must decode");
                        let twice = format.encode(key, &again);
                        assert_eq!(twice, Ok(written), "{format:?} {key:?}");
                    }
                    // The only allowed error is an exceeded size limit: escapes can make the encoded value longer than the original one.
                    Err(error) => assert!(
                        error.to_string().contains("limit"),
                        "{format:?} {key:?} {error}"
                    ),
                }
            }
            Ok(None) => {}
            Err(error) => assert!(error.to_string().len() < 300, "{error}"),
        }
    }
}
