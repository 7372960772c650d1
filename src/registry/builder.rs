//! The options of a registry, and the functions that connect it to etcd.

use tonic_balance::AddressPolicy;
use tonic_balance::traces::Traces;

use super::registry::Registry;
use crate::error::RegistryError;
use crate::etcd::{Config, Credentials, Etcd};
use crate::keyspace::{Key, Keyspace};
use crate::metrics::Metrics;
use crate::resolver::RunningResolvers;

impl Registry {
    /// Connects to etcd with default options and makes one round trip, so that a wrong address or a missing password is reported as an
    /// error.
    ///
    /// An endpoint is `host:port`, `http://host:port` or `https://host:port` (feature `tls`), with IPv6 addresses in brackets. Either all
    /// endpoints use TLS, or none of them does. Pass the endpoints of all members, because further members are not discovered. If a member
    /// does not respond to a request, the request is sent to another member within 2 s. A member that is down receives no requests.
    ///
    /// # Errors
    ///
    /// The variant and the message of the error distinguish these cases: no server responds, a server other than etcd responds, only one
    /// side uses TLS, or etcd rejects the user. The call fails after about 2 s if no server listens at the endpoints, and after about 5 s
    /// if a server listens but does not respond.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connections that it has opened.
    pub async fn connect<I>(endpoints: I) -> Result<Self, RegistryError>
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        Self::builder(endpoints).connect().await
    }

    /// Returns a builder for a registry with options.
    ///
    /// ```no_run
    /// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
    /// let registry = tonic_etcd::Registry::builder(["10.0.0.1:2379", "10.0.0.2:2379", "10.0.0.3:2379"])
    ///     .prefix("/production/")
    ///     .user("greeter", std::env::var("ETCD_PASSWORD")?)
    ///     .connect()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder<I>(endpoints: I) -> RegistryBuilder
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let endpoints = endpoints.into_iter().map(Into::into).collect();
        let config = Config {
            endpoints,
            ..Config::default()
        };
        RegistryBuilder {
            config,
            keyspace: Keyspace::default(),
            policy: AddressPolicy::default(),
            service_configs: None,
            traces: None,
        }
    }
}

/// A builder for a [`Registry`] with options; created by [`Registry::builder`].
#[derive(Clone)]
#[must_use = "there is no registry before `connect` or `connect_lazy`"]
pub struct RegistryBuilder {
    config: Config,
    keyspace: Keyspace,
    policy: AddressPolicy,
    service_configs: Option<String>,
    traces: Option<Traces>,
}

impl RegistryBuilder {
    /// Sets the prefix of the service keys. A missing trailing slash is added. The default is `/gRPC/`, or, with a
    /// [`Format`](crate::Format) of another library, the prefix of that library. With an empty prefix, keys begin with the service name, as
    /// for `etcd:///service` in grpc-go.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.keyspace = Keyspace::new(&prefix.into());
        self
    }

    /// Sets the etcd user. The default is no user. The token that etcd issues for the user is renewed whenever etcd rejects it.
    pub fn user(mut self, name: impl Into<String>, password: impl Into<String>) -> Self {
        self.config.credentials = Some(Credentials {
            user: name.into(),
            password: password.into(),
        });
        self
    }

    /// Enables TLS to etcd with this configuration. By default, endpoints with `https://` are verified against the system's root
    /// certificates.
    ///
    /// The certificate of every member must be valid for the name in the configuration. With
    /// [`TlsConfig::verify_dialled_host`](tonic_balance::TlsConfig::verify_dialled_host), the certificate must be valid for the member's
    /// own host instead. Certificate files are read again at each handshake, so renewed certificates need no restart.
    #[cfg(feature = "tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn tls_config(mut self, tls: tonic_balance::TlsConfig) -> Self {
        self.config.tls = Some(tls);
        self
    }

    /// Sets the policy for the addresses that resolvers accept and registrations may advertise. See [`AddressPolicy`] for the default.
    pub fn address_policy(mut self, policy: AddressPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Watches the service config of each service that the registry resolves, as
    /// [`ResolverBuilder::watch_service_config`](crate::resolver::ResolverBuilder::watch_service_config) does for one resolver. The usual
    /// prefix is `/gRPC.control/`. Disabled by default.
    pub fn watch_service_configs(mut self, control_prefix: impl Into<String>) -> Self {
        self.service_configs = Some(control_prefix.into());
        self
    }

    /// Enables metrics: passes a [`Recorder`](crate::metrics::Recorder), or a [`Metrics`] that also selects the instruments. Disabled by
    /// default. The metrics cover the channels, resolvers and registrations of the registry, and its requests to etcd.
    pub fn metrics(mut self, metrics: impl Into<Metrics>) -> Self {
        self.config.metrics = Some(metrics.into());
        self
    }

    /// Enables the traces of the channels of the registry: each call and each of its attempts has a span of the crate `tracing`. Disabled by
    /// default. The module [`traces`](crate::traces) describes the spans. Requests to etcd have no spans.
    pub fn traces(mut self, traces: Traces) -> Self {
        self.traces = Some(traces);
        self
    }

    /// Connects to etcd and makes one round trip.
    ///
    /// # Errors
    ///
    /// Fails as [`Registry::connect`] does.
    pub async fn connect(self) -> Result<Registry, RegistryError> {
        // The round trip reads the prefix itself as a key. No server writes this key, and every user with read access to the prefix may
        // read it. An empty key is not valid in etcd, so `/` is read instead of an empty prefix.
        let probe = match self.keyspace.prefix() {
            "" => "/",
            prefix => prefix,
        };
        let etcd = Etcd::connect(&self.config, &Key::from(probe)).await?;
        Ok(self.over(etcd))
    }

    /// Creates a registry that connects at its first request, for programs that must start while etcd is down. Wrong addresses, a wrong
    /// user or a wrong TLS configuration are reported later: the first registration fails, but a resolver or channel reports the error in
    /// its status and retries.
    ///
    /// For a server, set a [`startup_timeout`](crate::registration::RegistrationBuilder::startup_timeout) that is longer than the expected
    /// outage, because the registration fails if etcd does not become available within this time.
    ///
    /// ```
    /// use tonic_etcd::Registry;
    ///
    /// # fn main() -> Result<(), tonic_etcd::error::RegistryError> {
    /// let registry = Registry::builder(["127.0.0.1:2379"]).connect_lazy()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Fails if no endpoint is configured, or if an endpoint is not valid.
    pub fn connect_lazy(self) -> Result<Registry, RegistryError> {
        let etcd = Etcd::connect_lazy(&self.config)?;
        Ok(self.over(etcd))
    }

    fn over(self, etcd: Etcd) -> Registry {
        Registry {
            etcd,
            keyspace: self.keyspace,
            policy: self.policy,
            service_configs: self.service_configs,
            traces: self.traces,
            resolvers: RunningResolvers::default(),
        }
    }
}

impl std::fmt::Debug for RegistryBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryBuilder")
            // Endpoints are checked only when the registry connects. Until then, they can contain a password, so only their number is
            // shown.
            .field("endpoints", &self.config.endpoints.len())
            .field("prefix", &self.keyspace.prefix())
            .finish_non_exhaustive()
    }
}
