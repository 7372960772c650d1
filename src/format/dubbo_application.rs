//! dubbo-go's application-level registry: JSON with the field names of the Go struct, followed by a newline.

use serde_json::{Value, json};

use super::attributes::{Attributes, weight};
use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::object::{Object, Written};
use super::text::{last_segment, parent, text};
use crate::instance::{Advertisement, Instance};
use tonic_balance::Address;

/// The key is `/services/<application>/<id>`. The address is usually `Host` with the port of the `tri` or `grpc` endpoint; see
/// [`Place::called`] for the other cases. The weight is in `Weight`, 100 by default.
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
        let weight = kept.take_weight("Weight", advertisement.weight, WEIGHT);
        let place = Place::kept(&mut kept, address).unwrap_or_else(|| Place::of(address));
        let mut metadata = ATTRIBUTES.write(advertisement, &kept.take_map("Metadata"));
        metadata.insert(ENDPOINTS.to_owned(), place.endpoints);
        let service = kept.take("ServiceMetadata").unwrap_or_default();
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
            .field("Host", place.host)
            .field("Port", place.port)
            .field("Weight", weight)
            .field("Enable", true)
            .field("Healthy", true)
            .field("Metadata", metadata)
            .field("ServiceMetadata", service)
            .field("Address", place.address)
            .field("GroupName", said("GroupName", ""))
            .field("Tag", said("Tag", ""))
            .rest(kept.rest());
        Ok((value.to_json() + "\n").into_bytes())
    }

    fn decode(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        read(key, Object::parse(text(value)?)?)
    }
}

pub(super) fn read(key: &str, mut object: Object) -> Result<Option<Instance>, FormatError> {
    if object.is_out_of_service() {
        return Ok(None);
    }
    // The flags are not kept: `encode` always writes them as true.
    for flag in ["Enable", "Healthy"] {
        object.take(flag);
    }
    let mut metadata = object.take_map("Metadata");
    let said = Place {
        host: object.take("Host").unwrap_or_default(),
        port: object.take("Port").unwrap_or_default(),
        address: object.take("Address").unwrap_or_default(),
        endpoints: metadata.remove(ENDPOINTS).unwrap_or_default(),
    };
    let Some(address) = said.called()? else {
        return Ok(None);
    };
    let mut advertisement = Advertisement::new(address);
    ATTRIBUTES.read(&mut advertisement, &metadata);
    let weight_said = object.take("Weight");
    let said_weight = weight_said.as_ref();
    advertisement.weight = said_weight.map_or(WEIGHT, |said| weight(said, WEIGHT));
    object.keep("Weight", weight_said, &advertisement.weight.into());
    let leftover = ATTRIBUTES.leftover(&advertisement, metadata);
    object.keep_map("Metadata", leftover);
    said.keep(&mut object, &Place::of(&advertisement.address));
    for (name, written) in [
        ("ID", last_segment(key)),
        ("ServiceName", last_segment(parent(key))),
        ("GroupName", ""),
        ("Tag", ""),
    ] {
        let said = object.take(name);
        object.keep(name, said, &written.into());
    }
    let service = object.take("ServiceMetadata");
    object.keep("ServiceMetadata", service, &Value::Null);
    advertisement.keep(NAME, object.rest());
    Ok(Some(advertisement.into()))
}

/// The fields that together contain the address of an instance.
#[derive(Debug)]
struct Place {
    host: Value,
    port: Value,
    address: Value,
    /// The list of endpoints, as JSON in a string.
    endpoints: Value,
}

impl Place {
    fn of(address: &Address) -> Self {
        let endpoints = json!([{ "port": address.port().unwrap_or_default(), "protocol": "tri" }]);
        Self {
            host: address.host().unwrap_or("localhost").into(),
            port: address.port().unwrap_or_default().into(),
            address: address.as_str().into(),
            endpoints: endpoints.to_string().into(),
        }
    }

