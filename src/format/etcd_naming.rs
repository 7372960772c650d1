//! The format of etcd's own Go naming package: `{"Op":0,"Addr":"host:port","Metadata":…}`.

use serde_json::{Map, Value};

use super::attributes::Attributes;
use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::object::{Object, Written, map_or_null};
use super::text::text;
use crate::instance::{Advertisement, DEFAULT_WEIGHT, Instance};

/// The key is `<target>/<id>`. The address is in `Addr`, and the attributes are in `Metadata`.
#[derive(Debug)]
pub(super) struct EtcdNaming;

impl InstanceFormat for EtcdNaming {
    fn name(&self) -> &'static str {
        NAME
    }

    fn encode(&self, _: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let advertisement = instance.advertisement();
        let mut kept = Object::from(advertisement.kept(NAME));
        // `Op` is written because etcd's own readers before 3.4.28 evaluate it when they read the keys for the first time. As in Go, an
        // empty map is written as null.
        let value = Written::default()
            .field("Op", 0)
            .field("Addr", advertisement.address.as_str())
            .field("Metadata", metadata(advertisement, kept.take("Metadata")))
            .rest(kept.rest());
        Ok(value.to_json().into_bytes())
    }

    fn decode(&self, _: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        let object = Object::parse(text(value)?)?;
        if object.is_out_of_service() {
            return Ok(None);
        }
        read(object).map(Some)
    }
}

pub(super) fn read(mut object: Object) -> Result<Instance, FormatError> {
    let Some(Value::String(address)) = object.take("Addr") else {
        return Err(FormatError::of("has no Addr"));
    };
    let mut advertisement = Advertisement::new(address.parse()?);
    // `Op` is ignored, because every put adds an address. etcd's own readers have ignored it since 3.4.28.
    object.take("Op");
    let metadata = object.take("Metadata");
    match &metadata {
        Some(Value::Object(map)) => ATTRIBUTES.read(&mut advertisement, map),
        // etcd's own grpc-proxy writes its metadata as a string that contains JSON.
        Some(Value::String(text)) => match nested(text) {
            Some(map) => ATTRIBUTES.read(&mut advertisement, &map),
            None => ATTRIBUTES.read(&mut advertisement, &single(text.as_str().into())),
        },
        Some(other) => ATTRIBUTES.read(&mut advertisement, &single(other.clone())),
        None => {}
    }
    match metadata {
        Some(Value::Object(map)) => {
            let leftover = ATTRIBUTES.leftover(&advertisement, map);
            object.keep_map("Metadata", leftover);
        }
        other => object.keep("Metadata", other, &Value::Null),
    }
    advertisement.keep(NAME, object.rest());
    Ok(advertisement.into())
}

/// Returns the `Metadata` to write. `kept` is the `Metadata` that was decoded, which may be any JSON. Its JSON type is preserved, unless
/// only a map can hold the attributes.
fn metadata(advertisement: &Advertisement, kept: Option<Value>) -> Value {
    let kept = match kept {
        Some(Value::Object(kept)) => return ATTRIBUTES.write(advertisement, &kept).into(),
        Some(kept) => kept,
        None => return map_or_null(ATTRIBUTES.write(advertisement, &Map::new())),
    };
    if let Some(inner) = kept.as_str().and_then(nested) {
        let map = ATTRIBUTES.write(advertisement, &inner);
        return Value::Object(map).to_string().into();
    }
    let kept_alone = single(kept.clone());
    if ATTRIBUTES.write(advertisement, &kept_alone) == kept_alone {
        return kept;
    }
    map_or_null(ATTRIBUTES.write(advertisement, &Map::new()))
}

fn nested(text: &str) -> Option<Map<String, Value>> {
    serde_json::from_str(text).ok()
}

/// Wraps a `Metadata` that is not a map: returns a map with one entry.
fn single(value: Value) -> Map<String, Value> {
    Map::from_iter([("Metadata".to_owned(), value)])
}

const NAME: &str = "EtcdNaming";
const ATTRIBUTES: Attributes = Attributes {
    names: &["weight", "zone", "version", "leaving"],
    texts: false,
    weight: DEFAULT_WEIGHT,
};
