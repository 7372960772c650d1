//! A registry: one etcd cluster, and the location of services in it.

use tonic_balance::AddressPolicy;
use tonic_balance::{BalancedChannel, channel::ChannelBuilder, traces::Traces};

use super::target::{Lookup, Target};
use crate::error::RegistryError;
use crate::etcd::Etcd;
use crate::format::Format;
use crate::keyspace::Keyspace;
use crate::metrics::Metrics;
use crate::registration::RegistrationBuilder;
use crate::resolver::{ResolverBuilder, RunningResolvers};

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
    pub(super) etcd: Etcd,
    pub(super) keyspace: Keyspace,
    pub(super) policy: AddressPolicy,
    /// The control prefix of the service configs that resolvers watch, if any.
    pub(super) service_configs: Option<String>,
    pub(super) traces: Option<Traces>,
    pub(super) resolvers: RunningResolvers,
}

impl Registry {
    /// Creates a registry from an existing etcd client, under the default prefix. [`with_prefix`](Self::with_prefix) and
    /// [`with_address_policy`](Self::with_address_policy) set the other options.
    ///
    /// Build the client with `with_require_leader(true)` and `with_auto_token_refresh(true)`. Without the first option, a watch at a member
    /// that is cut off from its cluster receives nothing, not even an error. Without the second option, an expired token is not renewed.
    /// The client balances its own requests, so failover from a frozen member depends on the client.
    #[must_use]
    pub fn from_client(client: etcd_client::Client) -> Self {
        Self {
            etcd: Etcd::from_client(client),
            keyspace: Keyspace::default(),
            policy: AddressPolicy::default(),
            service_configs: None,
            traces: None,
            resolvers: RunningResolvers::default(),
        }
    }

    /// Sets the prefix, as [`RegistryBuilder::prefix`](crate::registry::RegistryBuilder::prefix) does. The new registry shares its
    /// connections with the original.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.keyspace = Keyspace::new(&prefix.into());
        self
    }

    /// Sets the address policy, as [`RegistryBuilder::address_policy`](crate::registry::RegistryBuilder::address_policy) does.
    #[must_use]
    pub fn with_address_policy(mut self, policy: AddressPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Enables metrics, as [`RegistryBuilder::metrics`](crate::registry::RegistryBuilder::metrics) does. The metrics also apply to the
    /// original and its other clones. If the registry has metrics already, this method has no effect.
    #[must_use]
    pub fn with_metrics(self, metrics: impl Into<Metrics>) -> Self {
        self.etcd.set_metrics(metrics.into());
        self
    }

    /// Enables traces, as [`RegistryBuilder::traces`](crate::registry::RegistryBuilder::traces) does.
    #[must_use]
    pub fn with_traces(mut self, traces: Traces) -> Self {
        self.traces = Some(traces);
        self
    }

    /// Returns the prefix of the service keys: the configured prefix, or `/gRPC/`.
    #[must_use]
    pub fn prefix(&self) -> &str {
        self.keyspace.prefix()
    }

    /// Returns a builder for a registration of a server for a service. The key is `<prefix><service>/<instance id>`, unless the [`Format`]
    /// of the registration defines another key.
    ///
    /// The service name must not be empty and must not contain a slash. An invalid name is reported as an error when the server is
    /// registered.
    pub fn registration(&self, service: impl Into<String>) -> RegistrationBuilder {
        RegistrationBuilder::service(
            self.etcd.clone(),
            self.policy.clone(),
            self.keyspace.clone(),
            &service.into(),
        )
    }

    /// Returns a builder for a registration at exactly this key. The prefix of the registry is not used.
    pub fn registration_at(&self, key: impl Into<String>) -> RegistrationBuilder {
        RegistrationBuilder::key(self.etcd.clone(), self.policy.clone(), &key.into())
    }

    /// Returns a builder for a resolver that watches the instances of a service. The watch begins with [`start`](ResolverBuilder::start).
    ///
    /// Resolvers and channels of one service share one watch and one set of instances, if they are started on the same runtime by this
    /// registry or its clones, and have the same options. Two [filters](ResolverBuilder::filter) count as equal only if their builders are
    /// clones of one builder.
    ///
    /// ```no_run
    /// # async fn run(registry: tonic_etcd::Registry) {
    /// let resolver = registry.resolver("helloworld.Greeter").start();
    /// println!("{} instances", resolver.instances().len());
    /// # }
    /// ```
    pub fn resolver(&self, service: impl Into<String>) -> ResolverBuilder {
        let (etcd, policy) = (self.etcd.clone(), self.policy.clone());
        let resolver = ResolverBuilder::service(etcd, &self.keyspace, &service.into(), policy)
            .sharing(&self.resolvers);
        match &self.service_configs {
            Some(control_prefix) => resolver.watch_service_config(control_prefix),
            None => resolver,
        }
    }

    /// Returns a builder for a resolver that watches all keys under the given prefixes. A missing trailing slash is added to each prefix:
    /// `/web/node1` is under `/web`, but `/webs/node1` is not. The prefix of the registry is not used.
    pub fn resolver_at<I>(&self, prefixes: I) -> ResolverBuilder
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let prefixes: Vec<_> = prefixes.into_iter().map(Into::into).collect();
        ResolverBuilder::prefixes(self.etcd.clone(), &prefixes, self.policy.clone())
            .sharing(&self.resolvers)
    }

    /// Returns a builder for a channel that is balanced over the instances of a service.
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
        self.builder_of_channel(self.resolver(service))
    }

    /// Returns a builder for a channel that is balanced over the instances of a resolver from [`resolver_at`](Self::resolver_at).
    pub fn channel_at<I>(&self, prefixes: I) -> ChannelBuilder<ResolverBuilder>
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.builder_of_channel(self.resolver_at(prefixes))
    }

    /// Returns a builder for a channel to a target in the form of grpc-go, `etcd:///service`. The channel uses the keys below `service/`,
    /// and the prefix of the registry is not used. With four slashes, as in `etcd:////gRPC/service`, the keys begin with a slash.
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
    /// Fails if the target has another form. For a target that names etcd members, use [`connect`](crate::connect).
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
        self.builder_of_channel(resolver).service(path)
    }

    fn builder_of_channel(&self, resolver: ResolverBuilder) -> ChannelBuilder<ResolverBuilder> {
        let builder = BalancedChannel::builder();
        let builder = match self.etcd.metrics() {
            Some(metrics) => builder.metrics(metrics.clone()),
            None => builder,
        };
        let builder = match &self.traces {
            Some(traces) => builder.traces(traces.clone()),
            None => builder,
        };
        builder.source(resolver)
    }
}
