//! The state that the tasks and the subscriptions of a resolver share.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tower::discover::Change;

use super::hold::{Hold, News, Outcome};
use super::instances::{Applied, Instances};
use super::metrics::ResolverMetrics;
use super::options::{Filter, Options};
use super::service_config::{ConfigPublisher, ServiceConfigStatus};
use super::status::{RejectedKey, ResolverState, ResolverStatus};
use super::watcher::{Machine, Report};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::format::{Decoder, FormatError};
use crate::instance::Instance;
use crate::keyspace::{Key, Revision};
use tonic_balance::{Address, AddressPolicy};

/// The state that the tasks and the subscriptions share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) service: String,
    /// The target, for the metrics.
    pub(super) target: Box<str>,
    /// The counters, if metrics are enabled.
    pub(super) metrics: Option<ResolverMetrics>,
    /// The service config, if it is watched.
    pub(super) service_config: Option<Arc<ConfigPublisher>>,
    decoder: Decoder,
    shared: Mutex<Shared>,
    pub(super) status: watch::Sender<ResolverStatus>,
    /// Wakes the task that ends holds (see [`Hold`]). Notified when the first instance is held, and when no instance is held any more.
    pub(super) held: Notify,
    /// Wakes the task that writes the cache.
    pub(super) changed: Notify,
    /// Wakes the task of each prefix.
    woken: Vec<Notify>,
    /// Whether the task of a prefix has ended. Not part of `shared`, whose lock is held while a filter runs.
    ended: AtomicBool,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) registered: Instances,
    pub(super) hold: Hold,
    /// The instances of the cache, or the seeds, until every prefix has been listed.
    fallback: HashMap<Address, Instance>,
    /// Whether the cache or the seeds have been used, and not every prefix has been listed since.
    uses_fallback: bool,
    pub(super) subscriptions: Vec<Option<Subscription>>,
    pub(super) reports: Vec<Report>,
    /// For each prefix, whether it must be listed again.
    list_again: Vec<bool>,
    /// Number of writes whose value could not be used.
    pub(super) rejected: u64,
    /// Time of the last warning about writes whose value could not be used.
    warned: Option<Instant>,
    filter: Option<Filter>,
}

/// The addresses whose changes one subscriber has not received yet. Each address is contained once: however often it changes, the
/// subscriber receives one change with the newest state.
#[derive(Debug)]
pub(super) struct Subscription {
    pending: VecDeque<Address>,
    /// The addresses in `pending`, as a set.
    queued: HashSet<Address>,
    /// Addresses for which the subscriber has received an insert and no later remove.
    announced: HashSet<Address>,
    pub(super) waker: Option<Waker>,
}

impl Subscription {
    fn notify(&mut self, address: &Address) {
        if self.queued.insert(address.clone()) {
            self.pending.push_back(address.clone());
        }
    }

    /// Drops pending addresses that are no longer known and that the subscriber does not currently have. Otherwise, they would accumulate
    /// if a subscriber only reads the list and never polls its stream.
    fn prune(&mut self, is_known: impl Fn(&Address) -> bool, known: usize) {
        if self.pending.len() <= 2 * (known + self.announced.len()) + MAX_UNPOLLED {
            return;
        }
        let announced = &self.announced;
        let is_relevant = |address: &Address| is_known(address) || announced.contains(address);
        self.pending.retain(is_relevant);
        self.queued.retain(is_relevant);
    }

    /// Returns the next address in first-in, first-out order. An address that changes constantly therefore does not delay other addresses.
    fn next(&mut self) -> Option<Address> {
        let address = self.pending.pop_front()?;
        self.queued.remove(&address);
        Some(address)
    }
}

impl Shared {
    /// Returns the instance at an address: the registered instance, else the held instance, else the instance of the cache or the seeds.
    /// Returns `None` if the filter rejects the instance.
    pub(super) fn get(&self, address: &Address) -> Option<&Instance> {
        self.registered
            .get(address)
            .or_else(|| self.hold.get(address))
            .or_else(|| self.fallback.get(address))
            .filter(|instance| self.accepts(instance))
    }

