//! What must hold for any key and any value, in the fuzz targets and in the seeded run of `tests/formats.rs`.

use tonic_etcd::{AddressPolicy, Format};

/// Reading never panics, never gives an address that the policy forbids, never repeats the value in an error; and what was read can be
/// written to the same key, and is the same when it is read again.
pub fn check(format: &Format, key: &str, value: &[u8]) {
    let network = "10.0.0.0/8".parse().expect("a network");
    for policy in [
        AddressPolicy::default(),
        AddressPolicy::default().forbid_loopback().allow(network),
    ] {
        match format.decode(key, value, &policy) {
            Ok(Some(instance)) => {
                policy.check(instance.address()).expect("the policy holds");
                assert!((1..=1_000_000).contains(&instance.weight()));
                if *format == Format::Mixed {
                    continue;
                }
                // That it reads the same again is checked by `encode` itself.
                match format.encode(key, &instance) {
                    Ok(written) => {
                        let again = format.decode(key, &written, &policy);
                        let again = again.ok().flatten().expect("what was written is read");
                        let twice = format.encode(key, &again);
                        assert_eq!(twice, Ok(written), "{format:?} {key:?}");
                    }
                    // Escapes can make it longer than it was.
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
