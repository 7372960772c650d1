//! go-kratos' `contrib/registry/etcd`: JSON that contains the endpoints as URLs.

use serde_json::Value;

use super::attributes::Attributes;
use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::object::{Object, Written, map_or_null};
use super::text::{last_segment, parent, text};
use super::url::Parts;
use crate::instance::{Advertisement, Instance};
use tonic_balance::Address;

/// The key is `/microservices/<name>/<id>`. The address is in the first `grpc` or `grpcs` URL of `endpoints`, and the weight is a string in
/// `metadata` (100 by default).
#[derive(Debug)]
pub(super) struct Kratos;

impl InstanceFormat for Kratos {
    fn name(&self) -> &'static str {
        NAME
    }

    fn default_prefix(&self) -> &'static str {
        "/microservices/"
    }

    fn default_weight(&self) -> u32 {
        ATTRIBUTES.weight
    }

    fn encode(&self, key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let advertisement = instance.advertisement();
        let mut kept = Object::from(advertisement.kept(NAME));
        let id = kept.take_text("id");
        let name = kept.take_text("name");
        let metadata = ATTRIBUTES.write(advertisement, &kept.take_map("metadata"));
        let value = Written::default()
            .field("id", id.as_deref().unwrap_or(last_segment(key)))
            .field("name", name.as_deref().unwrap_or(last_segment(parent(key))))
            .field(
                "version",
                advertisement.version.as_deref().unwrap_or_default(),
            )
            .field("metadata", map_or_null(metadata))
            .field(
                "endpoints",
                endpoints(advertisement, kept.take("endpoints")),
            )
            .rest(kept.rest());
        Ok(value.to_json().into_bytes())
    }

    fn decode(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        let object = Object::parse(text(value)?)?;
        let name = object.field("name").and_then(Value::as_str);
        // kratos clients ignore an instance whose name differs from the requested service.
        if name.is_some_and(|name| !is_folder(parent(key), name)) {
            return Ok(None);
        }
        read(key, object)
    }
}

/// Returns whether `folder`, a key without its last part, is the folder of `service`. The name of the service may contain slashes.
fn is_folder(folder: &str, service: &str) -> bool {
    let before = folder.strip_suffix(service);
    before.is_some_and(|before| before.is_empty() || before.ends_with('/') || service.is_empty())
}

pub(super) fn read(key: &str, mut object: Object) -> Result<Option<Instance>, FormatError> {
    if object.is_out_of_service() {
        return Ok(None);
    }
    let urls = object.take("endpoints").unwrap_or_default();
    let Some((parts, address)) = grpc_endpoint(&urls).transpose()? else {
        return match urls.as_array() {
            Some(others) if !others.is_empty() => Ok(None),
            _ => Err(FormatError::of("has no endpoints")),
        };
    };
    let mut advertisement = Advertisement::new(address);
    // Versions of kratos up to 2.3.0 mark TLS in the query of the URL.
    advertisement.tls = parts.scheme == "grpcs" || parts.query() == "isSecure=true";
    advertisement.version = object.take_text("version");
    let metadata = object.take_map("metadata");
    ATTRIBUTES.read(&mut advertisement, &metadata);
    let leftover = ATTRIBUTES.leftover(&advertisement, metadata);
    object.keep_map("metadata", leftover);
    let id = object.take("id");
    object.keep("id", id, &last_segment(key).into());
    let name = object.take("name");
    object.keep("name", name, &last_segment(parent(key)).into());
    let written = endpoints(&advertisement, None);
    object.keep("endpoints", Some(urls), &written);
    advertisement.keep(NAME, object.rest());
    Ok(Some(advertisement.into()))
}

/// Returns the first gRPC endpoint with a valid address. If the addresses of all gRPC endpoints are invalid, returns the error of the
/// first gRPC endpoint. Returns `None` if there is no gRPC endpoint.
fn grpc_endpoint(endpoints: &Value) -> Option<Result<(Parts<'_>, Address), FormatError>> {
    let urls = endpoints.as_array()?.iter().filter_map(Value::as_str);
    let mut unusable = None;
    for url in urls.filter(|url| is_grpc(url)) {
        match called(url) {
            Ok(endpoint) => return Some(Ok(endpoint)),
            Err(error) => drop(unusable.get_or_insert(error)),
        }
    }
    unusable.map(Err)
}

fn called(url: &str) -> Result<(Parts<'_>, Address), FormatError> {
    let parts = Parts::of(url)?;
    let address = parts.address()?;
    Ok((parts, address))
}

fn is_grpc(url: &str) -> bool {
    let scheme = url.split_once("://").map(|(scheme, _)| scheme);
    // As in Go, the case of a scheme is not significant.
    scheme.is_some_and(|scheme| {
        ["grpc", "grpcs"]
            .iter()
            .any(|grpc| scheme.eq_ignore_ascii_case(grpc))
    })
}

/// Returns the endpoints to write. The first valid gRPC endpoint of `kept` is replaced, unless it already has the address and the TLS
/// setting of the instance. If there is no valid gRPC endpoint, one is added. All other endpoints are kept unchanged.
fn endpoints(advertisement: &Advertisement, kept: Option<Value>) -> Value {
    let scheme = if advertisement.tls { "grpcs" } else { "grpc" };
    let url = format!("{scheme}://{}", advertisement.address);
    let Some(Value::Array(mut endpoints)) = kept else {
        return Value::from(vec![url]);
    };
    let ours = endpoints.iter_mut().find(|endpoint| {
        endpoint
            .as_str()
            .is_some_and(|url| is_grpc(url) && called(url).is_ok())
    });
    match ours {
        Some(endpoint) if contains_address(endpoint, advertisement) => {}
        Some(endpoint) => *endpoint = url.into(),
        None => endpoints.push(url.into()),
    }
    endpoints.into()
}

fn contains_address(endpoint: &Value, advertisement: &Advertisement) -> bool {
    let Some(Ok(parts)) = endpoint.as_str().map(Parts::of) else {
        return false;
    };
    let tls = parts.scheme == "grpcs" || parts.query() == "isSecure=true";
    tls == advertisement.tls && parts.address().as_ref() == Ok(&advertisement.address)
}

const NAME: &str = "Kratos";
const ATTRIBUTES: Attributes = Attributes {
    names: &["weight", "zone", "leaving"],
    texts: true,
    weight: 100,
};
