//! Channels whose source of endpoints is a resolver.

use std::convert::Infallible;

use tokio_stream::{StreamExt, wrappers::WatchStream};
use tonic_balance::{
    BalancedChannel,
    channel::{Attributes, EndpointSource, Endpoints, SourceContext},
};
use tower::BoxError;

use super::Registry;
use super::target::Target;
use crate::error::RegistryError;
use crate::instance::{Instance, KeyLocation};
use crate::resolver::{Resolver, ResolverBuilder, ResolverState};

/// Connects to a service by its URL, `etcd://host:port[,host:port…]/service`, and waits for its first endpoint.
///
/// The keys are read under the default prefix, `/gRPC/`. For another prefix, a user or TLS, use [`Registry::builder`] and
/// [`Registry::channel`].
///
/// For services that go-zero has registered, the forms of go-zero are accepted as well: `discov://host:port/key` and
/// `etcd:///host:port?key=key`. go-zero also writes the first form with the scheme `etcd://`, but this function reads such a URL as the
/// form of this library, because the two cannot be distinguished. For the form of grpc-go, `etcd:///service`, which names no members, see
/// [`Registry::channel_to`].
///
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let channel = tonic_etcd::connect("etcd://127.0.0.1:2379/helloworld.Greeter").await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// Fails as [`Registry::connect`] and [`ChannelBuilder::connect`](crate::channel::ChannelBuilder::connect) do. Also fails if the URL has
/// none of these forms, or could name several services.
///
/// # Cancel safety
///
/// Dropping the future closes the connections.
pub async fn connect(target: impl Into<String>) -> Result<BalancedChannel, RegistryError> {
    let Target { members, lookup } = Target::with_members(&target.into())?;
    let registry = Registry::connect(members).await?;
    Ok(registry.channel_for(lookup).connect().await?)
}

/// Copies the weight, the zone, and the last-resort flag (set if the instance is gone from etcd and is only kept as a last resort). The
/// metadata and the version become labels, by which calls [select](crate::channel::Select) instances. The metadata entry `hash_key`, if
/// there is one, is the [name](Attributes::with_hash_key) of the instance for [`LbPolicy::RingHash`](crate::LbPolicy::RingHash). The
/// [generation](Attributes::generation) changes with a new lease or a recreated key. In both cases, the server may have been restarted, or
/// the address may belong to another server now. When the generation changes, the channel discards what it has observed about the endpoint.
impl From<Instance> for Attributes {
    fn from(instance: Instance) -> Self {
        let location = instance.location();
        let lease = location.and_then(KeyLocation::lease);
        let lease = lease.map_or(0, |lease| lease.get().cast_unsigned());
        let created = location.map_or(0, |location| {
            location.create_revision().get().cast_unsigned()
        });
        // Revisions are below 2^32 in practice, and the rotation moves them into the upper half of the number. Two pairs of lease id and
        // revision have the same sum only if their lease ids differ by a multiple of 2^32, which does not happen in practice.
        let generation = lease.wrapping_add(created.rotate_left(32));
        let mut attributes = Self::new()
            .with_weight(instance.weight())
            .with_last_resort(instance.is_last_resort())
            .with_generation(generation);
        for (key, value) in instance.metadata() {
            attributes = attributes.with_label(key, value);
        }
        if let Some(version) = instance.version() {
            attributes = attributes.with_version(version);
        }
        if let Some(hash_key) = instance.metadata().get(HASH_KEY) {
            attributes = attributes.with_hash_key(hash_key.as_str());
        }
        match instance.zone() {
            Some(zone) => attributes.with_zone(zone),
            None => attributes,
        }
    }
}

/// The metadata entry with the name of the instance for the consistent hash, as in gRFC A76.
const HASH_KEY: &str = "hash_key";

/// Starts a resolver for the channel. The address policy of the resolver also applies to the addresses that host names resolve to.
impl EndpointSource for ResolverBuilder {
    type Attributes = Instance;
    type Error = Infallible;
    type Stream = Resolver;

    fn start(self, context: &SourceContext) -> Result<Endpoints<Resolver>, BoxError> {
        EndpointSource::start(self.start(), context)
    }
}

/// Unlike a plain stream of changes, a resolver reports when its set of instances is known, even if the set is empty. The last error of the
/// resolver is added to the errors of calls.
impl EndpointSource for Resolver {
    type Attributes = Instance;
    type Error = Infallible;
    type Stream = Self;

    fn start(self, _: &SourceContext) -> Result<Endpoints<Self>, BoxError> {
        let mut statuses = self.watch_status();
        let watched = statuses.clone();
        let known = async move {
            // `wait_for` fails once the resolver and all of its handles are dropped. The set then never becomes known.
            let known = statuses.wait_for(|status| status.state != ResolverState::Unknown);
            if known.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let last_error = move || {
            let status = watched.borrow();
            let error = status.last_error.as_ref()?;
            Some(format!("registry: {error}"))
        };
        let service = self.service().to_owned();
        let policy = self.policy().clone();
        let feedback = self.feedback();
        let handle = self.handle();
        let target = self.target().to_owned();
        let service_configs = self.watch_service_config();
        let endpoints = Endpoints::new(self)
            .known_after(known)
            .last_error(last_error)
            .on_refused(move |address| feedback.refused(address))
            .address_policy(policy)
            .handle(handle)
            .target(target)
            .service(service);
        let Some(service_configs) = service_configs else {
            return Ok(endpoints);
        };
        let configs = WatchStream::new(service_configs).map(|status| status.config);
        Ok(endpoints.service_configs(configs))
    }
}
