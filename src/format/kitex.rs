//! kitex' `registry-etcd`: JSON with the address, a weight and tags. hertz uses the same format under another prefix.

use serde_json::Value;

use super::attributes::{Attributes, weight};
use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::object::{Object, Written, map_or_null};
use super::text::text;
use crate::instance::{Advertisement, Instance};

/// The key is `kitex/registry-etcd/<service>/<id>`. The address is in `address`, the weight in `weight` (10 by default), and other
/// attributes are in `tags`.
#[derive(Debug)]
pub(super) struct Kitex;

impl InstanceFormat for Kitex {
    fn name(&self) -> &'static str {
        NAME
    }

    fn default_prefix(&self) -> &'static str {
        "kitex/registry-etcd/"
    }

    fn default_weight(&self) -> u32 {
        WEIGHT
    }

    fn encode(&self, _: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let advertisement = instance.advertisement();
        let mut kept = Object::from(advertisement.kept(NAME));
        let network = kept.take_text("network");
        let weight = kept.take_weight("weight", advertisement.weight, WEIGHT);
        let tags = ATTRIBUTES.write(advertisement, &kept.take_map("tags"));
        let value = Written::default()
            .field("network", network.as_deref().unwrap_or("tcp"))
            .field("address", advertisement.address.as_str())
            .field("weight", weight)
            .field("tags", map_or_null(tags))
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
    let address = object
        .take_text("address")
        .ok_or(FormatError::of("has no address"))?;
    let mut advertisement = Advertisement::new(address.parse()?);
    let tags = object.take_map("tags");
    ATTRIBUTES.read(&mut advertisement, &tags);
    let said = object.take("weight");
    advertisement.weight = said.as_ref().map_or(WEIGHT, |said| weight(said, WEIGHT));
    object.keep("weight", said, &advertisement.weight.into());
    let leftover = ATTRIBUTES.leftover(&advertisement, tags);
    object.keep_map("tags", leftover);
    let network = object.take("network");
    object.keep("network", network, &Value::from("tcp"));
    advertisement.keep(NAME, object.rest());
    Ok(advertisement.into())
}

const NAME: &str = "Kitex";
/// The default weight. kitex readers also use this weight if the weight in the value is 0 or less.
const WEIGHT: u32 = 10;
const ATTRIBUTES: Attributes = Attributes {
    names: &["zone", "version", "leaving"],
    texts: true,
    weight: WEIGHT,
};