    /// Returns the address to call. A gRPC endpoint is one with the protocol `tri` or `grpc`. If a gRPC endpoint has a valid port, the
    /// address is `Host` with this port. If `Host` is empty, the host of `Address` is used instead. Without such a port, the address is
    /// `Address`, or `Host` with `Port` if `Address` is empty. Returns `None` if the instance has endpoints, but no gRPC endpoint.
    fn called(&self) -> Result<Option<Address>, FormatError> {
        let text = |value: &Value| {
            let text = value.as_str().filter(|text| !text.is_empty());
            text.map(str::to_owned)
        };
        let whole = text(&self.address);
        let (host, port) = match (ports(&self.endpoints), text(&self.host), whole) {
            (Ports::Foreign, ..) => return Ok(None),
            (Ports::Grpc(port), Some(host), _) => (host, Some(port)),
            (Ports::Grpc(port), None, Some(whole)) => {
                let whole: Address = whole.parse()?;
                (whole.host().unwrap_or("localhost").to_owned(), Some(port))
            }
            (_, _, Some(whole)) => return Ok(Some(whole.parse()?)),
            (_, host, None) => (host.unwrap_or_default(), self.port.as_u64()),
        };
        let Some(port) = port else {
            let reason = "has neither an address nor a host and a port";
            return Err(FormatError::of(reason));
        };
        let address = if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        Ok(Some(address.parse()?))
    }

    /// Returns the fields as they were decoded, if the address in them is still `address`. Otherwise returns `None`.
    fn kept(object: &mut Object, address: &Address) -> Option<Self> {
        let written = Self::of(address);
        let place = Self {
            host: object.take("Host").unwrap_or(written.host),
            port: object.take("Port").unwrap_or(written.port),
            address: object.take("Address").unwrap_or(written.address),
            endpoints: object.take("endpoints").unwrap_or(written.endpoints),
        };
        let called = place.called().ok().flatten();
        (called.as_ref() == Some(address)).then_some(place)
    }

    fn keep(self, object: &mut Object, written: &Self) {
        for (name, said, written) in [
            ("Host", self.host, &written.host),
            ("Port", self.port, &written.port),
            ("Address", self.address, &written.address),
            ("endpoints", self.endpoints, &written.endpoints),
        ] {
            object.keep(name, Some(said).filter(|said| !said.is_null()), written);
        }
    }
}

/// The contents of the list of endpoints, which is JSON inside JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ports {
    /// The list is missing, unreadable or empty, or it has gRPC endpoints, but none with a valid port.
    Unknown,
    /// The list has endpoints, but no gRPC endpoint.
    Foreign,
    /// The first valid port of a gRPC endpoint.
    Grpc(u64),
}

fn ports(endpoints: &Value) -> Ports {
    let text = endpoints.as_str().unwrap_or_default();
    let Ok(Value::Array(endpoints)) = serde_json::from_str(text) else {
        return Ports::Unknown;
    };
    let ours = endpoints.iter().filter(|endpoint| {
        let protocol = endpoint.get("protocol").and_then(Value::as_str);
        matches!(protocol, Some("tri" | "grpc"))
    });
    let ports: Vec<_> = ours
        .map(|endpoint| endpoint.get("port").and_then(Value::as_u64))
        .collect();
    // An endpoint without a valid port is skipped, so that a later endpoint with a valid port is used.
    let is_valid = |port: &u64| (1..=u64::from(u16::MAX)).contains(port);
    match ports.iter().flatten().copied().find(is_valid) {
        Some(port) => Ports::Grpc(port),
        None if ports.is_empty() && !endpoints.is_empty() => Ports::Foreign,
        None => Ports::Unknown,
    }
}

const NAME: &str = "DubboApplication";
const ENDPOINTS: &str = "dubbo.endpoints";
const WEIGHT: u32 = 100;
const ATTRIBUTES: Attributes = Attributes {
    names: &["zone", "version", "leaving"],
    texts: true,
    weight: WEIGHT,
};
