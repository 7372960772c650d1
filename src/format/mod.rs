//! What a registry value looks like. One file per format, and the recogniser for values of any of them.

use std::fmt;

use crate::address::{AddressError, AddressPolicy};
use crate::instance::Advertisement;

pub(crate) mod etcd_naming;
mod plain;
mod recognise;

/// How a registry value is written, or the only way it may be written to be read.
///
/// Without a format, a reader recognises all of these, and the JSON of go-zero, kratos, kitex, go-micro and dubbo-go, by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The JSON of etcd's own Go naming package, `{"Op":0,"Addr":"10.0.0.5:50051","Metadata":null}`, so that grpc-go's etcd resolver
    /// finds our servers. Weight, zone and version ride inside `Metadata`. The default for writing.
    #[default]
    EtcdNaming,
    /// `host:port` and nothing else. It has no room for a weight, a zone, a version or metadata: a registration that has one of
    /// these is refused.
    Plain,
}

impl Format {
    /// Writes a value.
    pub(crate) fn encode(self, advertisement: &Advertisement) -> Vec<u8> {
        match self {
            Self::EtcdNaming => etcd_naming::encode(advertisement),
            Self::Plain => advertisement.address.to_string().into_bytes(),
        }
    }

    /// Whether the format has room for more than the address.
    pub(crate) fn carries_attributes(self) -> bool {
        match self {
            Self::EtcdNaming => true,
            Self::Plain => false,
        }
    }
}

/// Reads registry values: which formats, and which addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Decoder {
    /// The one format that is read; `None` recognises all.
    pub(crate) format: Option<Format>,
    pub(crate) policy: AddressPolicy,
}

impl Decoder {
    /// Reads one value.
    ///
    /// # Errors
    ///
    /// Whatever the bytes are, the outcome is an advertisement or an error, never a panic.
    pub(crate) fn decode(&self, value: &[u8]) -> Result<Advertisement, DecodeError> {
        if value.len() > MAX_VALUE {
            return Err(DecodeError::TooLarge);
        }
        let text = str::from_utf8(value)
            .map_err(|_| DecodeError::Form("is not UTF-8"))?
            .trim();
        let advertisement = match self.format {
            None => recognise::decode(text),
            Some(Format::EtcdNaming) => etcd_naming::decode(text),
            Some(Format::Plain) => plain::decode(text),
        }?;
        self.policy
            .check(&advertisement.address)
            .map_err(DecodeError::Address)?;
        Ok(advertisement)
    }
}

/// Values above this size are refused, for reading and for writing: the largest known format, with its endpoints' descriptions, stays
/// far below, and one bad writer must not fill every client's memory.
pub(crate) const MAX_VALUE: usize = 64 * 1024;

/// Why a value could not be read. It never shows the value: values may hold what logs must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DecodeError {
    TooLarge,
    Form(&'static str),
    Address(AddressError),
    Json { line: usize, column: usize },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge => write!(f, "is over the limit of {MAX_VALUE} bytes"),
            Self::Form(reason) => f.write_str(reason),
            Self::Address(error) => write!(f, "names a refused address: {error}"),
            Self::Json { line, column } => {
                write!(f, "is not valid JSON at line {line}, column {column}")
            }
        }
    }
}

impl From<AddressError> for DecodeError {
    fn from(error: AddressError) -> Self {
        // What could not be parsed may be anything, a password for instance.
        Self::Form(error.reason())
    }
}

impl From<serde_json::Error> for DecodeError {
    fn from(error: serde_json::Error) -> Self {
        Self::Json {
            line: error.line(),
            column: error.column(),
        }
    }
}
