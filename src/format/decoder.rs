//! Decodes registry values of one format or of all formats, and checks their addresses against an address policy.

use super::attributes::MAX_WEIGHT;
use super::error::FormatError;
use super::format::Format;
use super::limits::MAX_VALUE;
use super::recognise::{self, Recognised};
#[cfg(test)]
use crate::instance::Advertisement;
use crate::instance::Instance;
use tonic_balance::AddressPolicy;

/// Decodes registry values. Accepts only values of `format`, if it is set, and only addresses that `policy` accepts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Decoder {
    /// The only format that is read. With `None`, every format that can be recognised by its value is read.
    pub(crate) format: Option<Format>,
    pub(crate) policy: AddressPolicy,
}

impl Decoder {
    /// Decodes the value of a key. Returns `None` if the key does not belong to an instance, or if the value marks the instance as out of
    /// service.
    ///
    /// # Errors
    ///
    /// Fails if the key or the value is too large, if the value cannot be decoded, or if it contains an address that the policy rejects.
    /// Arbitrary bytes never cause a panic.
    pub(crate) fn read(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        if key.len() > MAX_VALUE || value.len() > MAX_VALUE {
            let reason = format!("has more than {MAX_VALUE} bytes, or its key does");
            return Err(FormatError::new(reason));
        }
        let read = match &self.format {
            None => recognise::by_value(key, value),
            Some(format) => format.decode_unchecked(key, value),
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

    /// Decodes a value without a key.
    #[cfg(test)]
    pub(crate) fn decode(&self, value: &[u8]) -> Result<Advertisement, FormatError> {
        let instance = self.read("", value)?;
        let instance = instance.ok_or(FormatError::of("is not an instance"))?;
        Ok(instance.advertisement().clone())
    }
}

impl Format {
    /// Decodes the instance at a key. The instance has no [id](Instance::id) and no [location](Instance::location), because these are known
    /// only after a read from etcd. Returns `None` if the key does not belong to an instance, or if the value
    /// marks the instance as out of service.
    ///
    /// # Errors
    ///
    /// Fails if the key or the value is over 64 KiB, if the value cannot be decoded, or if it contains an address that the policy rejects.
    /// Arbitrary bytes never cause a panic.
    pub fn decode(
        &self,
        key: &str,
        value: &[u8],
        policy: &AddressPolicy,
    ) -> Result<Option<Instance>, FormatError> {
        let decoder = Decoder {
            format: Some(self.clone()),
            policy: policy.clone(),
        };
        decoder.read(key, value)
    }

    /// Returns the format that a resolver without a format recognises in a value. [`decode`](Self::decode) of this format reads the value
    /// as that resolver does, if the name in the value is that in the key: [`Kratos`](Self::Kratos) and [`GoMicro`](Self::GoMicro) ignore
    /// other values.
    ///
    /// ```
    /// use tonic_etcd::Format;
    ///
    /// assert_eq!(Format::recognise(b"10.0.0.5:50051")?, Format::Plain);
    /// assert_eq!(Format::recognise(br#"{"Op":0,"Addr":"10.0.0.5:50051"}"#)?, Format::EtcdNaming);
    /// # Ok::<(), tonic_etcd::error::FormatError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Fails if the value is not UTF-8, or if it is JSON without an address in any known place.
    pub fn recognise(value: &[u8]) -> Result<Self, FormatError> {
        recognise::format_of(value).map(|recognised| match recognised {
            Recognised::EtcdNaming => Self::EtcdNaming,
            Recognised::DubboApplication => Self::DubboApplication,
            Recognised::Kitex => Self::Kitex,
            Recognised::GoMicro => Self::GoMicro,
            Recognised::Kratos => Self::Kratos,
            Recognised::Url => Self::Url,
            Recognised::Plain => Self::Plain,
        })
    }
}
