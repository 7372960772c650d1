//! The text of values, and the parts of keys.

use super::error::FormatError;

/// Returns the text of a value, without surrounding white space: some libraries append a newline.
pub(super) fn text(value: &[u8]) -> Result<&str, FormatError> {
    let text = str::from_utf8(value).map_err(|_| FormatError::of("is not UTF-8"))?;
    Ok(text.trim())
}

/// Returns the part of a key after its last slash.
pub(super) fn last_segment(key: &str) -> &str {
    key.rsplit_once('/').map_or(key, |(_, last)| last)
}

/// Returns the part of a key before its last slash.
pub(super) fn parent(key: &str) -> &str {
    key.rsplit_once('/').map_or("", |(parent, _)| parent)
}
