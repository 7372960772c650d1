//! What the fuzzer's bytes are taken for.

use tonic_etcd::Format;

#[path = "decode.rs"]
mod decode;

/// Takes the bytes apart: up to the first newline the key, then the value.
pub fn check_bytes(format: &Format, bytes: &[u8]) {
    let end = bytes.iter().position(|byte| *byte == b'\n');
    let (key, value) = bytes.split_at(end.unwrap_or(0));
    let value = value.strip_prefix(b"\n").unwrap_or(value);
    decode::check(format, &String::from_utf8_lossy(key), value);
}