    pub(super) fn instances(&self) -> impl Iterator<Item = &Instance> {
        let all = self.registered.instances().chain(self.hold.instances());
        let is_listed = |address: &Address| {
            self.registered.get(address).is_some() || self.hold.get(address).is_some()
        };
        let fallback = self.fallback.values();
        let fallback = fallback.filter(move |instance| !is_listed(instance.address()));
        all.chain(fallback)
            .filter(|instance| self.accepts(instance))
    }

    fn accepts(&self, instance: &Instance) -> bool {
        let filter = self.filter.as_ref();
        filter.is_none_or(|filter| filter.accepts(instance))
    }

    /// Returns the next change that the subscriber has not received yet.
    pub(super) fn next(&mut self, subscription: usize) -> Option<Change<Address, Instance>> {
        loop {
            let address = self.subscriptions.get_mut(subscription)?.as_mut()?.next()?;
            let instance = self.get(&address).cloned();
            let subscription = self.subscriptions.get_mut(subscription)?.as_mut()?;
            if let Some(instance) = instance {
                subscription.announced.insert(address.clone());
                return Some(Change::Insert(address, instance));
            }
            // An address that was added and removed again between two polls causes no change.
            if subscription.announced.remove(&address) {
                return Some(Change::Remove(address));
            }
        }
    }

    pub(super) fn wake_later(&mut self, subscription: usize, waker: &Waker) {
        if let Some(Some(subscription)) = self.subscriptions.get_mut(subscription) {
            subscription.waker = Some(waker.clone());
        }
    }

    /// Updates the holds after a batch of events was applied.
    fn on_applied(&mut self, applied: &mut Applied, now: Instant) -> Option<News> {
        let (mut here, mut gone) = (Vec::new(), Vec::new());
        for address in &applied.changed {
            if self.registered.get(address).is_some() {
                here.push(address.clone());
            } else if let Some(instance) = applied.vanished.remove(address) {
                gone.push(instance);
            }
        }
        let Outcome { released, news } = self.hold.on_changes(here, gone, now);
        applied.changed.extend(released);
        news
    }

    /// Replaces the instances of the cache, or the seeds, by the listed ones. The instances that are not listed count as removed in one
    /// batch, so some of them may be held as after any mass removal, for example if etcd has lost its data. Returns the addresses that may
    /// have changed.
    fn end_fallback(&mut self, now: Instant) -> (Vec<Address>, Option<News>) {
        self.uses_fallback = false;
        let fallback = std::mem::take(&mut self.fallback);
        let addresses: Vec<_> = fallback.keys().cloned().collect();
        let unregistered = fallback
            .into_values()
            .filter(|instance| self.registered.get(instance.address()).is_none())
            .collect();
        let before = self.hold.on_changes(addresses.clone(), Vec::new(), now);
        let after = self.hold.on_changes(Vec::new(), unregistered, now);
        let released = before.released.into_iter().chain(after.released);
        let news = after.news.or(before.news);
        (addresses.into_iter().chain(released).collect(), news)
    }

    fn notify(&mut self, changed: &[Address]) -> Vec<Waker> {
        let mut wakers = Vec::new();
        if !changed.is_empty() {
            let (snapshot, hold, fallback) = (&self.registered, &self.hold, &self.fallback);
            let is_known = |address: &Address| {
                snapshot
                    .get(address)
                    .or_else(|| hold.get(address))
                    .or_else(|| fallback.get(address))
                    .is_some()
            };
            let known = snapshot.len() + hold.len() + fallback.len();
            for subscription in self.subscriptions.iter_mut().flatten() {
                for address in changed {
                    subscription.notify(address);
                }
                subscription.prune(is_known, known);
                wakers.extend(subscription.waker.take());
            }
        }
        wakers
    }
}

