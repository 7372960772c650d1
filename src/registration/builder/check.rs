//! Checks the options of a registration before the first request to etcd.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::registration_builder::{Attributes, RegistrationBuilder, Target};
use crate::error::RegisterError;
use crate::format::RESERVED;
use crate::instance::{Advertisement, Instance};
use crate::keyspace::{Keyspace, Range, SERVICE_MAX, check_service, with_slash};
use crate::registration::entry::{Entry, check_weight};
use crate::registration::ttl::{DEFAULT_TTL, Ttl};
use tonic_balance::{Address, error::AddressError};

impl RegistrationBuilder {
    /// Checks everything that can be checked without etcd. If a server registers itself, this check runs before the listener is bound, so
    /// the port may be unknown.
    pub(crate) fn check(&self) -> Result<(), RegisterError> {
        self.check_values().map_err(|reason| self.invalid(reason))?;
        let address = match (&self.address, &self.target) {
            (Some(address), _) => self.accepted(address.parse())?,
            (None, Target::Service { .. }) => {
                // The address is not known yet. A placeholder takes its place, so that the other options can be checked.
                let any = Address::try_from(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
                any.map_err(|error| self.invalid(error.to_string()))?
            }
            // Whether a format accepts an exact key can depend on the real address, which is not known yet.
            (None, Target::Key(key)) => {
                return check_key(key).map_err(|reason| self.invalid(reason));
            }
        };
        self.entry(address).map(drop)
    }

    /// Rejects options that have an effect only if a server registers itself ([`ServeRegistered`](crate::ServeRegistered)).
    pub(super) fn check_without_server(&self) -> Result<(), RegisterError> {
        self.serve.first_set().map_or(Ok(()), |option| {
            Err(self.invalid(format!(
                "`{option}` applies only to a server that registers itself; call `serve_registered` instead of `register`, or remove the option"
            )))
        })
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
        checked.map_err(|cause| RegisterError::Address {
            service: self.name().to_owned(),
            cause,
        })
    }

    fn name(&self) -> &str {
        match &self.target {
            Target::Service { service, .. } => service,
            Target::Key(key) => key,
        }
    }

    pub(super) fn entry(&self, address: Address) -> Result<Entry, RegisterError> {
        self.checked_entry(address)
            .map_err(|reason| self.invalid(reason))
    }

    fn checked_entry(&self, address: Address) -> Result<Entry, String> {
        let Attributes {
            weight,
            tls,
            zone,
            version,
            metadata,
        } = &self.advertisement;
        let mut advertisement = Advertisement::new(address);
        advertisement.weight = weight.unwrap_or(self.format.default_weight());
        advertisement.tls = *tls;
        advertisement.zone.clone_from(zone);
        advertisement.version.clone_from(version);
        advertisement.metadata = metadata.iter().cloned().collect();
        let keys = self.instance_keys(&advertisement)?;
        let ttl = self.lease_ttl();
        let entry = Entry::new(
            &keys,
            self.services(),
            advertisement,
            self.format.clone(),
            ttl,
        );
        entry.map_err(|error| format!("the format {:?} {error}", self.format))
    }

    fn lease_ttl(&self) -> Ttl {
        match (self.ttl, &self.target) {
            (Some(ttl), _) => Ttl::Fixed(whole_seconds(ttl)),
            (None, Target::Service { keyspace, service }) => {
                let prefix = self.format.service_prefix(keyspace.given(), service);
                Ttl::ByServers(Range::prefix(&prefix))
            }
            (None, Target::Key(_)) => Ttl::Fixed(DEFAULT_TTL),
        }
    }

    fn check_values(&self) -> Result<(), String> {
        let Attributes {
            weight, metadata, ..
        } = &self.advertisement;
        if let Target::Service { service, .. } = &self.target {
            check_service(service).map_err(|reason| format!("the service name {reason}"))?;
        }
        if let (Target::Key(key), Some(id)) = (&self.target, &self.instance_id) {
            return Err(format!(
                "a registration at the exact key {key:?} cannot have the instance id {id:?}; remove `instance_id`"
            ));
        }
        self.check_further()?;
        self.check_control_prefix()?;
        if let Some(weight) = weight {
            check_weight(*weight)?;
        }
        if let Some(ttl) = self.ttl
            && !(MIN_TTL..=MAX_TTL).contains(&ttl)
        {
            return Err(format!(
                "the TTL is {} s; it must be from 2 s to 1 day",
                ttl.as_secs_f64()
            ));
        }
        for (name, _) in metadata {
            if name.is_empty() {
                return Err("a metadata name is empty".to_owned());
            }
            if RESERVED.contains(&name.as_str()) {
                return Err(format!(
                    "the metadata name {name:?} is reserved for the attribute of that name"
                ));
            }
        }
        Ok(())
    }

    fn check_control_prefix(&self) -> Result<(), String> {
        let Some(prefix) = &self.control_prefix else {
            return Ok(());
        };
        if prefix.is_empty() || prefix.chars().any(char::is_control) || prefix.len() > MAX_KEY {
            return Err(format!(
                "the control prefix {prefix:?} is empty, longer than {MAX_KEY} bytes, or contains a control character"
            ));
        }
        let Target::Service { keyspace, service } = &self.target else {
            return Err(
                "a registration at an exact key has no service, so it cannot have `operator_control`"
                    .to_owned(),
            );
        };
        let instances = self.format.service_prefix(keyspace.given(), service);
        let control = format!("{}{service}/", with_slash(prefix));
        if control.starts_with(&instances) {
            return Err(format!(
                "the control prefix {prefix:?} leads to keys below {instances:?}, the prefix of the instances; use another one, such as /gRPC.control/"
            ));
        }
        Ok(())
    }

    fn check_further(&self) -> Result<(), String> {
        if let (Target::Key(_), Some(service)) = (&self.target, self.further.first()) {
            return Err(format!(
                "a registration at an exact key cannot have the additional service {service:?}"
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

    /// Returns the names of the services. Empty for an exact key.
    pub(crate) fn services(&self) -> Vec<String> {
        match &self.target {
            Target::Service { service, .. } => {
                let further = self.further.iter().cloned();
                std::iter::once(service.clone()).chain(further).collect()
            }
            Target::Key(_) => Vec::new(),
        }
    }

    fn instance_keys(&self, advertisement: &Advertisement) -> Result<Vec<String>, String> {
        let (keyspace, id) = match &self.target {
            Target::Service { keyspace, .. } => (keyspace, self.instance_id.as_deref()),
            Target::Key(key) => return check_key(key).map(|()| vec![key.clone()]),
        };
        if id.is_some_and(|id| id.len() > SERVICE_MAX) {
            return Err(format!(
                "the instance id is longer than {SERVICE_MAX} bytes"
            ));
        }
        if let Some(id) = id
            && (id.is_empty() || id.contains('/') || id.chars().any(char::is_control))
        {
            return Err(format!(
                "the instance id {id:?} is empty, or contains a slash or a control character"
            ));
        }
        let instance = Instance::from(advertisement.clone()).with_id(id);
        let id = id.unwrap_or_default();
        let services = self.services();
        let key = |service: &String| self.instance_key(keyspace, service, id, &instance);
        services.iter().map(key).collect()
    }

    fn instance_key(
        &self,
        keyspace: &Keyspace,
        service: &str,
        id: &str,
        instance: &Instance,
    ) -> Result<String, String> {
        let format = &self.format;
        let key = format.key(keyspace.given(), service, instance);
        let key = key.map_err(|error| format!("the format {format:?} {error}"))?;
        if !key.ends_with(id) {
            return Err(format!(
                "the format {format:?} cannot have an instance id, because its keys end with the address"
            ));
        }
        // A resolver finds only keys below the prefix of the service.
        let prefix = format.service_prefix(keyspace.given(), service);
        if !key.starts_with(&prefix) || key.ends_with('/') {
            return Err(format!(
                "the format {format:?} returns the key {key:?}, which is not a key under the prefix {prefix:?}"
            ));
        }
        Ok(key)
    }
}

fn check_key(key: &str) -> Result<(), String> {
    if key.is_empty() || key.ends_with('/') {
        return Err("the key must not be empty and must not end in a slash".to_owned());
    }
    if key.len() > MAX_KEY || key.chars().any(char::is_control) {
        return Err(format!(
            "the key is longer than {MAX_KEY} bytes or contains a control character"
        ));
    }
    Ok(())
}

fn whole_seconds(ttl: Duration) -> Duration {
    Duration::from_secs(ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0))
}

/// Minimum TTL: the smallest one that etcd grants with its default election timeout (measured on 3.4.23).
const MIN_TTL: Duration = Duration::from_secs(2);
/// Maximum TTL. A larger value is most likely a mistake in the unit.
const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// Maximum length of an exact key, in bytes. Resolvers reject keys longer than 64 KiB. This limit is lower, because a key of more than
/// 4 KiB is most likely a mistake.
const MAX_KEY: usize = 4_096;

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
