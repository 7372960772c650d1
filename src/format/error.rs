//! The error of a value that cannot be read, or of an instance that cannot be written.

use std::borrow::Cow;
use std::fmt;

use tonic_balance::error::AddressError;

/// The reason why a format cannot read a key and its value, or cannot write an instance.
///
/// The text completes a sentence: "the value *has no Addr*". It does not repeat the value, because a registry may hold data that must not
/// be logged. The only exception is a valid address that the address policy rejects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError(Cow<'static, str>);

impl FormatError {
    /// Creates an error with a reason, such as `has no address`.
    pub fn new(reason: impl Into<Cow<'static, str>>) -> Self {
        Self(reason.into())
    }

    pub(super) const fn of(reason: &'static str) -> Self {
        Self(Cow::Borrowed(reason))
    }

    /// Creates the error for a valid address that the policy rejects.
    pub(super) fn refused(error: &AddressError) -> Self {
        Self(format!("contains an address that the address policy rejects: {error}").into())
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FormatError {}

impl From<AddressError> for FormatError {
    fn from(error: AddressError) -> Self {
        // A text that is not an address can be anything, for example a password. So only the reason is kept, not the text.
        Self(error.reason().to_owned().into())
    }
}

impl FormatError {
    /// Creates the error of a value that is not JSON.
    pub(super) fn json(error: &serde_json::Error) -> Self {
        let (line, column) = (error.line(), error.column());
        Self(format!("is not valid JSON at line {line}, column {column}").into())
    }
}
