//! What is wrong with a registration before etcd is touched.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::super::Entry;
use super::{Attributes, RegistrationBuilder, Target};
use crate::address::{Address, AddressError};
use crate::error::RegisterError;
use crate::format::MAX_VALUE;
use crate::format::etcd_naming::{MAX_WEIGHT, RESERVED};
use crate::instance::{Advertisement, DEFAULT_WEIGHT};
use crate::keyspace::{Key, check_service};

impl RegistrationBuilder {
    /// Checks everything that can be known to be wrong without etcd, and for a server before it has a port.
    pub(crate) fn check(&self) -> Result<(), RegisterError> {
        self.check_values().map_err(|reason| self.invalid(reason))?;
        let address = match &self.address {
            Some(address) => self.accepted(address.parse())?,
            None => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1).into(),
        };
        self.entry(address).map(drop)
    }

    fn invalid(&self, reason: String) -> RegisterError {
        RegisterError::Invalid {
            service: self.name().to_owned(),
            reason,
        }
    }

    pub(super) fn accepted(
        &self,
        address: Result<Address, AddressError>,
    ) -> Result<Address, RegisterError> {
        let checked = address.and_then(|address| self.policy.check(&address).map(|()| address));
        checked.map_err(|source| RegisterError::Address {
            service: self.name().to_owned(),
            source,
        })
    }

    /// The service that is registered; none at an exact key.
    #[cfg(feature = "health")]
    pub(in crate::registration) fn service_name(&self) -> Option<&str> {
        match &self.target {
            Target::Service { service, .. } => Some(service),
            Target::Key(_) => None,
        }
    }

    fn name(&self) -> &str {
        match &self.target {
            Target::Service { service, .. } => service,
            Target::Key(key) => key,
        }
    }

    pub(super) fn entry(&self, address: Address) -> Result<Entry, RegisterError> {
        let keys = self.instance_keys(&address);
        let keys = keys.map_err(|reason| self.invalid(reason))?;
        let Attributes {
            weight,
            zone,
            version,
            metadata,
        } = &self.advertisement;
        let advertisement = Advertisement {
            address,
            weight: *weight,
            zone: zone.clone(),
            version: version.clone(),
            metadata: metadata.iter().cloned().collect(),
            leaving: false,
        };
        // As large as it can become: what is written later must not be refused by its readers.
        let largest = Advertisement {
            weight: MAX_WEIGHT,
            leaving: true,
            ..advertisement.clone()
        };
        let size = self.format.encode(&largest).len();
        if size > MAX_VALUE {
            return Err(self.invalid(format!(
                "the value can be {size} bytes long, over the limit of {MAX_VALUE}; use less metadata"
            )));
        }
        Ok(Entry {
            keys,
            services: self.services(),
            advertisement,
            format: self.format,
            ttl: whole_seconds(self.ttl),
        })
    }

    fn check_values(&self) -> Result<(), String> {
        let Attributes {
            weight,
            zone,
            version,
            metadata,
        } = &self.advertisement;
        if let Target::Service { service, .. } = &self.target {
            check_service(service).map_err(|reason| format!("the service name {reason}"))?;
        }
        self.check_further()?;
        check_weight(*weight)?;
        if self.ttl < MIN_TTL || self.ttl > MAX_TTL {
            return Err(format!(
                "the TTL is {} s; it must be from 2 s to 1 day",
                self.ttl.as_secs_f64()
            ));
        }
        for (name, _) in metadata {
            if name.is_empty() {
                return Err("a metadata name is empty".to_owned());
            }
            if RESERVED.contains(&name.as_str()) {
                return Err(format!(
                    "the metadata name {name:?} is reserved; use the setter of that name"
                ));
            }
        }
        let plain =
            *weight == DEFAULT_WEIGHT && zone.is_none() && version.is_none() && metadata.is_empty();
        if !plain && !self.format.carries_attributes() {
            return Err(format!(
                "the format {:?} has no room for weight, zone, version or metadata",
                self.format
            ));
        }
        Ok(())
    }

    fn check_further(&self) -> Result<(), String> {
        if let (Target::Key(_), Some(service)) = (&self.target, self.further.first()) {
            return Err(format!(
                "a registration at an exact key has no further service such as {service:?}"
            ));
        }
        let services = self.services();
        for (index, service) in services.iter().enumerate() {
            check_service(service)
                .map_err(|reason| format!("the service name {service:?} {reason}"))?;
            if services[..index].contains(service) {
                return Err(format!("the service {service:?} is named twice"));
            }
        }
        Ok(())
    }

    /// The services by name; none for an exact key.
    fn services(&self) -> Vec<String> {
        match &self.target {
            Target::Service { service, .. } => {
                let further = self.further.iter().cloned();
                std::iter::once(service.clone()).chain(further).collect()
            }
            Target::Key(_) => Vec::new(),
        }
    }

    fn instance_keys(&self, address: &Address) -> Result<Vec<Key>, String> {
        match &self.target {
            Target::Service { keyspace, id, .. } => {
                let id = id.as_deref().unwrap_or(address.as_str());
                if id.is_empty() || id.contains('/') || id.chars().any(char::is_control) {
                    return Err(format!(
                        "the instance id {id:?} is empty, or contains a slash or a control character"
                    ));
                }
                let services = self.services();
                let key = |service: &String| keyspace.instance(service, id);
                Ok(services.iter().map(key).collect())
            }
            Target::Key(key) if key.is_empty() || key.ends_with('/') => {
                Err("the key is empty or ends in a slash, and so names no instance".to_owned())
            }
            Target::Key(key) => Ok(vec![Key::from(key.as_str())]),
        }
    }
}

pub(in crate::registration) fn check_weight(weight: u32) -> Result<(), String> {
    if (1..=MAX_WEIGHT).contains(&weight) {
        return Ok(());
    }
    Err(format!(
        "the weight is {weight}; it must be from 1 to {MAX_WEIGHT}. To get no calls, pause the registration"
    ))
}

fn whole_seconds(ttl: Duration) -> Duration {
    Duration::from_secs(ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0))
}

/// The smallest that etcd grants with its default election timeout (measured on 3.4.23).
const MIN_TTL: Duration = Duration::from_secs(2);
/// An entry that outlives its server for longer helps nobody; it is a mistake of units.
const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ttls_are_rounded_up() {
        assert_eq!(
            whole_seconds(Duration::from_millis(2_001)),
            Duration::from_secs(3)
        );
        assert_eq!(
            whole_seconds(Duration::from_secs(2)),
            Duration::from_secs(2)
        );
    }
}
