//! Reads and writes weight, zone, version and metadata as entries of a map of metadata. Most formats have such a map.

use serde_json::{Map, Value};

use crate::instance::Advertisement;
use tonic_balance::Address;

/// How a format stores attributes in its map of metadata.
#[derive(Debug)]
pub(super) struct Attributes {
    /// The names of the attributes that the format stores in the map. If the format has a field of its own for an attribute, an entry of
    /// the map with the name of this attribute is ordinary metadata.
    pub(super) names: &'static [&'static str],
    /// Whether all values in the map are strings.
    pub(super) texts: bool,
    /// The weight of an instance whose value has no weight.
    pub(super) weight: u32,
}

impl Attributes {
    /// Reads attributes and metadata from a map.
    pub(super) fn read(&self, advertisement: &mut Advertisement, map: &Map<String, Value>) {
        if self.has("weight") {
            advertisement.weight = self.weight;
        }
        for (name, value) in map {
            self.read_one(advertisement, name, value);
        }
    }

    fn read_one(&self, advertisement: &mut Advertisement, name: &str, value: &Value) {
        // For a name that a query contains several times, `read_query` returns a list. As in Go, the first value is used.
        let value = match value {
            Value::Array(values) if self.texts => values.first().unwrap_or(&Value::Null),
            value => value,
        };
        match (name, value) {
            (_, Value::Null) => {}
            ("weight", value) if self.has(name) => {
                advertisement.weight = weight(value, self.weight);
            }
            ("zone", Value::String(zone)) if self.has(name) => {
                advertisement.zone = Some(zone.clone());
            }
            ("version", Value::String(version)) if self.has(name) => {
                advertisement.version = Some(version.clone());
            }
            ("leaving", Value::Bool(leaving)) if self.has(name) => advertisement.leaving = *leaving,
            ("leaving", Value::String(text)) if self.has(name) && text == "true" => {
                advertisement.leaving = true;
            }
            (_, Value::String(text)) => {
                advertisement.metadata.insert(name.to_owned(), text.clone());
            }
            (_, other) => {
                let text = other.to_string();
                advertisement.metadata.insert(name.to_owned(), text);
            }
        }
    }

    /// Returns the map to write. `kept` contains the entries that [`Attributes::leftover`] returned when the value was decoded. A kept
    /// entry is written unchanged if it still decodes to the current value in `advertisement`. So metadata that was a number stays a
    /// number.
    pub(super) fn write(
        &self,
        advertisement: &Advertisement,
        kept: &Map<String, Value>,
    ) -> Map<String, Value> {
        let mut map = self.to_map(advertisement);
        for (name, value) in kept {
            if self.only_entry(&advertisement.address, name, value)
                == self.only_attribute(advertisement, name)
            {
                map.insert(name.clone(), value.clone());
            }
        }
        map
    }

    fn to_map(&self, advertisement: &Advertisement) -> Map<String, Value> {
        let mut map = Map::new();
        for (name, value) in &advertisement.metadata {
            map.insert(name.clone(), value.as_str().into());
        }
        if self.has("weight") && advertisement.weight != self.weight {
            map.insert("weight".to_owned(), self.value(advertisement.weight));
        }
        let texts = [
            ("zone", &advertisement.zone),
            ("version", &advertisement.version),
        ];
        for (name, value) in texts {
            if let Some(value) = value
                && self.has(name)
            {
                map.insert(name.to_owned(), value.as_str().into());
            }
        }
        if advertisement.leaving && self.has("leaving") {
            let leaving = if self.texts {
                "true".into()
            } else {
                true.into()
            };
            map.insert("leaving".to_owned(), leaving);
        }
        map
    }

    /// Returns the entries of a decoded map that a write would change or omit.
    pub(super) fn leftover(
        &self,
        advertisement: &Advertisement,
        mut map: Map<String, Value>,
    ) -> Map<String, Value> {
        if !map.is_empty() {
            let written = self.to_map(advertisement);
            map.retain(|name, value| written.get(name) != Some(value));
        }
        map
    }

    /// Returns an advertisement that contains the address, one entry of a map and nothing else.
    fn only_entry(&self, address: &Address, name: &str, value: &Value) -> Advertisement {
        let mut single = Advertisement::new(address.clone());
        single.weight = self.weight;
        self.read_one(&mut single, name, value);
        single
    }

    /// Returns an advertisement that contains the address, the attribute and the metadata of this name, and nothing else.
    fn only_attribute(&self, advertisement: &Advertisement, name: &str) -> Advertisement {
        let mut single = Advertisement::new(advertisement.address.clone());
        single.weight = self.weight;
        if let Some((name, value)) = advertisement.metadata.get_key_value(name) {
            single.metadata.insert(name.clone(), value.clone());
        }
        match name {
            _ if !self.has(name) => {}
            "weight" => single.weight = advertisement.weight,
            "zone" => single.zone.clone_from(&advertisement.zone),
            "version" => single.version.clone_from(&advertisement.version),
            _ => single.leaving = advertisement.leaving,
        }
        single
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains(&name)
    }

    fn value(&self, number: u32) -> Value {
        if self.texts {
            number.to_string().into()
        } else {
            number.into()
        }
    }
}

/// Names that are attributes in at least one format. A registration must not use them for its own metadata.
pub(crate) const RESERVED: [&str; 4] = ["weight", "zone", "version", "leaving"];

/// The maximum weight. The sum of ten thousand such weights is 10^10. So it fits into 64 bits even after a multiplication by 10^9.
pub(crate) const MAX_WEIGHT: u32 = 1_000_000;

/// Returns the weight that a number or a decimal string contains. Any other value, and a number below 1, results in `default`. The weight
/// is capped at [`MAX_WEIGHT`], so that sums of weights cannot overflow.
pub(super) fn weight(value: &Value, default: u32) -> u32 {
    let weight = match value {
        Value::Number(number) => number.as_i64().or_else(|| number.as_f64().map(whole)),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    weight
        .filter(|weight| *weight >= 1)
        .and_then(|weight| u32::try_from(weight.min(MAX_WEIGHT.into())).ok())
        .unwrap_or(default)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "`as` saturates, and the caller caps the result at `MAX_WEIGHT`"
)]
fn whole(number: f64) -> i64 {
    number as i64
}
