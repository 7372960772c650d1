//! Finds the instances of a service: lists the keys of a prefix, watches them, and hands every difference on.
//!
//! One task per prefix owns a pure machine (`state`) and carries out its commands; the outcome is one [set](snapshot) for all prefixes.
//! Consumers get the newest state and never a queue: each [`Resolver`] remembers which addresses have changed since it was last asked,
//! so a slow one sees fewer steps, and can neither lose one nor hold anybody up.

use std::collections::{HashSet, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_stream::Stream;
use tower::discover::Change;
use tracing::Instrument;

use crate::address::Address;
use crate::error::EtcdError;
use crate::etcd::{Etcd, Watch};
use crate::format::Decoder;
use crate::instance::Instance;
use crate::keyspace::{Range, Revision};

mod builder;
mod snapshot;
mod state;

pub use builder::ResolverBuilder;

use snapshot::Snapshot;
use state::{Command, Machine, Report};

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
/// let mut resolver = registry.resolver("helloworld.Greeter");
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
    /// Addresses this view has announced.
    announced: HashSet<Address>,
    core: Arc<Core>,
    tasks: Arc<Tasks>,
}

/// What the tasks and the views share.
#[derive(Debug)]
struct Core {
    service: String,
    decoder: Decoder,
    shared: Mutex<Shared>,
    status: watch::Sender<ResolverStatus>,
}

#[derive(Debug, Default)]
struct Shared {
    snapshot: Snapshot,
    views: Vec<Option<View>>,
    reports: Vec<Report>,
    /// Writes that could not be read.
    rejected: u64,
}

/// What one consumer has yet to be told. It is a set: however many changes an address sees, it is told once, of the newest.
#[derive(Debug)]
struct View {
    pending: VecDeque<Address>,
    /// What is in `pending`.
    queued: HashSet<Address>,
    waker: Option<Waker>,
}

impl View {
    fn tell(&mut self, address: &Address) {
        if self.queued.insert(address.clone()) {
            self.pending.push_back(address.clone());
        }
    }

    /// First come, first told: an address that changes all the time holds up no other.
    fn next(&mut self) -> Option<Address> {
        let address = self.pending.pop_front()?;
        self.queued.remove(&address);
        Some(address)
    }
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
        decoder: Decoder,
        trouble: Option<EtcdError>,
    ) -> Self {
        let mut first = Report {
            trouble,
            ..Report::default()
        };
        let mut reports = vec![Report::default(); ranges.len()];
        if ranges.is_empty() {
            // There is nothing to ask etcd for, so the set is known: it is empty, and the status says why.
            first.listed = true;
            reports.push(first);
        }
        let status = watch::Sender::new(ResolverStatus::of(&reports, 0, None));
        let shared = Mutex::new(Shared {
            reports,
            ..Shared::default()
        });
        let core = Arc::new(Core {
            service,
            decoder,
            shared,
            status,
        });
        let tasks = ranges.into_iter().enumerate().map(|(index, range)| {
            let span = tracing::info_span!("resolver", prefix = %range.start);
            let task = run(
                etcd.clone(),
                Machine::new(range, fastrand::Rng::new()),
                Arc::clone(&core),
                index,
            );
            tokio::spawn(task.instrument(span)).abort_handle()
        });
        let tasks = Arc::new(Tasks(tasks.collect()));
        Self {
            view: core.open_view(),
            announced: HashSet::new(),
            core,
            tasks,
        }
    }

    /// What this resolver looks for: the service's name, or the prefixes.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.core.service
    }

    /// The instances known now, one per address, sorted by address. Empty until the first list is in; see [`ready`](Self::ready).
    #[must_use]
    pub fn instances(&self) -> Vec<Instance> {
        let mut instances: Vec<_> = self.core.lock().snapshot.instances().cloned().collect();
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
    pub fn statuses(&self) -> watch::Receiver<ResolverStatus> {
        self.core.status.subscribe()
    }

    /// Waits until the instances are known: until every prefix has been listed once. It waits for ever if etcd never answers; put it
    /// under [`tokio::time::timeout`], and look at the [`status`](Self::status) for the reason.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn ready(&self) {
        let mut statuses = self.statuses();
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
            announced: HashSet::new(),
            core: Arc::clone(&self.core),
            tasks: Arc::clone(&self.tasks),
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

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let mut shared = this.core.lock();
        let Shared {
            snapshot, views, ..
        } = &mut *shared;
        let Some(Some(view)) = views.get_mut(this.view) else {
            return Poll::Pending;
        };
        while let Some(address) = view.next() {
            if let Some(instance) = snapshot.get(&address) {
                this.announced.insert(address.clone());
                return Poll::Ready(Some(Ok(Change::Insert(address, instance.clone()))));
            }
            // An address that came and went between two polls is nobody's news.
            if this.announced.remove(&address) {
                return Poll::Ready(Some(Ok(Change::Remove(address))));
            }
        }
        view.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Nothing panics while it is held; and the data would be whole even then.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_view(&self) -> usize {
        let mut shared = self.lock();
        let pending: VecDeque<_> = shared.snapshot.addresses().cloned().collect();
        let queued = pending.iter().cloned().collect();
        let view = Some(View {
            pending,
            queued,
            waker: None,
        });
        if let Some(free) = shared.views.iter().position(Option::is_none) {
            shared.views[free] = view;
            return free;
        }
        shared.views.push(view);
        shared.views.len() - 1
    }

    /// Takes over what a machine has learned. Instances that arrive together are seen together: the lock spans the batch.
    fn publish(&self, index: usize, machine: &mut Machine) {
        let events = machine.take_update();
        let mut shared = self.lock();
        let applied = shared
            .snapshot
            .apply(events, machine.range(), &self.decoder);
        if let Some((key, revision, error)) = &applied.first_rejected {
            tracing::warn!(%key, %revision, rejected = applied.rejected, "skipped values that cannot be read; the first of them {error}");
        }
        let mut wakers = Vec::new();
        if !applied.changed.is_empty() {
            for view in shared.views.iter_mut().flatten() {
                for address in &applied.changed {
                    view.tell(address);
                }
                wakers.extend(view.waker.take());
            }
        }
        let instances = shared.snapshot.len();
        shared.rejected += applied.rejected;
        if let Some(report) = shared.reports.get_mut(index) {
            report.clone_from(&machine.report);
        }
        drop(shared);
        self.status.send_if_modified(|status| {
            // Locked inside the status and never around it: who looks at a status may ask for the instances meanwhile.
            let shared = self.lock();
            let next = ResolverStatus::of(&shared.reports, shared.rejected, Some(status));
            drop(shared);
            if next.state != status.state {
                let error = next.last_error.as_ref().map(tracing::field::display);
                tracing::info!(state = ?next.state, instances, revision = %next.revision, error, "resolver state changed");
            }
            let modified = !next.says_the_same(status);
            *status = next;
            modified
        });
        for waker in wakers {
            waker.wake();
        }
    }
}

