//! rpcx' etcd plugin: the key contains the address, and the value contains all other attributes as a query.

use serde_json::Value;

use super::attributes::Attributes;
use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::text::{last_segment, text};
use super::url::{read_query, write_query};
use crate::instance::{Advertisement, DEFAULT_WEIGHT, Instance};

/// The key is `<base path>/<service>/<network>@<address>`, and the value is a query such as `weight=7&group=a`. The registry also has keys
/// of folders, which are ignored.
#[derive(Debug)]
pub(super) struct Rpcx;

impl InstanceFormat for Rpcx {
    fn name(&self) -> &'static str {
        NAME
    }

    fn default_prefix(&self) -> &'static str {
        "/rpcx_test/"
    }

    fn key(&self, prefix: &str, service: &str, instance: &Instance) -> Result<String, FormatError> {
        let prefix = self.service_prefix(prefix, service);
        Ok(format!("{prefix}tcp@{}", instance.address()))
    }

    fn encode(&self, _: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let advertisement = instance.advertisement();
        let map = ATTRIBUTES.write(advertisement, &advertisement.kept(NAME));
        Ok(write_query(&map).into_bytes())
    }

    fn decode(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        let segment = last_segment(key);
        let address = match segment.split_once('@') {
            Some(("tcp", address)) => address,
            // The other networks of rpcx do not carry gRPC.
            Some(_) => return Ok(None),
            None if !segment.contains(':') => return Ok(None),
            None => segment,
        };
        let mut advertisement = Advertisement::new(address.parse()?);
        let map = read_query(text(value)?);
        if map.get("state").and_then(Value::as_str) == Some("inactive") {
            return Ok(None);
        }
        ATTRIBUTES.read(&mut advertisement, &map);
        advertisement.keep(NAME, ATTRIBUTES.leftover(&advertisement, map));
        Ok(Some(advertisement.into()))
    }
}

const NAME: &str = "Rpcx";
const ATTRIBUTES: Attributes = Attributes {
    names: &["weight", "zone", "version", "leaving"],
    texts: true,
    weight: DEFAULT_WEIGHT,
};
