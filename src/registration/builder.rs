//! The options of a registration, and their check.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use tokio::sync::watch;

use super::serve::ServeOptions;
use super::{Entry, Registration, RegistrationState};
use crate::address::{Address, AddressError, AddressPolicy};
use crate::error::RegisterError;
use crate::etcd::Etcd;
use crate::format::{Format, MAX_WEIGHT, RESERVED};
use crate::instance::{Advertisement, Instance, Registered};
use crate::keyspace::{Keyspace, check_service};

/// A registration that is being described; made by [`Registry::registration`](crate::Registry::registration) and
/// [`Registry::registration_at`](crate::Registry::registration_at).
///
/// Nothing is checked and nothing sent before [`register`](Self::register), or before the server that it is handed to has bound its
/// socket.
#[derive(Debug)]
#[must_use = "nothing is registered before `register` is awaited"]
pub struct RegistrationBuilder {
    etcd: Etcd,
    policy: AddressPolicy,
    target: Target,
    address: Option<String>,
    host: Option<String>,
    advertisement: Attributes,
    ttl: Duration,
    format: Format,
    pub(crate) startup_timeout: Duration,
    pub(super) deregister_timeout: Duration,
    pub(crate) serve: ServeOptions,
    pub(super) states: watch::Sender<RegistrationState>,
}

/// Where the registration goes.
#[derive(Debug)]
enum Target {
    Service {
        keyspace: Keyspace,
        service: String,
        id: Option<String>,
    },
    Key(String),
}

#[derive(Debug)]
struct Attributes {
    weight: Option<u32>,
    tls: bool,
    zone: Option<String>,
    version: Option<String>,
    metadata: Vec<(String, String)>,
}

impl RegistrationBuilder {
    pub(crate) fn service(
        etcd: Etcd,
        policy: AddressPolicy,
        keyspace: Keyspace,
        service: &str,
    ) -> Self {
        Self::new(
            etcd,
            policy,
            Target::Service {
                keyspace,
                service: service.to_owned(),
                id: None,
            },
        )
    }

    pub(crate) fn key(etcd: Etcd, policy: AddressPolicy, key: &str) -> Self {
        Self::new(etcd, policy, Target::Key(key.to_owned()))
    }

    fn new(etcd: Etcd, policy: AddressPolicy, target: Target) -> Self {
        Self {
            etcd,
            policy,
            target,
            address: None,
            host: None,
            advertisement: Attributes {
                weight: None,
                tls: false,
                zone: None,
                version: None,
                metadata: Vec::new(),
            },
            ttl: DEFAULT_TTL,
            format: Format::default(),
            startup_timeout: STARTUP_TIMEOUT,
            deregister_timeout: DEREGISTER_TIMEOUT,
            serve: ServeOptions::default(),
            states: watch::Sender::new(RegistrationState::Registering { last_error: None }),
        }
    }

