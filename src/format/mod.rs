//! The formats of keys and values in a registry: one file per format, and a recogniser for values of any format.

mod address_in_key;
mod attributes;
mod decoder;
mod dubbo_application;
mod dubbo_interface;
mod error;
mod etcd_naming;
mod format;
mod go_frame;
mod go_micro;
mod go_zero;
mod instance_format;
mod kitex;
mod kratos;
mod limits;
mod object;
mod plain;
mod recognise;
mod rpcx;
mod text;
mod url;

pub(crate) use attributes::{MAX_WEIGHT, RESERVED};
pub(crate) use decoder::Decoder;
pub use error::FormatError;
pub use format::Format;
pub use instance_format::InstanceFormat;
pub(crate) use limits::MAX_VALUE;

#[cfg(test)]
mod tests;
