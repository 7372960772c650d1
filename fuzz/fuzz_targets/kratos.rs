//! A key, a newline, and a value, read as the format `Kratos` has them.
#![no_main]

#[path = "../input.rs"]
mod input;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    input::check_bytes(&tonic_etcd::Format::Kratos, bytes);
});