    /// The address that clients are to dial, as `host:port`; IPv6 in brackets.
    ///
    /// A server that registers itself ([`ServeRegistered`](crate::ServeRegistered)) needs none: it advertises what it has bound, and
    /// where that is unspecified (`0.0.0.0`, `::`) the local address that routes to etcd.
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.address = Some(address.into());
        self
    }

    /// The host that clients are to dial, with the port that the server has bound. By default the bound address decides.
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.host = Some(host.into());
        self
    }

    /// The instance's id, the last part of its key. By default the address, so that a restarted server overwrites its old entry. No
    /// effect on a registration at an exact key; refused where the [`Format`] has the address in that place.
    pub fn instance_id(mut self, instance_id: impl Into<String>) -> Self {
        if let Target::Service { id, .. } = &mut self.target {
            *id = Some(instance_id.into());
        }
        self
    }

    /// The weight, 1 to 1 000 000: the share of calls relative to the other instances'. By default that of an instance of the
    /// [`Format`] which names none: 1, in other libraries' formats also 10 or 100.
    pub fn weight(mut self, weight: u32) -> Self {
        self.advertisement.weight = Some(weight);
        self
    }

    /// Says in the registry that the server speaks TLS, where the [`Format`] has a word for that. It is a hint for the clients of other
    /// libraries, which may choose by it how they connect; those of this one do not. Not said by default.
    pub fn tls_hint(mut self, tls: bool) -> Self {
        self.advertisement.tls = tls;
        self
    }

    /// The zone. None by default.
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.advertisement.zone = Some(zone.into());
        self
    }

    /// The version. None by default.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.advertisement.version = Some(version.into());
        self
    }

    /// Adds one pair of metadata. The names `weight`, `zone`, `version` and `leaving` have setters or a meaning of their own, and are
    /// refused.
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.advertisement
            .metadata
            .push((name.into(), value.into()));
        self
    }

    /// How long etcd keeps the entry of a server that has died, at least 2 s (etcd's own minimum with default settings); parts of a
    /// second are rounded up. Default 15 s. The lease is renewed at a third of what etcd grants.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// The form of the key and the value. Default [`Format::EtcdNaming`].
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// How long [`register`](Self::register) goes on trying while etcd cannot be reached. Default 30 s. A registration that has once
    /// succeeded tries for ever.
    pub fn startup_timeout(mut self, timeout: Duration) -> Self {
        self.startup_timeout = timeout;
        self
    }

    /// How long [`deregister`](Registration::deregister), and a change of a registration, go on trying while etcd cannot be reached.
    /// Default 5 s. What a deregistration could not remove goes with its lease.
    pub fn deregister_timeout(mut self, timeout: Duration) -> Self {
        self.deregister_timeout = timeout;
        self
    }

    /// The registration's state as a watch, from before it is registered: for those who hand the builder to a server and keep this.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<RegistrationState> {
        self.states.subscribe()
    }

    /// Registers the server and keeps it registered until [`Registration::deregister`].
    ///
    /// Returns once the key is in etcd. An entry that somebody left under the same key, by crashing for instance, is overwritten.
    ///
    /// # Errors
    ///
    /// What is not valid is refused by name before etcd is touched. What only an operator can mend (permission denied, credentials) is
    /// returned at once, and an etcd that cannot be reached after [`startup_timeout`](Self::startup_timeout). Then nothing stays
    /// registered.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future takes back what has been done, in the background.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn register(self) -> Result<Registration, RegisterError> {
        let startup_timeout = self.startup_timeout;
        let registration = self.start(None).await?;
        if let Err(error) = registration.registered(startup_timeout).await {
            // What may have reached etcd is taken back before anybody is told that it failed.
            if let Err(error) = registration.deregister().await {
                tracing::debug!(%error, "could not take the registration back; it goes with its lease");
            }
            return Err(error);
        }
        Ok(registration)
    }

    /// Starts to register a server that listens on `bound`.
    pub(crate) async fn start(
        self,
        bound: Option<SocketAddr>,
    ) -> Result<Registration, RegisterError> {
        self.check()?;
        let entry = self.entry(self.advertised(bound).await?)?;
        Ok(Registration::start(
            self.etcd,
            entry,
            self.deregister_timeout,
            self.states,
        ))
    }

    /// Checks everything that can be known to be wrong without etcd, and for a server before it has a port.
    pub(crate) fn check(&self) -> Result<(), RegisterError> {
        self.check_values().map_err(|reason| self.invalid(reason))?;
        let address = match (&self.address, &self.target) {
            (Some(address), _) => self.accepted(address.parse())?,
            (None, Target::Service { .. }) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1).into(),
            // A key that was given may be right only for the address to come.
            (None, Target::Key(key)) => {
                return check_key(key).map_err(|reason| self.invalid(reason));
            }
        };
        self.entry(address).map(drop)
    }

    fn invalid(&self, reason: String) -> RegisterError {
        RegisterError::Invalid {
            service: self.name().to_owned(),
            reason,
        }
    }

    fn accepted(&self, address: Result<Address, AddressError>) -> Result<Address, RegisterError> {
        let checked = address.and_then(|address| self.policy.check(&address).map(|()| address));
        checked.map_err(|source| RegisterError::Address {
            service: self.name().to_owned(),
            source,
        })
    }

    /// The service that is registered; none at an exact key.
    #[cfg(feature = "health")]
    pub(super) fn service_name(&self) -> Option<&str> {
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

    fn entry(&self, address: Address) -> Result<Entry, RegisterError> {
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
        let key = self.instance_key(&advertisement)?;
        let refused = |error| format!("the format {:?} {error}", self.format);
        let entry = Entry::new(&key, advertisement, self.format, whole_seconds(self.ttl));
        entry.map_err(refused)
    }

    fn check_values(&self) -> Result<(), String> {
        let Attributes {
            weight, metadata, ..
        } = &self.advertisement;
        if let Target::Service { service, .. } = &self.target {
            check_service(service).map_err(|reason| format!("the service name {reason}"))?;
        }
        if let Some(weight) = weight {
            check_weight(*weight)?;
        }
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
        Ok(())
    }

    fn instance_key(&self, advertisement: &Advertisement) -> Result<String, String> {
        let (keyspace, service, id) = match &self.target {
            Target::Service {
                keyspace,
                service,
                id,
            } => (keyspace, service, id.as_deref()),
            Target::Key(key) => return check_key(key).map(|()| key.clone()),
        };
        if id
            .is_some_and(|id| id.is_empty() || id.contains('/') || id.chars().any(char::is_control))
        {
            return Err(format!(
                "the instance id {id:?} is empty, or contains a slash or a control character"
            ));
        }
        let id = id.unwrap_or_default();
        let registered = Registered {
            id: id.to_owned(),
            ..Registered::default()
        };
        let instance = Instance::registered(advertisement.clone(), registered);
        let format = self.format;
        let key = format.key(keyspace.given(), service, &instance);
        let key = key.map_err(|error| format!("the format {format:?} {error}"))?;
        if !key.ends_with(id) {
            return Err(format!(
                "the format {format:?} has no room for an instance id: the address stands in its place"
            ));
        }
        // What is not under it would be found by nobody.
        let prefix = format.service_prefix(keyspace.given(), service);
        if !key.starts_with(&prefix) || key.ends_with('/') {
            return Err(format!(
                "the format {format:?} makes the key {key:?}, which is not below {prefix:?}"
            ));
        }
        Ok(key)
    }

    async fn advertised(&self, bound: Option<SocketAddr>) -> Result<Address, RegisterError> {
        let address = match (&self.address, &self.host, bound) {
            (Some(address), _, _) => address.parse(),
            (None, Some(host), Some(bound)) => with_port(host, bound.port()),
            (None, None, Some(bound)) if bound.ip().is_unspecified() => self.routed(bound).await,
            (None, None, Some(bound)) => Ok(bound.into()),
            (None, _, None) => Err(AddressError::new("", "is not given")),
        };
        self.accepted(address)
    }

    /// The local address that routes to etcd: peers that reach the same etcd are most likely to reach us there.
    async fn routed(&self, bound: SocketAddr) -> Result<Address, AddressError> {
        // A client of the user's own does not say where its etcd is; the default route is the next best.
        let fallback = ["192.0.2.1:9", "[2001:db8::1]:9"].map(String::from);
        for target in self.etcd.endpoints().into_iter().chain(fallback) {
            if let Some(ip) = local_ip(target, bound.ip()).await {
                return Ok(SocketAddr::new(ip, bound.port()).into());
            }
        }
        let reason = "is unspecified, and no local address routes to etcd";
        Err(AddressError::new(&bound.to_string(), reason))
    }
}

