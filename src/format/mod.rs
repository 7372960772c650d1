//! The formats of keys and values: the format of etcd's Go naming resolver, the formats of other registries, and custom formats.

mod address_in_key;
mod attributes;
mod decoder;
mod dubbo_application;
mod dubbo_interface;
pub(crate) mod error;
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
pub(crate) use error::FormatError;
pub use format::Format;
pub use instance_format::InstanceFormat;
pub(crate) use limits::MAX_VALUE;

#[cfg(test)]
mod tests;
