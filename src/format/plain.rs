//! `host:port` and nothing else.

use super::{FormatError, InstanceFormat, text};
use crate::instance::{Advertisement, Instance};

/// Key `<service>/<id>`, the address is the value. No room for anything else.
#[derive(Debug)]
pub(super) struct Plain;

impl InstanceFormat for Plain {
    fn name(&self) -> &'static str {
        "Plain"
    }

    fn encode(&self, _: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        Ok(instance.address().to_string().into_bytes())
    }

    fn decode(&self, _: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        read(text(value)?).map(Some)
    }
}

/// Reads `host:port`.
pub(super) fn read(text: &str) -> Result<Instance, FormatError> {
    if text.is_empty() {
        return Err(FormatError::of("is empty"));
    }
    Ok(Advertisement::new(text.parse()?).into())
}
