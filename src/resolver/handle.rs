//! A handle of a resolver, for code that does not own the resolver, for example because a channel owns it.

use std::sync::Arc;

use tokio::sync::watch;

use super::service_config::ServiceConfigStatus;
use super::status::{RejectedKey, ResolverStatus};
use super::store::Core;
use crate::instance::Instance;

/// A handle of a [`Resolver`](crate::Resolver). It gives access to the resolver's status and instances, without a subscription to the
/// changes.
///
/// [`Resolver::handle`](crate::Resolver::handle) returns a handle. A channel whose source is a resolver also has one:
///
/// ```no_run
/// use tonic_etcd::{Registry, resolver::ResolverHandle};
///
/// # async fn run(registry: Registry) -> Result<(), Box<dyn std::error::Error>> {
/// let channel = registry.channel("helloworld.Greeter").connect().await?;
/// if let Some(resolver) = channel.source_handle::<ResolverHandle>() {
///     println!("{:?}, {} instances", resolver.status().state, resolver.instances().len());
/// }
/// # Ok(())
/// # }
/// ```
///
/// A handle does not keep the watch open. When the last clone of the resolver and the last channel that uses it have been dropped,
/// the instances no longer change, and the status contains an error: the task of the resolver has ended.
#[derive(Clone, Debug)]
pub struct ResolverHandle(Arc<Core>);

impl ResolverHandle {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self(core)
    }

    /// Returns the service name, or the watched prefixes joined by `, `.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.0.service
    }

    /// Returns the known instances, as [`Resolver::instances`](crate::Resolver::instances) does.
    #[must_use]
    pub fn instances(&self) -> Vec<Instance> {
        self.0.instances()
    }

    /// Returns the current status, as [`Resolver::status`](crate::Resolver::status) does.
    #[must_use]
    pub fn status(&self) -> ResolverStatus {
        self.0.status.borrow().clone()
    }

    /// Returns a watch channel of the [`status`](Self::status). The receiver is notified of each change.
    #[must_use]
    pub fn watch_status(&self) -> watch::Receiver<ResolverStatus> {
        self.0.status.subscribe()
    }

    /// Returns the keys whose latest value is not used, as [`Resolver::rejected`](crate::Resolver::rejected) does.
    #[must_use]
    pub fn rejected(&self) -> Vec<RejectedKey> {
        self.0.rejected()
    }

    /// Returns the status of the service config, as [`Resolver::service_config`](crate::Resolver::service_config) does.
    #[must_use]
    pub fn service_config(&self) -> Option<ServiceConfigStatus> {
        self.0.service_config()
    }
}
