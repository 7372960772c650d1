//! dubbo-go's application-level registry: JSON with Go's field names and a newline behind it.

use serde_json::{Value, json};

use super::attributes::{Attributes, weight};
use super::object::{Object, Written};
use super::{FormatError, InstanceFormat, last_segment, parent, text};
use crate::address::Address;
use crate::instance::{Advertisement, Instance};

/// Key `/services/<application>/<address>`, the address in `Host` and the port of the `tri` or `grpc` endpoint, else in `Address`; the
/// weight (default 100) in `Weight`.
#[derive(Debug)]
pub(super) struct DubboApplication;

impl InstanceFormat for DubboApplication {
    fn name(&self) -> &'static str {
        NAME
    }

    fn default_prefix(&self) -> &'static str {
        "/services/"
    }

    fn default_weight(&self) -> u32 {
        WEIGHT
    }

    fn encode(&self, key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let advertisement = instance.advertisement();
        let address = &advertisement.address;
        let mut kept = Object::from(advertisement.kept(NAME));
        let mut metadata = ATTRIBUTES.write(advertisement, &kept.take_map("Metadata"));
        let endpoints = kept
            .take_text("endpoints")
            .filter(|text| ports(text) == Ports::Grpc(address.port().into()))
            .unwrap_or_else(|| endpoints(address));
        metadata.insert(ENDPOINTS.to_owned(), endpoints.into());
        let mut said = |name, default: &str| match kept.take_text(name) {
            Some(text) => text,
            None => default.to_owned(),
        };
        let value = Written::default()
            .field("ID", said("ID", last_segment(key)))
            .field(
                "ServiceName",
                said("ServiceName", last_segment(parent(key))),
            )
            .field("Host", address.host())
            .field("Port", address.port())
            .field("Weight", advertisement.weight)
            .field("Enable", true)
            .field("Healthy", true)
            .field("Metadata", metadata)
            .field("GroupName", said("GroupName", ""))
            .field("Tag", said("Tag", ""))
            .field(
                "ServiceMetadata",
                kept.take("ServiceMetadata").unwrap_or_default(),
            )
            .field("Address", address.as_str())
            .rest(kept.rest());
        Ok((value.to_json() + "\n").into_bytes())
    }

    fn decode(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        read(key, Object::parse(text(value)?)?)
    }
}

pub(super) fn read(key: &str, mut object: Object) -> Result<Option<Instance>, FormatError> {
    for flag in ["Enable", "Healthy"] {
        if object.take(flag) == Some(false.into()) {
            return Ok(None);
        }
    }
    let mut metadata = object.take_map("Metadata");
    let endpoints_said = match metadata.remove(ENDPOINTS) {
        Some(Value::String(text)) => text,
        _ => String::new(),
    };
    let ports = ports(&endpoints_said);
    if ports == Ports::Foreign {
        return Ok(None);
    }
    let mut advertisement = Advertisement::new(address(&mut object, ports)?);
    ATTRIBUTES.read(&mut advertisement, &metadata);
    let said = object.take("Weight").unwrap_or_default();
    advertisement.weight = weight(&said, WEIGHT);
    let leftover = ATTRIBUTES.leftover(&advertisement, metadata);
    object.keep_map("Metadata", leftover);
    let written = endpoints(&advertisement.address);
    object.keep("endpoints", Some(endpoints_said.into()), &written.into());
    for (name, written) in [
        ("ID", last_segment(key)),
        ("ServiceName", last_segment(parent(key))),
        ("GroupName", ""),
        ("Tag", ""),
    ] {
        let said = object.take(name);
        object.keep(name, said, &written.into());
    }
    advertisement.keep(NAME, object.rest());
    Ok(Some(advertisement.into()))
}

/// The host with the gRPC endpoint's port if one is named; else the address as it is, or the host with its port.
fn address(object: &mut Object, ports: Ports) -> Result<Address, FormatError> {
    let whole = object.take_text("Address");
    let host = object.take_text("Host");
    let port = object.take("Port").and_then(|port| port.as_u64());
    let (host, port) = match (whole, host, ports) {
        (_, Some(host), Ports::Grpc(port)) => (host, Some(port)),
        (Some(whole), None, Ports::Grpc(port)) => {
            let whole: Address = whole.parse()?;
            (whole.host().to_owned(), Some(port))
        }
        (Some(whole), ..) => return Ok(whole.parse()?),
        (None, host, _) => (host.unwrap_or_default(), port),
    };
    let Some(port) = port else {
        return Err(FormatError::of(
            "has neither an address nor a host and a port",
        ));
    };
    let address = if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    };
    Ok(address.parse()?)
}

/// What the list of endpoints says, which is JSON inside JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ports {
    /// There is no list that can be read.
    Unknown,
    /// There are endpoints, and none is ours to call.
    Foreign,
    Grpc(u64),
}

fn ports(endpoints: &str) -> Ports {
    let Ok(Value::Array(endpoints)) = serde_json::from_str(endpoints) else {
        return Ports::Unknown;
    };
    let ours = endpoints.iter().find(|endpoint| {
        let protocol = endpoint.get("protocol").and_then(Value::as_str);
        matches!(protocol, Some("tri" | "grpc"))
    });
    let port = ours.map(|endpoint| endpoint.get("port").and_then(Value::as_u64));
    match port {
        Some(Some(port)) => Ports::Grpc(port),
        None if !endpoints.is_empty() => Ports::Foreign,
        _ => Ports::Unknown,
    }
}

fn endpoints(address: &Address) -> String {
    json!([{ "port": address.port(), "protocol": "tri" }]).to_string()
}

const NAME: &str = "DubboApplication";
const ENDPOINTS: &str = "dubbo.endpoints";
const WEIGHT: u32 = 100;
const ATTRIBUTES: Attributes = Attributes {
    names: &["zone", "version", "leaving"],
    texts: true,
    weight: WEIGHT,
};
