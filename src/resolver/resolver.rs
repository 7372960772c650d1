//! The subscription to a set of instances, as a stream of changes.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_stream::Stream;
use tonic_balance::{Address, AddressPolicy};
use tower::discover::Change;
use tracing::Instrument;

use super::cache::{Cache, ConfigCache};
use super::feedback::ResolverFeedback;
use super::gauges::GAUGES;
use super::handle::ResolverHandle;
use super::metrics::ResolverMetrics;
use super::options::Options;
use super::service_config::{self, ConfigPublisher, ServiceConfigStatus};
use super::status::{RejectedKey, ResolverState, ResolverStatus};
use super::store::Core;
use super::task;
use super::watcher::Machine;
use crate::error::EtcdError;
use crate::etcd::Etcd;
use crate::instance::Instance;
use crate::keyspace::Range;

/// The current set of instances of a service, as a `Stream` of [`Change`]s. A resolver therefore implements [`tower::discover::Discover`].
///
/// The stream never ends and never fails. [`status`](Self::status) reports failures of etcd. The loss of the connection to etcd never
/// removes an instance.
///
/// A clone is a separate subscription to the same watch. Its stream begins with an insert for every known instance. The watch is closed
/// when the resolver and all of its clones have been dropped.
///
/// ```no_run
/// use tokio_stream::StreamExt;
/// use tower::discover::Change;
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let registry = tonic_etcd::Registry::connect(["127.0.0.1:2379"]).await?;
/// let mut resolver = registry.resolver("helloworld.Greeter").start();
/// while let Some(Ok(change)) = resolver.next().await {
///     match change {
///         Change::Insert(address, instance) => println!("{address} is there, weight {}", instance.weight()),
///         Change::Remove(address) => println!("{address} is gone"),
///     }
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Cancel safety
///
/// Dropping the future of `next` loses no change.
#[derive(Debug)]
pub struct Resolver {
    subscription: usize,
    core: Arc<Core>,
    tasks: Arc<Tasks>,
    feedback: ResolverFeedback,
}

/// Aborts the tasks when the last subscription is dropped.
#[derive(Debug)]
pub(super) struct Tasks {
    handles: Vec<AbortHandle>,
    options: Options,
}

impl Tasks {
    /// Returns the options with which the resolver was started.
    pub(super) fn options(&self) -> &Options {
        &self.options
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.handles {
            task.abort();
        }
    }
}

impl Resolver {
    /// Starts one task per range, and one task that ends each hold at its deadline. (A held instance is one that is kept as a last resort
    /// after a mass removal.) If a cache or seeds are configured, also starts one task that loads them and writes the cache.
    ///
    /// # Panics
    ///
    /// Panics if called outside a tokio runtime.
    pub(super) fn start(
        etcd: &Etcd,
        service: String,
        target: &str,
        ranges: Vec<Range>,
        options: Options,
        file: Option<Cache>,
        trouble: Option<EtcdError>,
    ) -> Self {
        let reconcile = options.reconcile;
        let (seeds, policy) = (options.seeds.clone(), options.decoder.policy.clone());
        let metrics = etcd.metrics();
        let mut core = Core::new(service, ranges.len(), options.clone(), trouble);
        core.target = target.into();
        core.metrics = metrics.map(|metrics| ResolverMetrics::new(metrics, target));
        let config_key = options.service_config.clone();
        let publisher = config_key
            .as_ref()
            .map(|key| Arc::new(ConfigPublisher::new(key, metrics, target)));
        core.service_config.clone_from(&publisher);
        let core = Arc::new(core);
        for gauge in GAUGES {
            if let Some(metrics) = metrics {
                metrics.observe(gauge, &core);
            }
        }
        let mut handles = vec![tokio::spawn(task::release_holds(Arc::clone(&core))).abort_handle()];
        if file.is_some() || !seeds.is_empty() {
            let task = task::keep_cache(Arc::clone(&core), file, seeds, policy);
            handles.push(tokio::spawn(task.in_current_span()).abort_handle());
        }
        if let (Some(key), Some(publisher)) = (config_key, publisher) {
            let span = tracing::info_span!("service_config", key = %key.escaped());
            let directory = options.cache_dir.as_deref();
            let cache = directory.map(|directory| ConfigCache::new(directory, &core.service, &key));
            let task = service_config::follow(etcd.clone(), key, publisher, reconcile, cache);
            handles.push(tokio::spawn(task.instrument(span)).abort_handle());
        }
        let mut prefixes = Vec::with_capacity(ranges.len());
        for (index, range) in ranges.into_iter().enumerate() {
            let span = tracing::info_span!("resolver", prefix = %range.start);
            let machine = Machine::new(range, reconcile, etcd.slots(), fastrand::Rng::new());
            let (reports, reported) = super::feedback::channel();
            prefixes.push(reports);
            let task = task::run(etcd.clone(), machine, Arc::clone(&core), index, reported);
            handles.push(tokio::spawn(task.instrument(span)).abort_handle());
        }
        let feedback = ResolverFeedback::new(prefixes);
        Self::subscribed(core, Arc::new(Tasks { handles, options }), feedback)
    }

