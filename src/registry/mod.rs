//! The door to everything: one etcd cluster, and where services live in it.

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

/// A registry of services in etcd. Cloning is cheap, and all clones share the connections.
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
    /// Connects to etcd with default options, and makes one round trip: a wrong address or a missing password is an error here.
    ///
    /// An endpoint is `host:port`, `http://host:port` or `https://host:port` (feature `tls`), IPv6 in brackets. Give all members: what
    /// one of them leaves unanswered goes to another within 2 s, and one that is down is not asked. Whether TLS is spoken is the same for
    /// all. No further members are looked for.
    ///
    /// # Errors
    ///
    /// Tells by its variant, and in words, whether nothing answers, something else than etcd answers, one side speaks TLS, or the user
    /// is refused. It takes about 2 s to say that nothing listens, and about 5 s that nothing answers.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes what it has opened.
    pub async fn connect<I>(endpoints: I) -> Result<Self, RegistryError>
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        Self::builder(endpoints).connect().await
    }

    /// Connects with options.
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

    /// Takes a client of your own, under the default prefix; [`with_prefix`](Self::with_prefix) and
    /// [`with_address_policy`](Self::with_address_policy) set the other options.
    ///
    /// Build it with `with_require_leader(true)` and `with_auto_token_refresh(true)`: without them a member that is cut off from its
    /// cluster stays silent, and an expired token is not renewed. Such a client balances by itself; failing over from a frozen member is
    /// then up to it.
    #[must_use]
    pub fn from_client(client: etcd_client::Client) -> Self {
        Self {
            etcd: Etcd::from_client(client),
            keyspace: Keyspace::default(),
            policy: AddressPolicy::default(),
        }
    }

    /// Sets the prefix, as [`RegistryBuilder::prefix`] does. The registry shares its connections with the one it is made from.
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

    /// The prefix under which services live: the one that was given, or `/gRPC/`.
    #[must_use]
    pub fn prefix(&self) -> &str {
        self.keyspace.prefix()
    }

    /// Describes a registration of a server for a service; the key will be `<prefix><service>/<instance id>`, or what its
    /// [`Format`] makes of it.
    ///
    /// The service's name is not empty and has no slash; what is wrong with it is said when the registration is made.
    pub fn registration(&self, service: impl Into<String>) -> RegistrationBuilder {
        RegistrationBuilder::service(
            self.etcd.clone(),
            self.policy.clone(),
            self.keyspace.clone(),
            &service.into(),
        )
    }

    /// Describes a registration at an exact key, whatever the prefix.
    pub fn registration_at(&self, key: impl Into<String>) -> RegistrationBuilder {
        RegistrationBuilder::key(self.etcd.clone(), self.policy.clone(), &key.into())
    }

    /// Returns a builder of a resolver, which watches the instances of a service. Nothing is watched before
    /// [`start`](ResolverBuilder::start).
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

    /// Returns a builder of a resolver, which watches all keys under some prefixes. A trailing slash is added to a prefix if it is missing:
    /// `/web/node1` is under `/web`, `/webs/node1` is not. The registry's own prefix is not used.
    pub fn resolver_at<I>(&self, prefixes: I) -> ResolverBuilder
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let prefixes: Vec<_> = prefixes.into_iter().map(Into::into).collect();
        ResolverBuilder::prefixes(self.etcd.clone(), &prefixes, self.policy.clone())
    }

    /// Describes a channel that is balanced over the instances of a service.
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

    /// Returns a builder of a channel over all keys under some prefixes, as [`resolver_at`](Self::resolver_at) watches them.
    pub fn channel_at<I>(&self, prefixes: I) -> ChannelBuilder<ResolverBuilder>
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        BalancedChannel::builder().source(self.resolver_at(prefixes))
    }

    /// Describes a channel to what grpc-go calls `etcd:///service`: the keys `service/<instance id>`, whatever the registry's prefix. With
    /// four slashes, `etcd:////gRPC/service`, the path begins with one.
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
    /// If the target is of another form: one that names etcd members is for
    /// [`connect`].
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
        BalancedChannel::builder()
            .source(resolver)
            .address_policy(self.policy.clone())
            .service(path)
    }
}

/// A [`Registry`] with options; made by [`Registry::builder`].
#[derive(Clone)]
#[must_use = "there is no registry before `connect` or `connect_lazy`"]
pub struct RegistryBuilder {
    config: Config,
    keyspace: Keyspace,
    policy: AddressPolicy,
}

impl RegistryBuilder {
    /// The prefix under which services live; a trailing slash is added if it is missing. Default `/gRPC/`, and for each
    /// [`Format`] of another library what that library writes. Empty, keys begin with the service's name: that is where
    /// `etcd:///service` of grpc-go looks.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.keyspace = Keyspace::new(&prefix.into());
        self
    }

    /// The etcd user. None by default. The token that etcd issues for it is renewed whenever etcd refuses it.
    pub fn user(mut self, name: impl Into<String>, password: impl Into<String>) -> Self {
        self.config.credentials = Some(Credentials {
            user: name.into(),
            password: password.into(),
        });
        self
    }

    /// Speaks TLS to etcd. By default endpoints that say `https://` are spoken to with the system's root certificates.
    ///
    /// Every member's certificate has to be valid for the name that the configuration fixes, or with
    /// [`TlsConfig::verify_dialled_host`](tonic_balance::TlsConfig::verify_dialled_host) for the member's own host. Certificates in files are read again at each
    /// handshake: renewed ones need no restart.
    #[cfg(feature = "tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn tls_config(mut self, tls: tonic_balance::TlsConfig) -> Self {
        self.config.tls = Some(tls);
        self
    }

    /// Which addresses resolvers accept and registrations may advertise. See [`AddressPolicy`] for the default.
    pub fn address_policy(mut self, policy: AddressPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Connects, and makes one round trip.
    ///
    /// # Errors
    ///
    /// As [`Registry::connect`].
    pub async fn connect(self) -> Result<Registry, RegistryError> {
        // The prefix itself is a key that nobody writes, and that whoever may read the prefix may read. An empty key is none.
        let probe = match self.keyspace.prefix() {
            "" => "/",
            prefix => prefix,
        };
        let etcd = Etcd::connect(&self.config, &Key::from(probe)).await?;
        Ok(self.over(etcd))
    }

    /// Connects when there is something to ask: for programs that must start while etcd is down. What is wrong with the endpoints, the user
    /// or TLS is then said by the first registration, which fails for it, or by the status of the first resolver or channel, which tries again.
    ///
    /// Give servers a long [`startup_timeout`](RegistrationBuilder::startup_timeout): the time within which etcd has to be there.
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
    /// If there is no endpoint, or one that cannot be one.
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
            .field("endpoints", &self.config.endpoints)
            .field("prefix", &self.keyspace.prefix())
            .finish_non_exhaustive()
    }
}
