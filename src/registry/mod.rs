//! The entry point of the crate: one etcd cluster, and the location of services in it.

use tonic_balance::AddressPolicy;
use tonic_balance::{BalancedChannel, ChannelBuilder};

mod channel;
mod target;
mod tonic_channel;

pub use channel::connect;
use target::{Lookup, Target};

use crate::error::RegistryError;
use crate::etcd::{Config, Credentials, Etcd};
use crate::format::Format;
use crate::keyspace::{Key, Keyspace};
use crate::registration::RegistrationBuilder;
use crate::resolver::ResolverBuilder;

/// A registry of services in etcd. A clone is cheap, and all clones share the connections.
///
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use tonic_etcd::Registry;
///
/// let registry = Registry::connect(["127.0.0.1:2379"]).await?;
/// let channel = registry.channel("helloworld.Greeter").connect().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Registry {
    etcd: Etcd,
    keyspace: Keyspace,
    policy: AddressPolicy,
}

impl Registry {
    /// Connects to etcd with default options, and makes one round trip: a wrong address or a missing password is reported as an error.
    ///
    /// An endpoint is `host:port`, `http://host:port` or `https://host:port` (feature `tls`), with IPv6 addresses in brackets. Pass the
    /// endpoints of all members: a request that one member leaves unanswered is sent to another member within 2 s, and a member that is
    /// down receives no requests. Either all endpoints use TLS or none. Further members are not discovered.
    ///
    /// # Errors
    ///
    /// The variant and the message of the error distinguish these cases: no server responds, a server other than etcd responds, only one
    /// side uses TLS, or etcd rejects the user. The call fails after about 2 s if nothing listens, and after about 5 s if nothing responds.
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
        }
    }

    /// Creates a registry from an existing etcd client, under the default prefix. [`with_prefix`](Self::with_prefix) and
    /// [`with_address_policy`](Self::with_address_policy) set the other options.
    ///
    /// Build the client with `with_require_leader(true)` and `with_auto_token_refresh(true)`. Without them, a member that is cut off from
    /// its cluster stays silent, and an expired token is not renewed. Such a client does its own balancing, so failover from a frozen
    /// member depends on the client.
    #[must_use]
    pub fn from_client(client: etcd_client::Client) -> Self {
        Self {
            etcd: Etcd::from_client(client),
            keyspace: Keyspace::default(),
            policy: AddressPolicy::default(),
        }
    }

    /// Sets the prefix, as [`RegistryBuilder::prefix`] does. The new registry shares its connections with the original.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.keyspace = Keyspace::new(&prefix.into());
        self
    }

    /// Sets the address policy, as [`RegistryBuilder::address_policy`] does.
    #[must_use]
    pub fn with_address_policy(mut self, policy: AddressPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Returns the prefix of the service keys: the configured prefix, or `/gRPC/`.
    #[must_use]
    pub fn prefix(&self) -> &str {
        self.keyspace.prefix()
    }

    /// Returns a builder of a registration of a server for a service. The key will be `<prefix><service>/<instance id>`, or the key that
    /// its [`Format`] defines.
    ///
    /// The service name must not be empty and must not contain a slash. An invalid name is reported when the server is registered.
    pub fn registration(&self, service: impl Into<String>) -> RegistrationBuilder {
        RegistrationBuilder::service(
            self.etcd.clone(),
            self.policy.clone(),
            self.keyspace.clone(),
            &service.into(),
        )
    }

    /// Returns a builder of a registration at an exact key, regardless of the prefix.
    pub fn registration_at(&self, key: impl Into<String>) -> RegistrationBuilder {
        RegistrationBuilder::key(self.etcd.clone(), self.policy.clone(), &key.into())
    }

    /// Returns a builder of a resolver, which watches the instances of a service. The watch begins with [`start`](ResolverBuilder::start).
    ///
    /// ```no_run
    /// # async fn run(registry: tonic_etcd::Registry) {
    /// let resolver = registry.resolver("helloworld.Greeter").start();
    /// println!("{} instances", resolver.instances().len());
    /// # }
    /// ```
    pub fn resolver(&self, service: impl Into<String>) -> ResolverBuilder {
        ResolverBuilder::service(
            self.etcd.clone(),
            &self.keyspace,
            &service.into(),
            self.policy.clone(),
        )
    }

    /// Returns a builder of a resolver, which watches all keys under the given prefixes. A missing trailing slash is added to a prefix:
    /// `/web/node1` is under `/web`, `/webs/node1` is not. The prefix of the registry is not used.
    pub fn resolver_at<I>(&self, prefixes: I) -> ResolverBuilder
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let prefixes: Vec<_> = prefixes.into_iter().map(Into::into).collect();
        ResolverBuilder::prefixes(self.etcd.clone(), &prefixes, self.policy.clone())
    }

    /// Returns a builder of a channel that is balanced over the instances of a service.
    ///
    /// ```no_run
    /// # async fn run(registry: tonic_etcd::Registry) -> Result<(), Box<dyn std::error::Error>> {
    /// use tonic_etcd::LbPolicy;
    ///
    /// let channel = registry.channel("helloworld.Greeter").policy(LbPolicy::LeastRequest).connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn channel(&self, service: impl Into<String>) -> ChannelBuilder<ResolverBuilder> {
        BalancedChannel::builder().source(self.resolver(service))
    }

    /// Returns a builder of a channel over all keys under the given prefixes, as [`resolver_at`](Self::resolver_at) watches them.
    pub fn channel_at<I>(&self, prefixes: I) -> ChannelBuilder<ResolverBuilder>
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        BalancedChannel::builder().source(self.resolver_at(prefixes))
    }

    /// Returns a builder of a channel for a grpc-go target `etcd:///service`: the keys `service/<instance id>`, regardless of the prefix of
    /// the registry. With four slashes, as in `etcd:////gRPC/service`, the path begins with a slash.
    ///
    /// ```no_run
    /// # async fn run(registry: tonic_etcd::Registry) -> Result<(), Box<dyn std::error::Error>> {
    /// let channel = registry.channel_to("etcd:///helloworld.Greeter")?.connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Fails if the target has another form. For a target that names etcd members, use [`connect`].
    pub fn channel_to(
        &self,
        target: impl Into<String>,
    ) -> Result<ChannelBuilder<ResolverBuilder>, RegistryError> {
        Target::of_registry(&target.into()).map(|lookup| self.channel_for(lookup))
    }

    pub(crate) fn channel_for(&self, lookup: Lookup) -> ChannelBuilder<ResolverBuilder> {
        let (path, format) = match lookup {
            Lookup::Service(service) => return self.channel(service),
            Lookup::Path(path) => (path, None),
            Lookup::GoZero(key) => (key, Some(Format::GoZero)),
        };
        let mut resolver = self.resolver_at([path.as_str()]);
        if let Some(format) = format {
            resolver = resolver.format(format);
        }
        BalancedChannel::builder().source(resolver).service(path)
    }
}

