//! Recognises the format of a value by its contents. If two formats match, the order of the checks decides. To exclude a wrong guess, a
//! reader sets a [`Format`](super::Format).

use serde_json::Value;

use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::object::Object;
use super::text::{last_segment, parent, text};
use super::{
    address_in_key, dubbo_application, dubbo_interface, etcd_naming, go_frame, go_micro, kitex,
    kratos, plain, rpcx, url,
};
use crate::instance::Instance;
use tonic_balance::Address;

/// Recognises the format of a value by its contents, and decodes the value. The key is not used to recognise the format. It only determines
/// the default values of some fields, such as the id. A field with its default value is not kept for a later write.
pub(super) fn by_value(key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
    let text = text(value)?;
    if text.starts_with('{') {
        return object(key, Object::parse(text)?);
    }
    if text.contains("://") {
        return url::read(text).map(Some);
    }
    plain::read(text).map(Some)
}

/// Recognises the format of an object, and decodes the object.
fn object(key: &str, object: Object) -> Result<Option<Instance>, FormatError> {
    if object.is_out_of_service() {
        return Ok(None);
    }
    match object_format(&object) {
        Some(Recognised::EtcdNaming) => etcd_naming::read(object).map(Some),
        Some(Recognised::DubboApplication) => dubbo_application::read(key, object),
        Some(Recognised::Kitex) => kitex::read(object).map(Some),
        Some(Recognised::GoMicro) => go_micro::read(key, object),
        Some(Recognised::Kratos) => kratos::read(key, object),
        _ => Err(FormatError::of(NO_ADDRESS)),
    }
}

/// Returns the format of an object, which the field with the address determines. The check for dubbo-go precedes the check for kitex,
/// because `address`, the only field that identifies kitex, also exists in values of dubbo-go.
fn object_format(object: &Object) -> Option<Recognised> {
    let has = |name| object.field(name).is_some_and(|value| !value.is_null());
    if object.field("Addr").is_some_and(Value::is_string) {
        return Some(Recognised::EtcdNaming);
    }
    if has("host") || has("ServiceName") {
        return Some(Recognised::DubboApplication);
    }
    if has("address") {
        return Some(Recognised::Kitex);
    }
    if has("nodes") {
        return Some(Recognised::GoMicro);
    }
    has("endpoints").then_some(Recognised::Kratos)
}

/// Recognises the format of a value by its contents.
pub(super) fn format_of(value: &[u8]) -> Result<Recognised, FormatError> {
    let text = text(value)?;
    if text.starts_with('{') {
        return object_format(&Object::parse(text)?).ok_or(FormatError::of(NO_ADDRESS));
    }
    Ok(if text.contains("://") {
        Recognised::Url
    } else {
        Recognised::Plain
    })
}

/// A format that can be recognised by a value. This is not `Format`, because `Format` depends on this file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Recognised {
    EtcdNaming,
    DubboApplication,
    Kitex,
    GoMicro,
    Kratos,
    Url,
    Plain,
}

const NO_ADDRESS: &str = "is JSON without an address in any known place";

/// Reads prefixes that contain several formats. The address is read from the value, or from the key if the value contains no address.
#[derive(Debug)]
pub(super) struct Mixed;

impl InstanceFormat for Mixed {
    fn name(&self) -> &'static str {
        "Mixed"
    }

    fn encode(&self, _: &str, _: &Instance) -> Result<Vec<u8>, FormatError> {
        Err(FormatError::of(
            "is only for reading; set a format that can be written",
        ))
    }

    fn decode(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        by_value(key, value).or_else(|error| match by_key(key, value) {
            Some(format) => format.decode(key, value),
            None if is_directory(key, value) => Ok(None),
            None => Err(error),
        })
    }
}

/// Returns the format that matches the key. If several formats have such keys, the value decides between them.
fn by_key(key: &str, value: &[u8]) -> Option<&'static dyn InstanceFormat> {
    let segment = last_segment(key);
    let category = last_segment(parent(key));
    if segment.contains("%3A%2F%2F") && ["providers", "consumers"].contains(&category) {
        return Some(&dubbo_interface::DubboInterface);
    }
    if segment.contains('@') {
        return Some(&rpcx::Rpcx);
    }
    let first = segment.split(',').next().unwrap_or_default();
    let is_address = first.parse::<Address>().is_ok();
    match value.first() {
        Some(b'{') if is_address => Some(&go_frame::GoFrame),
        Some(_) if is_address && value.contains(&b'=') => Some(&rpcx::Rpcx),
        None if is_address => Some(&address_in_key::AddressInKey),
        _ => None,
    }
}

/// Returns whether the key belongs to a folder. rpcx and dubbo-go write such keys. Their value is empty, the name of the folder, or
/// `rpcx_path`.
fn is_directory(key: &str, value: &[u8]) -> bool {
    value.is_empty() || value == b"rpcx_path" || value == last_segment(key).as_bytes()
}
