//! The address is the last part of the key and the value is empty, as in the npm package `@zcong/grpc-etcd-resolver`.

use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::text::last_segment;
use crate::instance::{Advertisement, Instance};

/// The key is `<service>/<host:port>`, and the value is empty. The format has no room for other attributes.
#[derive(Debug)]
pub(super) struct AddressInKey;

impl InstanceFormat for AddressInKey {
    fn name(&self) -> &'static str {
        "AddressInKey"
    }

    fn default_prefix(&self) -> &'static str {
        ""
    }

    fn key(&self, prefix: &str, service: &str, instance: &Instance) -> Result<String, FormatError> {
        Ok(self.service_prefix(prefix, service) + instance.address().as_str())
    }

    fn encode(&self, _: &str, _: &Instance) -> Result<Vec<u8>, FormatError> {
        Ok(Vec::new())
    }

    /// Ignores the value, because readers of this format use only the key.
    fn decode(&self, key: &str, _: &[u8]) -> Result<Option<Instance>, FormatError> {
        let address = last_segment(key).parse()?;
        Ok(Some(Advertisement::new(address).into()))
    }
}