    /// Creates a subscription.
    pub(super) fn subscribed(
        core: Arc<Core>,
        tasks: Arc<Tasks>,
        feedback: ResolverFeedback,
    ) -> Self {
        Self {
            subscription: core.subscribe(),
            core,
            tasks,
            feedback,
        }
    }

    /// Returns the parts that all subscriptions share.
    pub(super) fn parts(&self) -> (&Arc<Core>, &Arc<Tasks>, &ResolverFeedback) {
        (&self.core, &self.tasks, &self.feedback)
    }

    /// Returns the target, for the metrics of channels.
    pub(crate) fn target(&self) -> &str {
        &self.core.target
    }

    /// Returns the policy for the addresses of instances.
    pub(crate) fn policy(&self) -> &AddressPolicy {
        self.core.policy()
    }

    /// Returns the service name, or the watched prefixes joined by `, `.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.core.service
    }

    /// Returns the known instances, one per address, sorted by address. Instances that are
    /// [held](crate::resolver::ResolverBuilder::mass_removal_protection) are included; [`Instance::is_last_resort`] returns true for them.
    /// Until every prefix has been listed, the result is incomplete, or contains instances of the cache or the seeds; see
    /// [`ready`](Self::ready).
    #[must_use]
    pub fn instances(&self) -> Vec<Instance> {
        self.core.instances()
    }

    /// Returns the current status: whether the set is in sync with etcd, the last error, and counters.
    #[must_use]
    pub fn status(&self) -> ResolverStatus {
        self.core.status.borrow().clone()
    }

    /// Returns a watch channel of the [`status`](Self::status). The receiver is notified of each change.
    #[must_use]
    pub fn watch_status(&self) -> watch::Receiver<ResolverStatus> {
        self.core.status.subscribe()
    }

    /// Returns the keys whose latest value is not used, because it cannot be decoded, because the address policy rejects its address, or
    /// because it is over a limit. The resolver remembers at most 1 000 keys that never had a good value. Further rejected keys are counted,
    /// but not returned.
    #[must_use]
    pub fn rejected(&self) -> Vec<RejectedKey> {
        self.core.rejected()
    }

    /// Returns the status of the service config. Returns `None` unless
    /// [`watch_service_config`](crate::resolver::ResolverBuilder::watch_service_config) enables it.
    #[must_use]
    pub fn service_config(&self) -> Option<ServiceConfigStatus> {
        self.core.service_config()
    }

    /// Returns a watch channel of the [`service_config`](Self::service_config), if it is enabled.
    pub(crate) fn watch_service_config(&self) -> Option<watch::Receiver<ServiceConfigStatus>> {
        let publisher = self.core.service_config.as_ref()?;
        Some(publisher.status.subscribe())
    }

    /// Returns a handle that gives access to the status and the instances. The handle does not keep the watch open.
    #[must_use]
    pub fn handle(&self) -> ResolverHandle {
        ResolverHandle::new(Arc::clone(&self.core))
    }

    /// Returns a handle for reports of addresses that refuse connections. A [`BalancedChannel`](crate::BalancedChannel) sends such reports
    /// by itself; the handle is for other code that connects to the instances of a resolver.
    #[must_use]
    pub fn feedback(&self) -> ResolverFeedback {
        self.feedback.clone()
    }

    /// Waits until the instances are known: until every prefix has been listed once, or until the
    /// [cache](crate::resolver::ResolverBuilder::cache_dir) or the [seeds](crate::resolver::ResolverBuilder::seeds) are used. Without
    /// seeds and without a usable cache, the future never completes while etcd does not respond or rejects the requests. In this case, wrap
    /// the future in [`tokio::time::timeout`], and read the reason from the [`status`](Self::status).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect.
    pub async fn ready(&self) {
        let mut statuses = self.watch_status();
        // `self.core` owns the sender, so `wait_for` cannot fail.
        let _ = statuses
            .wait_for(|status| status.state != ResolverState::Unknown)
            .await;
    }
}

impl Clone for Resolver {
    fn clone(&self) -> Self {
        let (core, tasks) = (Arc::clone(&self.core), Arc::clone(&self.tasks));
        Self::subscribed(core, tasks, self.feedback.clone())
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.core.lock().subscriptions[self.subscription] = None;
    }
}

impl Stream for Resolver {
    type Item = Result<Change<Address, Instance>, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut shared = self.core.lock();
        if let Some(change) = shared.next(self.subscription) {
            return Poll::Ready(Some(Ok(change)));
        }
        shared.wake_later(self.subscription, cx.waker());
        Poll::Pending
    }
}
