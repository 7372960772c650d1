//! go-zero's `core/discov`: the key is `<service>/<id>`, without a default prefix, and the value is `host:port`. go-zero's configuration
//! calls the service `Key`.

use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::plain;
use super::text::text;
use crate::instance::Instance;

/// The key is `<service>/<id>`, and the value is the address. go-zero writes lease ids or configured numbers as ids. Its readers ignore the
/// ids.
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
