//! `GoFrame`'s registry: the key contains the version and the addresses, and the value contains the metadata.

use serde_json::{Map, Value};

use super::attributes::Attributes;
use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::object::{Object, Written};
use super::text::{last_segment, parent, text};
use crate::instance::{Advertisement, DEFAULT_WEIGHT, Instance};
use tonic_balance::Address;

/// The key is `/service/default/default/<name>/<version>/<address>[,<address>…]`, and the value is the metadata as JSON. A key may contain
/// several addresses of one server. The first valid address is called.
#[derive(Debug)]
pub(super) struct GoFrame;

impl InstanceFormat for GoFrame {
    fn name(&self) -> &'static str {
        NAME
    }

    fn default_prefix(&self) -> &'static str {
        "/service/default/default/"
    }

    fn key(&self, prefix: &str, service: &str, instance: &Instance) -> Result<String, FormatError> {
        let advertisement = instance.advertisement();
        let version = instance.version().unwrap_or(LATEST);
        if version.is_empty() || version.contains('/') {
            return Err(FormatError::of(
                "cannot represent a version that is empty or contains a slash, because the version is part of the key",
            ));
        }
        let prefix = self.service_prefix(prefix, service);
        let kept = advertisement.kept(NAME);
        let others = kept
            .get("others")
            .and_then(Value::as_str)
            .unwrap_or_default();
        Ok(format!(
            "{prefix}{version}/{}{others}",
            advertisement.address
        ))
    }

    fn encode(&self, _: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let advertisement = instance.advertisement();
        let mut kept = Object::from(advertisement.kept(NAME));
        kept.take("others");
        let insecure = match kept.take("insecure") {
            Some(kept) if !advertisement.tls => Some(kept),
            _ => advertisement.tls.then_some(Value::Bool(false)),
        };
        let mut value = Written::default().field("protocol", "grpc");
        if let Some(insecure) = insecure {
            value = value.field("insecure", insecure);
        }
        let metadata = ATTRIBUTES.write(advertisement, &kept.rest());
        Ok(value.rest(metadata).to_json().into_bytes())
    }

    fn decode(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        let (address, others) = match last_segment(key).split_once(',') {
            Some((first, others)) => (first, Some(others)),
            None => (last_segment(key), None),
        };
        // The first valid address is used. The other addresses are kept for a later write, unless an invalid address precedes the valid
        // one.
        let (address, others) = match address.parse::<Address>() {
            Ok(address) => (address, others),
            Err(error) => {
                let mut rest = others.into_iter().flat_map(|others| others.split(','));
                let usable = rest.find_map(|address| address.parse().ok());
                (usable.ok_or(error)?, None)
            }
        };
        let mut advertisement = Advertisement::new(address);
        let version = Some(last_segment(parent(key))).filter(|version| *version != LATEST);
        advertisement.version = version.map(str::to_owned);
        let mut metadata = match text(value)? {
            "" | "null" => Object::from(Map::new()),
            text => Object::parse(text)?,
        };
        if metadata
            .take("protocol")
            .is_some_and(|protocol| protocol != "grpc")
        {
            return Ok(None);
        }
        let insecure = metadata.take("insecure");
        advertisement.tls = insecure == Some(false.into());
        let metadata = metadata.rest();
        ATTRIBUTES.read(&mut advertisement, &metadata);
        let mut kept = ATTRIBUTES.leftover(&advertisement, metadata);
        if let Some(insecure) = insecure.filter(|_| !advertisement.tls) {
            kept.insert("insecure".to_owned(), insecure);
        }
        if let Some(others) = others {
            kept.insert("others".to_owned(), format!(",{others}").into());
        }
        advertisement.keep(NAME, kept);
        Ok(Some(advertisement.into()))
    }
}

const NAME: &str = "GoFrame";
/// The version that the key contains if the instance has none.
const LATEST: &str = "latest";
const ATTRIBUTES: Attributes = Attributes {
    names: &["weight", "zone", "leaving"],
    texts: false,
    weight: DEFAULT_WEIGHT,
};
