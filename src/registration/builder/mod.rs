//! The options of a registration, and their check.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;

use super::serve::ServeOptions;
use super::{Registration, RegistrationState};
use crate::error::RegisterError;
use crate::etcd::Etcd;
use crate::format::Format;
use crate::keyspace::Keyspace;
use tonic_balance::AddressPolicy;

mod address;
mod check;
mod serve;

pub(super) use check::check_weight;

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
    further: Vec<String>,
    dedicated_thread: bool,
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
            further: Vec::new(),
            dedicated_thread: false,
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

    /// Registers the server for one more service, with the same address, id, attributes and lease. Call it once for each.
    ///
    /// A server of many services so costs etcd one lease and one renewal. What is done to the registration is done to all of them;
    /// [`Registration::deregister_service`] takes a single one out. A registration at an exact key has no further services.
    ///
    /// ```no_run
    /// # async fn run(registry: tonic_etcd::Registry) -> Result<(), tonic_etcd::RegisterError> {
    /// let registration = registry
    ///     .registration("helloworld.Greeter")
    ///     .additional_service("routeguide.RouteGuide")
    ///     .address("10.0.0.5:50051")
    ///     .register()
    ///     .await?;
    /// registration.deregister_service("routeguide.RouteGuide").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn additional_service(mut self, service: impl Into<String>) -> Self {
        self.further.push(service.into());
        self
    }

    /// Keeps the registration on a thread and over connections of its own: the lease is renewed even while calls keep every thread of
    /// the runtime busy for longer than the TTL. Off by default. A client given to [`Registry::from_client`](crate::Registry::from_client)
    /// keeps its connections where it has them.
    pub fn dedicated_thread(mut self, dedicated_thread: bool) -> Self {
        self.dedicated_thread = dedicated_thread;
        self
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
    /// second are rounded up. Default 15 s. The lease is renewed at a third of what etcd grants. It is a minimum: whenever etcd elects a
    /// leader the time of each lease begins anew.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// The form of the key and the value. Default [`Format::EtcdNaming`].
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// How long [`register`](Self::register) goes on trying while etcd cannot be reached. Default 30 s. What may have reached etcd by then is
    /// taken back before it returns, for up to [`deregister_timeout`](Self::deregister_timeout) and one second more. A registration that has once
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
    pub fn watch_state(&self) -> watch::Receiver<RegistrationState> {
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
        Registration::start(
            self.etcd,
            entry,
            self.deregister_timeout,
            self.dedicated_thread,
            self.states,
        )
    }
}

const DEFAULT_TTL: Duration = Duration::from_secs(15);
const STARTUP_TIMEOUT: Duration = Duration::from_secs(30);
const DEREGISTER_TIMEOUT: Duration = Duration::from_secs(5);