/// Carries a machine's commands out, for ever.
async fn run(etcd: Etcd, mut machine: Machine, core: Arc<Core>, index: usize) {
    let mut watch: Option<Watch> = None;
    // What the watch was opened with.
    let mut token = None;
    let mut command = machine.on_wake();
    loop {
        tracing::trace!(?command, "next");
        command = match command {
            Command::List(request) => {
                let page = etcd.list(&request).await;
                machine.on_page(page)
            }
            Command::Watch(revision) => {
                // The old stream goes first, so that a member never serves two of ours.
                watch = None;
                token = etcd.token();
                match etcd.watch(machine.range(), Some(revision)).await {
                    Ok(opened) => {
                        watch = Some(opened);
                        machine.on_watch_opened(Instant::now())
                    }
                    Err(error) => machine.on_watch_ended(error, Instant::now()),
                }
            }
            Command::Receive => receive(&etcd, &mut machine, &mut watch).await,
            Command::Check(key) => {
                let answer = etcd.version(&key).await;
                machine.on_checked(answer, Instant::now())
            }
            Command::RenewToken(wait) => {
                watch = None;
                tokio::time::sleep(wait).await;
                let renewed = etcd.refused(token.as_ref()).await;
                if let Err(error) = &renewed {
                    tracing::debug!(%error, "no fresh token");
                }
                machine.on_token(renewed.is_ok())
            }
            Command::Wait(wait) => {
                watch = None;
                tokio::time::sleep(wait).await;
                machine.on_wake()
            }
        };
        core.publish(index, &mut machine);
    }
}

async fn receive(etcd: &Etcd, machine: &mut Machine, watch: &mut Option<Watch>) -> Command {
    let Some(open) = watch else {
        return machine.on_wake();
    };
    let error = match open.message().await {
        Ok(message) if message.canceled => open.cancel_error(&message),
        Ok(message) => return machine.on_message(message),
        Err(error) => error,
    };
    tracing::debug!(%error, "the watch ended");
    etcd.report(&error);
    machine.on_watch_ended(error, Instant::now())
}

/// How a resolver's set of instances stands to etcd.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ResolverStatus {
    /// Whether the set is known and up to date.
    pub state: ResolverState,
    /// Since when it is in this state.
    pub since: Instant,
    /// The revision of the store at which the set was last known to be right; the lowest of them over several prefixes.
    pub revision: Revision,
    /// The last failure, while the state is not [`Fresh`](ResolverState::Fresh).
    pub last_error: Option<EtcdError>,
    /// Writes whose value could not be read, since the start. Each is counted once and skipped.
    pub rejected_values: u64,
    /// Complete lists since the start; more than one per prefix means that a watch could not be resumed.
    pub lists: u64,
    /// Watch streams opened since the start.
    pub watches: u64,
}

/// Whether a set of instances is known and up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResolverState {
    /// Nothing is known yet: etcd has not answered.
    Unknown,
    /// The set is what etcd lists.
    Fresh,
    /// The set is the last one known; etcd cannot be asked right now.
    Stale,
}

impl ResolverStatus {
    fn says_the_same(&self, other: &Self) -> bool {
        let same_error = match (&self.last_error, &other.last_error) {
            (Some(a), Some(b)) => a.is(b),
            (a, b) => a.is_none() && b.is_none(),
        };
        let told = |status: &Self| {
            (
                status.state,
                status.revision,
                status.rejected_values,
                status.lists,
                status.watches,
            )
        };
        same_error && told(self) == told(other)
    }

    fn of(reports: &[Report], rejected_values: u64, before: Option<&Self>) -> Self {
        let last_error = reports.iter().find_map(|report| report.trouble.clone());
        let state = if !reports.iter().all(|report| report.listed) {
            ResolverState::Unknown
        } else if last_error.is_some() {
            ResolverState::Stale
        } else {
            ResolverState::Fresh
        };
        let since = before
            .filter(|before| before.state == state)
            .map_or_else(Instant::now, |before| before.since);
        Self {
            state,
            since,
            revision: reports
                .iter()
                .map(|report| report.revision)
                .min()
                .unwrap_or_default(),
            last_error,
            rejected_values: rejected_values
                + reports.iter().map(|report| report.oversized).sum::<u64>(),
            lists: reports.iter().map(|report| report.lists).sum(),
            watches: reports.iter().map(|report| report.watches).sum(),
        }
    }
}
