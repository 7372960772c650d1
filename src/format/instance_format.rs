//! The trait that all formats implement. An application can implement it for a format of its own.

use std::fmt;

use super::error::FormatError;
use crate::instance::{DEFAULT_WEIGHT, Instance};
use crate::keyspace::DEFAULT_PREFIX;

/// Encodes and decodes the keys and values of instances. The formats of [`Format`](super::Format) implement this trait.
/// [`Format::custom`](super::Format::custom) takes your own implementation.
///
/// ```
/// use tonic_etcd::{AddressPolicy, Format, Instance, error::FormatError, format::InstanceFormat};
///
/// /// `host:port;zone`
/// #[derive(Debug)]
/// struct WithZone;
///
/// impl InstanceFormat for WithZone {
///     fn name(&self) -> &str {
///         "WithZone"
///     }
///
///     fn default_prefix(&self) -> &str {
///         "/services/"
///     }
///
///     fn encode(&self, _key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
///         let zone = instance.zone().unwrap_or_default();
///         Ok(format!("{};{zone}", instance.address()).into_bytes())
///     }
///
///     fn decode(&self, _key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
///         let text = str::from_utf8(value).map_err(|_| FormatError::new("is not UTF-8"))?;
///         let (address, zone) = text.split_once(';').ok_or(FormatError::new("has no zone"))?;
///         let address = address.parse().map_err(|_| FormatError::new("has no address"))?;
///         let instance = Instance::new(address);
///         Ok(Some(if zone.is_empty() { instance } else { instance.with_zone(zone) }))
///     }
/// }
///
/// let format = Format::custom(WithZone);
/// let instance = Instance::new("10.0.0.5:50051".parse()?).with_zone("eu-1a");
/// let key = format.key(None, "greeter", &instance)?;
/// assert_eq!(key, "/services/greeter/10.0.0.5:50051");
/// let value = format.encode(&key, &instance)?;
/// assert_eq!(value, b"10.0.0.5:50051;eu-1a");
/// assert_eq!(format.decode(&key, &value, &AddressPolicy::default())?, Some(instance.clone()));
/// // An attribute that the format cannot represent is rejected, not lost.
/// assert!(format.encode(&key, &instance.with_weight(3)).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait InstanceFormat: fmt::Debug + Send + Sync {
    /// Returns the name of the format, for error messages and logs.
    fn name(&self) -> &str;

    /// Returns the prefix of all services. A [prefix](crate::registry::RegistryBuilder::prefix) of the registry replaces it. The prefix can
    /// be empty. If any other prefix does not end in a slash, a slash is appended. The default is `/gRPC/`.
    fn default_prefix(&self) -> &str {
        DEFAULT_PREFIX
    }

    /// Returns the default weight, 1 to 1 000 000, for an instance whose value has no weight, and for a registration without a weight. The
    /// default implementation returns 1.
    fn default_weight(&self) -> u32 {
        DEFAULT_WEIGHT
    }

    /// Returns the prefix of all keys of a service. A resolver reads and watches the keys under this prefix. The prefix must end in a
    /// slash, so that `user` does not match the instances of `user-admin`. The default is `<prefix><service>/`.
    fn service_prefix(&self, prefix: &str, service: &str) -> String {
        format!("{prefix}{service}/")
    }

    /// Returns the key of an instance. The key begins with the [service's prefix](Self::service_prefix). By default the instance id
    /// follows, or the address if the instance has no id. With the address, a restarted server overwrites its old entry.
    ///
    /// # Errors
    ///
    /// Fails if the format has no key for the instance. The registration is then rejected. The default implementation never fails.
    fn key(&self, prefix: &str, service: &str, instance: &Instance) -> Result<String, FormatError> {
        let id = instance.id().unwrap_or(instance.address().as_str());
        Ok(self.service_prefix(prefix, service) + id)
    }

    /// Encodes the value of an instance at a key.
    ///
    /// The value may omit attributes that the format cannot represent: callers decode the value again, and reject the instance if an
    /// attribute is missing.
    ///
    /// # Errors
    ///
    /// Fails if the format has no value for the instance. The registration is then rejected.
    fn encode(&self, key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError>;

    /// Decodes the instance at a key. Returns `None` if the key is not the key of an instance that can be called: for example, if it
    /// belongs to a folder, to a server that does not serve gRPC, or to an instance that is marked as out of service.
    ///
    /// The function must not panic, whatever the bytes are. The callers check the address policy and the limits on size and weight.
    ///
    /// # Errors
    ///
    /// Fails if the value cannot be decoded. The value is then skipped and counted, and the last valid value of the key stays in use.
    fn decode(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError>;
}