impl Core {
    /// Creates the state with an empty set. The state is [`ResolverState::Unknown`] until every prefix has been listed. If there is no
    /// prefix, `trouble` is the reason, such as an invalid service name.
    pub(super) fn new(
        service: String,
        prefixes: usize,
        options: Options,
        trouble: Option<EtcdError>,
    ) -> Self {
        let mut reports = vec![Report::default(); prefixes];
        if prefixes == 0 {
            // Without a prefix, there is nothing to list, so the empty set counts as known.
            reports.push(Report {
                listed: true,
                trouble,
                ..Report::default()
            });
        }
        let shared = Shared {
            registered: Instances::new(options.limit),
            hold: Hold::new(options.hold, fastrand::Rng::new()),
            fallback: HashMap::new(),
            uses_fallback: false,
            subscriptions: Vec::new(),
            list_again: vec![false; reports.len()],
            reports,
            rejected: 0,
            warned: None,
            filter: options.filter,
        };
        let status = watch::Sender::new(status_of(&shared, None));
        Self {
            service,
            target: Box::default(),
            metrics: None,
            service_config: None,
            decoder: options.decoder,
            shared: Mutex::new(shared),
            status,
            held: Notify::new(),
            woken: (0..prefixes).map(|_| Notify::new()).collect(),
            ended: AtomicBool::new(false),
            changed: Notify::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        // Only a filter can panic while this lock is held, and the data is consistent even then. So a poisoned lock is used as usual.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn policy(&self) -> &AddressPolicy {
        &self.decoder.policy
    }

    pub(super) fn subscribe(&self) -> usize {
        let mut shared = self.lock();
        let addresses = shared.instances().map(Instance::address);
        let pending: VecDeque<_> = addresses.cloned().collect();
        let queued = pending.iter().cloned().collect();
        let subscription = Some(Subscription {
            announced: HashSet::new(),
            pending,
            queued,
            waker: None,
        });
        if let Some(free) = shared.subscriptions.iter().position(Option::is_none) {
            shared.subscriptions[free] = subscription;
            return free;
        }
        shared.subscriptions.push(subscription);
        shared.subscriptions.len() - 1
    }

    /// Uses these instances until every prefix has been listed. Returns false, and does not use them, if every prefix has already been
    /// listed.
    pub(super) fn use_fallback(&self, instances: Vec<Instance>) -> bool {
        let mut shared = self.lock();
        if shared.reports.iter().all(|report| report.listed) {
            return false;
        }
        let addresses: Vec<_> = instances
            .iter()
            .map(|instance| instance.address().clone())
            .collect();
        let by_address = instances.into_iter();
        let by_address = by_address.map(|instance| (instance.address().clone(), instance));
        shared.fallback = by_address.collect();
        shared.uses_fallback = true;
        let wakers = shared.notify(&addresses);
        drop(shared);
        self.announce(None, wakers);
        true
    }

    /// Returns the registered instances, for the cache.
    pub(super) fn registered(&self) -> Vec<Instance> {
        self.lock().registered.instances().cloned().collect()
    }

    /// Returns the known instances, sorted by address.
    pub(super) fn instances(&self) -> Vec<Instance> {
        let mut instances: Vec<_> = self.lock().instances().cloned().collect();
        instances.sort_by(|a, b| a.address().cmp(b.address()));
        instances
    }

    /// Returns the keys whose latest value is not used.
    pub(super) fn rejected(&self) -> Vec<RejectedKey> {
        let shared = self.lock();
        let rejected = shared.registered.rejected();
        let of = |(key, revision, reason): (&Key, Revision, &FormatError)| RejectedKey {
            key: key.escaped(),
            revision,
            reason: reason.clone(),
        };
        rejected.map(of).collect()
    }

    /// Returns the status of the service config, if it is watched.
    pub(super) fn service_config(&self) -> Option<ServiceConfigStatus> {
        let publisher = self.service_config.as_ref()?;
        Some(publisher.status.borrow().clone())
    }

    /// Publishes the changes that the state machine of a prefix has collected. The lock is held for the whole batch, so that subscribers
    /// see all changes of the batch at once.
    pub(super) fn publish(&self, index: usize, machine: &mut Machine, now: Instant) {
        let events = machine.take_update();
        let mut shared = self.lock();
        let mut applied = shared
            .registered
            .apply(events, machine.range(), &self.decoder);
        if let Some((key, revision, error)) = &applied.first_rejected {
            let rejected = applied.rejected;
            // Warnings are rate-limited, because a writer that stores a bad value every second must not flood the log of every client.
            if shared.warned.is_none_or(|at| now >= at + WARN_INTERVAL) {
                shared.warned = Some(now);
                tracing::warn!(?key, %revision, rejected, "skipped values that cannot be used; the first value {error}");
            } else {
                tracing::debug!(?key, %revision, rejected, "skipped values that cannot be used; the first value {error}");
            }
        }
        if shared.registered.take_room() {
            // The rejected keys can belong to any prefix, so every prefix is listed again.
            shared.list_again.fill(true);
            self.wake();
        }
        if shared.list_again.get_mut(index).is_some_and(std::mem::take) {
            machine.list_again(now);
        }
        // An event of an address is newer than the cache.
        for address in &applied.changed {
            shared.fallback.remove(address);
        }
        let mut news = shared.on_applied(&mut applied, now);
        let mut wakers = shared.notify(&applied.changed);
        shared.rejected += applied.rejected;
        let all_listed = |shared: &Shared| shared.reports.iter().all(|report| report.listed);
        let was_listed = all_listed(&shared);
        if let Some(report) = shared.reports.get_mut(index) {
            report.clone_from(&machine.report);
        }
        let is_listed = all_listed(&shared);
        if is_listed && shared.uses_fallback {
            let (addresses, began) = shared.end_fallback(now);
            news = news.or(began);
            wakers.extend(shared.notify(&addresses));
        }
        drop(shared);
        // The cache is also written when the last prefix has been listed without a change: the other prefixes may have instances that are
        // not in the cache yet.
        if is_listed && (!was_listed || !applied.changed.is_empty()) {
            self.changed.notify_one();
        }
        self.announce(news, wakers);
    }

    /// Handles the end of the task of a prefix. The instances of the prefix stay in the set, but they no longer change. The status contains
    /// the reason.
    pub(super) fn on_task_ended(&self, index: usize) {
        self.ended.store(true, Ordering::Relaxed);
        let mut shared = self.lock();
        // When the last resolver is dropped, its tasks are aborted. A handle may remain, and its status then contains this reason.
        let is_dropped = shared.subscriptions.iter().all(Option::is_none);
        if let Some(report) = shared.reports.get_mut(index) {
            report.trouble = Some(if is_dropped {
                let kind = EtcdErrorKind::TaskEnded;
                EtcdError::without_endpoint(kind, "resolver", "the resolver was dropped")
            } else {
                EtcdError::task_ended("resolver")
            });
        }
        drop(shared);
        self.announce(None, Vec::new());
    }

    /// Wakes the tasks of all prefixes, so that they handle a request to list again, or end a wait after a failure.
    pub(super) fn wake(&self) {
        for woken in &self.woken {
            woken.notify_one();
        }
    }

    /// Completes when the task of a prefix is woken.
    pub(super) async fn woken(&self, index: usize) {
        match self.woken.get(index) {
            Some(woken) => woken.notified().await,
            None => std::future::pending().await,
        }
    }

    /// Returns whether the task of a prefix has ended, so that the instances no longer change.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Ends the holds whose deadline has passed. Returns the deadline of the next hold.
    pub(super) fn release(&self, now: Instant) -> Option<Instant> {
        let mut shared = self.lock();
        if shared.hold.deadline().is_none_or(|until| until > now) {
            return shared.hold.deadline();
        }
        let Outcome { released, news } = shared.hold.on_time(now);
        let wakers = shared.notify(&released);
        let next = shared.hold.deadline();
        drop(shared);
        self.announce(news, wakers);
        next
    }

    /// Logs news, updates the status and wakes the subscribers. The caller must have released the lock.
    fn announce(&self, news: Option<News>, wakers: Vec<Waker>) {
        if let Some(news) = news {
            self.log(news);
            self.held.notify_one();
        }
        self.status.send_if_modified(|status| {
            // Lock order: first the status, then the shared state. Code that has borrowed the status may take the second lock, for example
            // in `instances`, so the opposite order could cause a deadlock.
            let shared = self.lock();
            let next = status_of(&shared, Some(status));
            let instances = shared.registered.len();
            drop(shared);
            if next.state != status.state {
                let error = next.last_error.as_ref().map(tracing::field::display);
                let service = &self.service;
                tracing::info!(service, state = %next.state, instances, revision = next.revision.map(Revision::get), error, "resolver state changed");
            }
            if let Some(metrics) = &self.metrics {
                metrics.on_status(status, &next);
            }
            let modified = !next.is_same(status);
            *status = next;
            modified
        });
        for waker in wakers {
            waker.wake();
        }
    }

    fn log(&self, news: News) {
        let service = &self.service;
        match news {
            News::Began {
                registered,
                of,
                length,
            } => {
                tracing::warn!(
                    service,
                    registered,
                    of,
                    kept_for = ?length,
                    "fewer than half of the instances are left in the registry: instances that vanish from now on are kept as a last resort"
                );
            }
            News::Recovered {
                registered,
                removed,
            } => {
                tracing::info!(
                    service,
                    registered,
                    removed,
                    "the mass removal is over; no instance is kept as a last resort any more"
                );
            }
            News::Over {
                registered,
                removed,
            } => {
                tracing::warn!(
                    service,
                    registered,
                    removed,
                    "the instances that had vanished from the registry are not back: they are no longer kept"
                );
            }
        }
    }
}

/// Pending addresses are pruned if their number exceeds twice the number of known and announced addresses by more than this.
const MAX_UNPOLLED: usize = 1024;
/// Minimum time between two warnings about values that could not be used. In between, such values are counted and logged at debug level.
const WARN_INTERVAL: Duration = Duration::from_secs(10);

/// Combines the reports of the tasks into one status.
fn status_of(shared: &Shared, before: Option<&ResolverStatus>) -> ResolverStatus {
    let reports = &shared.reports;
    let sum = |count: fn(&Report) -> u64| reports.iter().map(count).sum::<u64>();
    let last_error = reports.iter().find_map(|report| report.trouble.clone());
    let state = if !reports.iter().all(|report| report.listed) {
        if shared.uses_fallback {
            ResolverState::Stale
        } else {
            ResolverState::Unknown
        }
    } else if last_error.is_some() {
        ResolverState::Stale
    } else {
        ResolverState::Fresh
    };
    let since = before
        .filter(|before| before.state == state)
        .map_or_else(Instant::now, |before| before.since);
    ResolverStatus {
        state,
        since,
        revision: reports.iter().map(|report| report.revision).min().flatten(),
        last_error,
        rejected_values: shared.rejected + sum(|report| report.oversized),
        lists: sum(|report| report.lists),
        watches: sum(|report| report.watches),
        reconciliations: sum(|report| report.reconciliations),
        reads: sum(|report| report.reads),
        repaired: sum(|report| report.repaired),
        cached: shared.fallback.len(),
        held: shared.hold.len(),
        mass_removals: shared.hold.episodes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates a subscriber that only reads the list and never polls its stream.
    #[test]
    fn unread_address_changes_do_not_accumulate() {
        let mut subscription = Subscription {
            pending: VecDeque::new(),
            queued: HashSet::new(),
            announced: HashSet::new(),
            waker: None,
        };
        let address =
            |port: u16| -> Address { format!("127.0.0.1:{port}").parse().expect("an address") };
        let (there, told) = (address(1), address(2));
        subscription.announced.insert(told.clone());
        for changed in [there.clone(), told.clone()] {
            subscription.notify(&changed);
        }
        for port in 3..60_000 {
            subscription.notify(&address(port));
            subscription.prune(|address| *address == there, 1);
            assert!(subscription.pending.len() <= 2 * 2 + MAX_UNPOLLED);
            assert_eq!(subscription.pending.len(), subscription.queued.len());
        }
        assert_eq!(
            (subscription.next(), subscription.next()),
            (Some(there), Some(told))
        );
    }
}
