//! Why a value cannot be read, or an instance not be written.

use std::borrow::Cow;
use std::fmt;

use tonic_balance::AddressError;

/// Why a format cannot read a key and its value, or cannot write an instance.
///
/// The text completes a sentence: "the value *has no Addr*". It never repeats what was read, since registries may hold what logs must
/// not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError(Cow<'static, str>);

impl FormatError {
    /// Makes an error of a reason, such as `has no address`.
    pub fn new(reason: impl Into<Cow<'static, str>>) -> Self {
        Self(reason.into())
    }

    pub(super) const fn of(reason: &'static str) -> Self {
        Self(Cow::Borrowed(reason))
    }

    /// An address that could be read, and that the policy refuses.
    pub(super) fn refused(error: &AddressError) -> Self {
        Self(format!("names a refused address: {error}").into())
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
        // What could not be parsed may be anything, a password for instance.
        Self::of(error.reason())
    }
}

impl From<serde_json::Error> for FormatError {
    fn from(error: serde_json::Error) -> Self {
        let (line, column) = (error.line(), error.column());
        Self(format!("is not valid JSON at line {line}, column {column}").into())
    }
}
