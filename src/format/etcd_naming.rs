//! etcd's own Go naming package: `{"Op":0,"Addr":"host:port","Metadata":…}`.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::DecodeError;
use crate::instance::{Advertisement, DEFAULT_WEIGHT};

/// The Go struct `endpoints.Update`; its fields have no tags, so their names are the Go ones.
#[derive(Serialize)]
struct Update<'a> {
    #[serde(rename = "Op")]
    op: u8,
    #[serde(rename = "Addr")]
    addr: &'a str,
    #[serde(rename = "Metadata")]
    metadata: Option<serde_json::Map<String, Value>>,
}

/// The names inside `Metadata` that are attributes of their own; a registration must not use them for its own metadata.
pub(crate) const RESERVED: [&str; 4] = ["weight", "zone", "version", "leaving"];

pub(super) fn encode(advertisement: &Advertisement) -> Vec<u8> {
    let Advertisement {
        address,
        weight,
        zone,
        version,
        metadata,
        leaving,
    } = advertisement;
    let mut map = serde_json::Map::new();
    if *weight != DEFAULT_WEIGHT {
        map.insert("weight".to_owned(), (*weight).into());
    }
    for (name, value) in [("zone", zone), ("version", version)] {
        if let Some(value) = value {
            map.insert(name.to_owned(), value.as_str().into());
        }
    }
    if *leaving {
        map.insert("leaving".to_owned(), true.into());
    }
    map.extend(
        metadata
            .iter()
            .map(|(name, value)| (name.clone(), Value::from(value.as_str()))),
    );
    // Readers before 3.4.28 honour Op in their first read, and Go writes an empty map as null.
    let update = Update {
        op: 0,
        addr: address.as_str(),
        metadata: (!map.is_empty()).then_some(map),
    };
    serde_json::to_vec(&update).expect("strings and numbers are always valid JSON")
}

/// Reads the JSON object. Go matches field names whatever their case.
pub(super) fn decode(text: &str) -> Result<Advertisement, DecodeError> {
    let Value::Object(object) = serde_json::from_str(text)? else {
        return Err(DecodeError::Form("is not a JSON object"));
    };
    let address = field(&object, "Addr")
        .and_then(Value::as_str)
        .ok_or(DecodeError::Form("has no Addr"))?;
    let mut advertisement = Advertisement::new(address.parse()?);
    match field(&object, "Metadata") {
        Some(Value::Object(metadata)) => attributes(&mut advertisement, metadata),
        // etcd's own grpc-proxy writes its metadata as a string of JSON.
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(Value::Object(metadata)) => attributes(&mut advertisement, &metadata),
            _ => {
                advertisement
                    .metadata
                    .insert("Metadata".to_owned(), text.clone());
            }
        },
        None | Some(Value::Null) => {}
        Some(other) => {
            advertisement
                .metadata
                .insert("Metadata".to_owned(), other.to_string());
        }
    }
    Ok(advertisement)
}

/// The field of that name, preferring the exact case, as Go does.
pub(super) fn field<'a>(
    object: &'a serde_json::Map<String, Value>,
    name: &str,
) -> Option<&'a Value> {
    object.get(name).or_else(|| {
        object
            .iter()
            .find_map(|(key, value)| key.eq_ignore_ascii_case(name).then_some(value))
    })
}

/// Takes weight, zone, version and the rest out of a map of metadata.
pub(super) fn attributes(
    advertisement: &mut Advertisement,
    metadata: &serde_json::Map<String, Value>,
) {
    let mut rest = BTreeMap::new();
    for (name, value) in metadata {
        match (name.as_str(), value) {
            ("weight", value) => advertisement.weight = weight(value),
            ("zone", Value::String(zone)) => advertisement.zone = Some(zone.clone()),
            ("version", Value::String(version)) => advertisement.version = Some(version.clone()),
            ("leaving", Value::Bool(leaving)) => advertisement.leaving = *leaving,
            (_, Value::Null) => {}
            (_, Value::String(value)) => {
                rest.insert(name.clone(), value.clone());
            }
            (_, other) => {
                rest.insert(name.clone(), other.to_string());
            }
        }
    }
    advertisement.metadata.extend(rest);
}

/// A weight as a number or as its decimal text; anything else, and what is below 1, is the default. It is capped so that sums of weights
/// cannot overflow.
pub(super) fn weight(value: &Value) -> u32 {
    let weight = match value {
        Value::Number(number) => number.as_i64().or_else(|| number.as_f64().map(whole)),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    weight
        .filter(|weight| *weight >= 1)
        .and_then(|weight| u32::try_from(weight.min(MAX_WEIGHT.into())).ok())
        .unwrap_or(DEFAULT_WEIGHT)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "`as` saturates, and the cap follows"
)]
fn whole(number: f64) -> i64 {
    number as i64
}

/// The largest weight: ten thousand instances of it still sum up within 64 bits, with room to multiply.
pub(crate) const MAX_WEIGHT: u32 = 1_000_000;
