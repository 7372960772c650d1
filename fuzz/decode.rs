//! The properties that decoding has for every key and every value. The fuzz targets and `tests/formats.rs` check them.

use tonic_etcd::{AddressPolicy, Format};

/// Checks one key and one value. Decoding must not panic, must return only addresses that the policy accepts, and must return only errors
/// shorter than 300 bytes. A decoded instance must be encodable for the same key, and the result must decode to the same instance again.
/// This second check is skipped for `Mixed`, which cannot encode.
pub fn check(format: &Format, key: &str, value: &[u8]) {
    let network = "10.0.0.0/8".parse().expect("a valid network");
    for policy in [
        AddressPolicy::default(),
        AddressPolicy::default().forbid_loopback().allow(network),
    ] {
        match format.decode(key, value, &policy) {
            Ok(Some(instance)) => {
                policy.check(instance.address()).expect("accepted address");
                assert!((1..=1_000_000).contains(&instance.weight()));
                if *format == Format::Mixed {
                    continue;
                }
                // `encode` itself checks that the value decodes to equal attributes. Fields of the original value that the format does not
                // know are kept and written again. `encode` does not compare them, so the assertion below does.
                match format.encode(key, &instance) {
                    Ok(written) => {
                        let again = format.decode(key, &written, &policy);
                        let again = again.ok().flatten().expect("the encoded value decodes");
                        let twice = format.encode(key, &again);
                        assert_eq!(twice, Ok(written), "{format:?} {key:?}");
                    }
                    // The only allowed error is the limit on the size: escapes can make the encoded value longer than the original one.
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
