//! go-micro's registry: the value is the JSON of a service with one node.

use serde_json::{Map, Value};

use super::attributes::Attributes;
use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::object::{Object, Written, map_or_null};
use super::text::{last_segment, parent, text};
use crate::instance::{Advertisement, DEFAULT_WEIGHT, Instance};
use tonic_balance::Address;

/// The key is `/micro/registry/<service>/<node id>`. The address is in `nodes[].address`, and the attributes are in the `metadata` of the
/// node. Nodes whose protocol is not gRPC are ignored.
#[derive(Debug)]
pub(super) struct GoMicro;

impl InstanceFormat for GoMicro {
    fn name(&self) -> &'static str {
        NAME
    }

    fn default_prefix(&self) -> &'static str {
        "/micro/registry/"
    }

    fn encode(&self, key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let advertisement = instance.advertisement();
        let mut kept = Object::from(advertisement.kept(NAME));
        let name = kept.take_text("name");
        let metadata = kept.take_map("metadata");
        let endpoints = kept.take("endpoints").unwrap_or(Value::Array(Vec::new()));
        let node = node(key, advertisement, kept.take_map("node"));
        let value = Written::default()
            .field("name", name.as_deref().unwrap_or(last_segment(parent(key))))
            .field(
                "version",
                advertisement.version.as_deref().unwrap_or(LATEST),
            )
            .field("metadata", map_or_null(metadata))
            .field("endpoints", endpoints)
            .field("nodes", vec![node])
            .rest(kept.rest());
        Ok(value.to_json().into_bytes())
    }

    fn decode(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        read(key, Object::parse(text(value)?)?)
    }
}

pub(super) fn read(key: &str, mut object: Object) -> Result<Option<Instance>, FormatError> {
    let Some(Value::Array(nodes)) = object.take("nodes") else {
        return Err(FormatError::of("has no nodes"));
    };
    if nodes.is_empty() {
        return Err(FormatError::of("has no nodes"));
    }
    if object.is_out_of_service() {
        return Ok(None);
    }
    let mut nodes = nodes.into_iter().filter_map(|node| match node {
        Value::Object(node) => Some(Object::from(node)),
        _ => None,
    });
    // The first usable node is read. Nodes that cannot be called, or that are out of service, are skipped.
    let mut unusable = None;
    let usable = nodes.find_map(|mut node| {
        if !is_grpc(&node) || node.is_out_of_service() {
            return None;
        }
        match address(&mut node) {
            Ok(address) => Some((node, address)),
            Err(error) => {
                unusable.get_or_insert(error);
                None
            }
        }
    });
    let Some((mut node, address)) = usable else {
        return unusable.map_or(Ok(None), Err);
    };
    let mut advertisement = Advertisement::new(address);
    advertisement.version = object
        .take_text("version")
        .filter(|version| version != LATEST);
    let mut metadata = node.take_map("metadata");
    // The entries of `OWN` are dropped, because the function `node` writes them again. Entries with the same names but other values are
    // kept.
    metadata.retain(|name, value| !OWN.contains(&(name, value.as_str().unwrap_or_default())));
    ATTRIBUTES.read(&mut advertisement, &metadata);
    let leftover = ATTRIBUTES.leftover(&advertisement, metadata);
    node.keep_map("metadata", leftover);
    let id = node.take("id");
    node.keep("id", id, &last_segment(key).into());
    object.keep_map("node", node.rest());
    let described = object.take("endpoints");
    object.keep("endpoints", described, &Value::Array(Vec::new()));
    let service = object.take_map("metadata");
    object.keep_map("metadata", service);
    let name = object.take("name");
    object.keep("name", name, &last_segment(parent(key)).into());
    advertisement.keep(NAME, object.rest());
    Ok(Some(advertisement.into()))
}

fn address(node: &mut Object) -> Result<Address, FormatError> {
    let address = node.take_text("address");
    let address = address.ok_or(FormatError::of("has a node without an address"))?;
    Ok(address.parse()?)
}

fn is_grpc(node: &Object) -> bool {
    let protocol = node
        .field("metadata")
        .and_then(|metadata| metadata.get("protocol"))
        .and_then(Value::as_str);
    protocol.is_none_or(|protocol| protocol == "grpc")
}

fn node(key: &str, advertisement: &Advertisement, kept: Map<String, Value>) -> Value {
    let mut kept = Object::from(kept);
    let mut metadata = ATTRIBUTES.write(advertisement, &kept.take_map("metadata"));
    for (name, value) in OWN {
        metadata
            .entry(name.to_owned())
            .or_insert_with(|| value.into());
    }
    let id = kept.take_text("id");
    let mut node = kept.rest();
    node.insert("metadata".to_owned(), metadata.into());
    node.insert(
        "id".to_owned(),
        id.as_deref().unwrap_or(last_segment(key)).into(),
    );
    node.insert("address".to_owned(), advertisement.address.as_str().into());
    node.into()
}

const NAME: &str = "GoMicro";
/// The version that the value contains if the instance has none.
const LATEST: &str = "latest";
/// The metadata that go-micro's gRPC server writes for each of its nodes.
const OWN: [(&str, &str); 4] = [
    ("protocol", "grpc"),
    ("registry", "etcd"),
    ("server", "grpc"),
    ("transport", "grpc"),
];
const ATTRIBUTES: Attributes = Attributes {
    names: &["weight", "zone", "leaving"],
    texts: true,
    weight: DEFAULT_WEIGHT,
};
