//! A key, a newline, and a value, read as the format `Url` has them.
#![no_main]

#[path = "../decode.rs"]
mod decode;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    decode::check_bytes(tonic_etcd::Format::Url, bytes);
});
