//! go-zero's `core/discov`: `host:port` under `<key>/<id>`, without its own prefix.

use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::plain;
use super::text::text;
use crate::instance::Instance;

/// Key `<key>/<id>`, the address as the value. The ids that go-zero writes are lease ids or configured numbers, and its readers ignore
/// them.
#[derive(Debug)]
pub(super) struct GoZero;

impl InstanceFormat for GoZero {
    fn name(&self) -> &'static str {
        "GoZero"
    }

    fn default_prefix(&self) -> &'static str {
        ""
    }

    fn encode(&self, _: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        Ok(instance.address().to_string().into_bytes())
    }

    fn decode(&self, _: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        plain::read(text(value)?).map(Some)
    }
}
