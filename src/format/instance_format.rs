//! The trait of all formats, open to users' own.

use std::fmt;

use super::FormatError;
use crate::instance::{DEFAULT_WEIGHT, Instance};
use crate::keyspace::DEFAULT_PREFIX;

/// How instances are written as keys and values, and read again. Those of [`Format`](super::Format) are made of it, and so can be one of
/// your own, with [`Format::Custom`](super::Format::Custom).
///
/// ```
/// use tonic_etcd::{AddressPolicy, Format, FormatError, Instance, InstanceFormat};
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
/// let format = Format::Custom(&WithZone);
/// let instance = Instance::new("10.0.0.5:50051".parse()?).with_zone("eu-1a");
/// let key = format.key(None, "greeter", &instance)?;
/// assert_eq!(key, "/services/greeter/10.0.0.5:50051");
/// let value = format.encode(&key, &instance)?;
/// assert_eq!(value, b"10.0.0.5:50051;eu-1a");
/// assert_eq!(format.decode(&key, &value, &AddressPolicy::default())?, Some(instance.clone()));
/// // What the format cannot hold is refused, not lost.
/// assert!(format.encode(&key, &instance.with_weight(3)).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait InstanceFormat: fmt::Debug + Send + Sync {
    /// The format's name in messages.
    fn name(&self) -> &str;

    /// Where services live unless the registry is given a [prefix](crate::RegistryBuilder::prefix). It is empty or ends in a slash.
    /// Default `/gRPC/`.
    fn default_prefix(&self) -> &str {
        DEFAULT_PREFIX
    }

    /// The weight of an instance whose value names none, and of a registration that sets none: 1 to 1 000 000. Default 1.
    fn default_weight(&self) -> u32 {
        DEFAULT_WEIGHT
    }

    /// What a service's keys begin with, and is watched. It has to end in a slash, so that `user` never sees the instances of
    /// `user-admin`. Default `<prefix><service>/`.
    fn service_prefix(&self, prefix: &str, service: &str) -> String {
        format!("{prefix}{service}/")
    }

    /// The key of an instance, which begins with the [service's prefix](Self::service_prefix). By default its id follows, or if it has
    /// none its address, so that a restarted server overwrites its old entry.
    fn key(&self, prefix: &str, service: &str, instance: &Instance) -> Result<String, FormatError> {
        let id = instance.id().unwrap_or(instance.address().as_str());
        Ok(self.service_prefix(prefix, service) + id)
    }

    /// The value of an instance at a key.
    ///
    /// What the format has no room for is left out: callers read the value again and compare.
    fn encode(&self, key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError>;

    /// The instance at a key, or `None` if the key is not one of an instance that may be called: of a folder, of a server of another
    /// protocol, of one that says it is out of service.
    ///
    /// It must not panic, whatever the bytes are. The address policy and the limits of size and weight are not its business.
    ///
    /// # Errors
    ///
    /// If the value cannot be read. Then it is skipped and counted, and the key's last good value stays.
    fn decode(&self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError>;
}
