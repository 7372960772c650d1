//! Fuzzes the decoding of the format `Mixed`. The input is a key, a newline, and a value.
#![no_main]

#[path = "../input.rs"]
mod input;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    input::check_bytes(&tonic_etcd::Format::Mixed, bytes);
});