/// A builder for a [`Registry`] with options; created by [`Registry::builder`].
#[derive(Clone)]
#[must_use = "there is no registry before `connect` or `connect_lazy`"]
pub struct RegistryBuilder {
    config: Config,
    keyspace: Keyspace,
    policy: AddressPolicy,
}

impl RegistryBuilder {
    /// Sets the prefix of the service keys. A missing trailing slash is added. The default is `/gRPC/`, or for each [`Format`] of another
    /// library the prefix that this library uses. With an empty prefix, keys begin with the service name, as for `etcd:///service` in
    /// grpc-go.
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
    /// The certificate of every member must be valid for the name in the configuration, or with
    /// [`TlsConfig::verify_dialled_host`](tonic_balance::TlsConfig::verify_dialled_host) for the member's own host. Certificate files are
    /// read again at each handshake, so renewed certificates need no restart.
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

    /// Connects, and makes one round trip.
    ///
    /// # Errors
    ///
    /// Fails as [`Registry::connect`] does.
    pub async fn connect(self) -> Result<Registry, RegistryError> {
        // The probe reads the prefix itself as a key: no server writes this key, and every user with read access to the prefix may read it.
        // An empty key is not valid in etcd.
        let probe = match self.keyspace.prefix() {
            "" => "/",
            prefix => prefix,
        };
        let etcd = Etcd::connect(&self.config, &Key::from(probe)).await?;
        Ok(self.over(etcd))
    }

    /// Creates a registry that connects at its first request, for programs that must start while etcd is down. Wrong addresses, a wrong
    /// user or a wrong TLS configuration are reported later: the first registration fails, while the first resolver or channel reports the
    /// error in its status and retries.
    ///
    /// Give servers a long [`startup_timeout`](RegistrationBuilder::startup_timeout), within which etcd must become available.
    ///
    /// ```
    /// use tonic_etcd::Registry;
    ///
    /// # fn main() -> Result<(), tonic_etcd::RegistryError> {
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
        }
    }
}

impl std::fmt::Debug for RegistryBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryBuilder")
            // An endpoint that is not checked yet may contain a password.
            .field("endpoints", &self.config.endpoints.len())
            .field("prefix", &self.keyspace.prefix())
            .finish_non_exhaustive()
    }
}
