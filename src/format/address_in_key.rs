//! The address is the last part of the key and the value says nothing, as the npm package `@zcong/grpc-etcd-resolver` has it.

use super::{FormatError, InstanceFormat, last_segment};
use crate::instance::{Advertisement, Instance};

/// Key `<service>/<host:port>`, the value is empty. No room for anything else.
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

    /// Whatever the value is: the readers of this format look at keys alone.
    fn decode(&self, key: &str, _: &[u8]) -> Result<Option<Instance>, FormatError> {
        let address = last_segment(key).parse()?;
        Ok(Some(Advertisement::new(address).into()))
    }
}
