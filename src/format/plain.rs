//! The value is `host:port`, without other attributes.

use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::text::text;
use crate::instance::{Advertisement, Instance};

/// The key is `<service>/<id>`, and the value is the address. The format has no room for other attributes.
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

/// Decodes `host:port`.
pub(super) fn read(text: &str) -> Result<Instance, FormatError> {
    if text.is_empty() {
        return Err(FormatError::of("is empty"));
    }
    Ok(Advertisement::new(text.parse()?).into())
}