/// The local address from which the kernel would send to `target`. Connecting a UDP socket sends nothing.
async fn local_ip(target: String, bound: IpAddr) -> Option<IpAddr> {
    let targets = tokio::net::lookup_host(target).await.ok()?;
    for target in targets {
        let any: SocketAddr = match target {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            // A socket bound to 0.0.0.0 takes no IPv6; one bound to [::] takes both.
            SocketAddr::V6(_) if bound.is_ipv4() => continue,
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let local = UdpSocket::bind(any).and_then(|socket| {
            socket.connect(target)?;
            socket.local_addr()
        });
        if let Ok(local) = local
            && !local.ip().is_unspecified()
        {
            return Some(local.ip());
        }
    }
    None
}

fn with_port(host: &str, port: u16) -> Result<Address, AddressError> {
    match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(ip) => Ok(SocketAddr::new(ip, port).into()),
        Err(_) => format!("{host}:{port}").parse(),
    }
}

fn check_key(key: &str) -> Result<(), String> {
    if key.is_empty() || key.ends_with('/') {
        return Err("the key is empty or ends in a slash, and so names no instance".to_owned());
    }
    Ok(())
}

pub(super) fn check_weight(weight: u32) -> Result<(), String> {
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

const DEFAULT_TTL: Duration = Duration::from_secs(15);
/// The smallest that etcd grants with its default election timeout (measured on 3.4.23).
const MIN_TTL: Duration = Duration::from_secs(2);
/// An entry that outlives its server for longer helps nobody; it is a mistake of units.
const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);
const STARTUP_TIMEOUT: Duration = Duration::from_secs(30);
const DEREGISTER_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_get_the_bound_port() {
        for (host, address) in [
            ("10.0.0.5", "10.0.0.5:80"),
            ("::1", "[::1]:80"),
            ("[::1]", "[::1]:80"),
            ("greeter", "greeter:80"),
        ] {
            assert_eq!(with_port(host, 80).expect("valid").as_str(), address);
        }
        assert!(with_port("a:1", 80).is_err());
    }

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

    #[tokio::test]
    async fn the_route_to_a_loopback_etcd_is_loopback() {
        let local = local_ip("127.0.0.1:2379".to_owned(), Ipv4Addr::UNSPECIFIED.into()).await;
        assert_eq!(local, Some(Ipv4Addr::LOCALHOST.into()));
    }
}
