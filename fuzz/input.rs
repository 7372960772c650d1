//! Splits the input of the fuzzer into a key and a value.

use tonic_etcd::Format;

#[path = "decode.rs"]
mod decode;

/// Checks an input. The bytes before the first newline are the key, and the bytes after it are the value. Without a newline, the key is
/// empty, and all bytes are the value.
pub fn check_bytes(format: &Format, bytes: &[u8]) {
    let end = bytes.iter().position(|byte| *byte == b'\n');
    let (key, value) = bytes.split_at(end.unwrap_or(0));
    let value = value.strip_prefix(b"\n").unwrap_or(value);
    decode::check(format, &String::from_utf8_lossy(key), value);
}
