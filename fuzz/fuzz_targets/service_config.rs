//! Fuzzes the parser of service configs. It must not panic, and its errors must be short and escaped.
#![no_main]

use tonic_etcd::channel::ServiceConfig;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    match text.parse::<ServiceConfig>() {
        Ok(config) => assert_eq!(config.as_json(), text),
        Err(error) => {
            let error = error.to_string();
            assert!(error.len() < 1_000 && !error.chars().any(char::is_control), "{error:?}");
        }
    }
});
