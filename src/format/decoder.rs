//! Reads registry values: which formats, and which addresses.

use super::{Format, FormatError, MAX_VALUE, attributes::MAX_WEIGHT, recognise};
#[cfg(test)]
use crate::instance::Advertisement;
use crate::instance::Instance;
use tonic_balance::AddressPolicy;

/// Reads registry values: which formats, and which addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Decoder {
    /// The one format that is read; `None` recognises all that can be told by their values.
    pub(crate) format: Option<Format>,
    pub(crate) policy: AddressPolicy,
}

impl Decoder {
    /// Reads the value of a key; `None` if the key is not that of an instance that may be called.
    ///
    /// # Errors
    ///
    /// Whatever the bytes are, the outcome is an instance or none or an error, never a panic.
    pub(crate) fn read(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        if key.len() > MAX_VALUE || value.len() > MAX_VALUE {
            let reason = format!("is over the limit of {MAX_VALUE} bytes");
            return Err(FormatError::new(reason));
        }
        let read = match self.format {
            None => recognise::by_value(key, value),
            Some(format) => format.read(key, value),
        };
        let Some(mut instance) = read? else {
            return Ok(None);
        };
        self.policy
            .check(instance.address())
            .map_err(|error| FormatError::refused(&error))?;
        if instance.weight() > MAX_WEIGHT {
            instance = instance.with_weight(MAX_WEIGHT);
        }
        Ok(Some(instance))
    }

    /// Reads a value whose key says nothing.
    #[cfg(test)]
    pub(crate) fn decode(&self, value: &[u8]) -> Result<Advertisement, FormatError> {
        let instance = self.read("", value)?;
        let instance = instance.ok_or(FormatError::of("is not an instance"))?;
        Ok(instance.advertisement().clone())
    }
}
