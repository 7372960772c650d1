//! The status of a channel whose endpoints come from a registry.

use std::collections::HashMap;
use std::fmt;

use tonic_balance::BalancedChannel;
use tonic_balance::channel::EndpointStatus;

use crate::instance::Instance;
use crate::resolver::{RejectedKey, ResolverHandle, ResolverStatus, ServiceConfigStatus};

/// Adds a status to a [`BalancedChannel`] that was created by a [`Registry`](crate::Registry).
///
/// ```no_run
/// use tonic_etcd::channel::BalancedChannelExt;
///
/// # async fn run(registry: tonic_etcd::Registry) -> Result<(), Box<dyn std::error::Error>> {
/// let channel = registry.channel("helloworld.Greeter").connect().await?;
/// if let Some(status) = channel.status() {
///     println!("{status}");
/// }
/// # Ok(())
/// # }
/// ```
pub trait BalancedChannelExt: sealed::Sealed {
    /// Returns what the registry and the channel know about the service at this moment. Returns `None` if the endpoints of the channel do
    /// not come from a resolver of this crate.
    fn status(&self) -> Option<ChannelStatus>;
}

/// The status of a channel: the state of its resolver, and each endpoint with the instance that was read from etcd.
///
/// It is displayed as several lines, one for the resolver, one for each endpoint, one for each rejected key, and one for the service config if
/// it is watched. With the feature `serde`, it implements `serde::Serialize`. The names and types of the fields are stable, and new fields can
/// be added in any version. `docs/options.md` describes them.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ChannelStatus {
    /// The name of the service, or the watched prefixes joined by `, `.
    pub service: String,
    /// The status of the resolver.
    pub resolver: ResolverStatus,
    /// The endpoints, in the order of their addresses. An endpoint that was removed from etcd is listed until its last call ends.
    pub endpoints: Vec<EndpointReport>,
    /// The keys whose latest value is not used.
    pub rejected: Vec<RejectedKey>,
    /// The service config. `None` unless
    /// [`watch_service_config`](crate::resolver::ResolverBuilder::watch_service_config) enables it.
    pub service_config: Option<ServiceConfigStatus>,
}

/// An endpoint of a channel, with the instance that was read from etcd.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EndpointReport {
    /// The state of the endpoint in the channel.
    pub endpoint: EndpointStatus,
    /// The instance in etcd: its id, key, lease, version, zone and metadata. `None` after its removal.
    pub instance: Option<Instance>,
}

impl BalancedChannelExt for BalancedChannel {
    fn status(&self) -> Option<ChannelStatus> {
        let resolver = self.source_handle::<ResolverHandle>()?;
        let instances = resolver.instances();
        let mut endpoints: Vec<_> = self.endpoints();
        endpoints.sort_by(|a, b| a.address.as_str().cmp(b.address.as_str()));
        let by_address = instances.into_iter();
        let by_address = by_address.map(|instance| (instance.address().clone(), instance));
        let mut by_address: HashMap<_, _> = by_address.collect();
        let report = |endpoint: EndpointStatus| EndpointReport {
            instance: by_address.remove(&endpoint.address),
            endpoint,
        };
        Some(ChannelStatus {
            service: resolver.service().to_owned(),
            resolver: resolver.status(),
            endpoints: endpoints.into_iter().map(report).collect(),
            rejected: resolver.rejected(),
            service_config: resolver.service_config(),
        })
    }
}

impl fmt::Display for ChannelStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (service, resolver, endpoints) = (&self.service, &self.resolver, self.endpoints.len());
        write!(f, "{service}: {endpoints} endpoints, registry {resolver}")?;
        for report in &self.endpoints {
            write!(f, "\n  {report}")?;
        }
        for rejected in &self.rejected {
            write!(f, "\n  rejected: {rejected}")?;
        }
        if let Some(service_config) = &self.service_config {
            write!(f, "\n  service config: {service_config}")?;
        }
        Ok(())
    }
}

impl fmt::Display for EndpointReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.endpoint.fmt(f)?;
        let Some(instance) = &self.instance else {
            return f.write_str(", not in etcd");
        };
        if let Some(zone) = instance.zone() {
            write!(f, ", zone {}", zone.escape_debug())?;
        }
        if let Some(version) = instance.version() {
            write!(f, ", version {}", version.escape_debug())?;
        }
        match instance.location() {
            Some(location) => write!(f, ", key {}", location.key().escape_debug()),
            None => Ok(()),
        }
    }
}

mod sealed {
    #[allow(unnameable_types, reason = "the private module seals the trait")]
    pub trait Sealed {}

    impl Sealed for tonic_balance::BalancedChannel {}
}
