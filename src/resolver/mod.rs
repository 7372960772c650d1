//! Finds the instances of a service: lists the keys of a prefix, watches them, and hands every difference on.
//!
//! One task per prefix owns a pure machine (`state`) and carries out its commands; the outcome is one [set](snapshot) for all prefixes.
//! Consumers get the newest state and never a queue: each [`Resolver`] remembers which addresses have changed since it was last asked,
//! so a slow one sees fewer steps, and can neither lose one nor hold anybody up.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_stream::Stream;
use tower::discover::Change;
use tracing::Instrument;

use crate::error::EtcdError;
use crate::etcd::Etcd;
use crate::instance::Instance;
use crate::keyspace::Range;
use tonic_balance::Address;

mod builder;
mod feedback;
mod hold;
mod instances;
mod options;
mod status;
mod store;
mod task;
mod watcher;

pub use builder::ResolverBuilder;
pub use feedback::ResolverFeedback;
pub use status::{ResolverState, ResolverStatus};

use options::Options;
use store::Core;
use watcher::Machine;

/// The instances of a service, kept up to date: a `Stream` of [`Change`]s, and so a [`tower::discover::Discover`].
///
/// The stream never ends and never fails. Trouble with etcd shows in [`status`](Self::status) and changes nothing else: no instance is
/// removed because etcd could not be asked.
///
/// A clone is a view of its own on the same watch: its stream begins with an insert for every instance known. With the last clone the
/// watch ends.
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
    view: usize,
    core: Arc<Core>,
    tasks: Arc<Tasks>,
    feedback: ResolverFeedback,
}

/// Ends the tasks when the last view goes.
#[derive(Debug)]
struct Tasks(Vec<AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl Resolver {
    /// Starts a task for each range.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    fn start(
        etcd: &Etcd,
        service: String,
        ranges: Vec<Range>,
        options: Options,
        trouble: Option<EtcdError>,
    ) -> Self {
        let reconcile = options.reconcile;
        let core = Arc::new(Core::new(service, ranges.len(), options, trouble));
        let mut tasks = vec![tokio::spawn(task::release(Arc::clone(&core))).abort_handle()];
        let mut prefixes = Vec::with_capacity(ranges.len());
        for (index, range) in ranges.into_iter().enumerate() {
            let span = tracing::info_span!("resolver", prefix = %range.start);
            let machine = Machine::new(range, reconcile, fastrand::Rng::new());
            let (reports, reported) = feedback::channel();
            prefixes.push(reports);
            let task = task::run(etcd.clone(), machine, Arc::clone(&core), index, reported);
            tasks.push(tokio::spawn(task.instrument(span)).abort_handle());
        }
        Self {
            view: core.open_view(),
            core,
            tasks: Arc::new(Tasks(tasks)),
            feedback: ResolverFeedback::new(prefixes),
        }
    }

    /// What this resolver looks for: the service's name, or the prefixes.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.core.service
    }

    /// The instances known now, one per address, sorted by address; those that are
    /// [held](ResolverBuilder::mass_removal_protection) say so with [`Instance::is_last_resort`]. Empty until the first list is in; see
    /// [`ready`](Self::ready).
    #[must_use]
    pub fn instances(&self) -> Vec<Instance> {
        let mut instances: Vec<_> = self.core.lock().instances().cloned().collect();
        instances.sort_by(|a, b| a.address().cmp(b.address()));
        instances
    }

    /// How the set stands to etcd.
    #[must_use]
    pub fn status(&self) -> ResolverStatus {
        self.core.status.borrow().clone()
    }

    /// The status as a watch, for those who want to be told of its changes.
    #[must_use]
    pub fn watch_status(&self) -> watch::Receiver<ResolverStatus> {
        self.core.status.subscribe()
    }

    /// Where to report addresses that refuse connections. Whoever dials the instances of a resolver by other means than a
    /// [`BalancedChannel`](crate::BalancedChannel) may report them there.
    #[must_use]
    pub fn feedback(&self) -> ResolverFeedback {
        self.feedback.clone()
    }

    /// Waits until the instances are known: until every prefix has been listed once. It waits for ever if etcd never answers; put it
    /// under [`tokio::time::timeout`], and look at the [`status`](Self::status) for the reason.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn ready(&self) {
        let mut statuses = self.watch_status();
        // The sender lives in `self.core`, so this cannot fail.
        let _ = statuses
            .wait_for(|status| status.state != ResolverState::Unknown)
            .await;
    }
}

impl Clone for Resolver {
    fn clone(&self) -> Self {
        Self {
            view: self.core.open_view(),
            core: Arc::clone(&self.core),
            tasks: Arc::clone(&self.tasks),
            feedback: self.feedback.clone(),
        }
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.core.lock().views[self.view] = None;
    }
}

impl Stream for Resolver {
    type Item = Result<Change<Address, Instance>, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut shared = self.core.lock();
        if let Some(change) = shared.next(self.view) {
            return Poll::Ready(Some(Ok(change)));
        }
        shared.wake_later(self.view, cx.waker());
        Poll::Pending
    }
}
