//! The running resolvers of a registry. Resolvers of the same service and keys, with the same options and on the same runtime, share one
//! watch and one set of instances.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::runtime::{Handle, Id};

use super::feedback::ResolverFeedback;
use super::options::Options;
use super::resolver::{Resolver, Tasks};
use super::store::Core;
use crate::keyspace::Range;

/// The running resolvers of a registry and of its clones.
#[derive(Clone, Debug, Default)]
pub(crate) struct RunningResolvers(Arc<Mutex<Running>>);

#[derive(Debug, Default)]
struct Running {
    by_service: HashMap<String, Vec<Entry>>,
    /// If the map has more services than this number, it is searched for services without a resolver.
    prune_above: usize,
}

/// A resolver. The entry does not keep the resolver running: the resolver ends when its last clone is dropped.
#[derive(Debug)]
struct Entry {
    /// The runtime on which the tasks run. A resolver that is started on another runtime gets tasks of its own, because these tasks end
    /// with their runtime.
    runtime: Id,
    ranges: Vec<Range>,
    core: Weak<Core>,
    /// The tasks also have the options. An entry must not own them: a filter can own a resolver or a registry.
    tasks: Weak<Tasks>,
    feedback: ResolverFeedback,
}

/// The parts of a running resolver.
struct Found {
    core: Arc<Core>,
    tasks: Arc<Tasks>,
    feedback: ResolverFeedback,
}

impl Entry {
    fn is_alive(&self) -> bool {
        self.tasks.strong_count() > 0
    }

    fn find(&self, runtime: Id, ranges: &[Range]) -> Option<Found> {
        if self.runtime != runtime || self.ranges != ranges {
            return None;
        }
        let (tasks, core) = (self.tasks.upgrade()?, self.core.upgrade()?);
        Some(Found {
            core,
            tasks,
            feedback: self.feedback.clone(),
        })
    }
}

impl RunningResolvers {
    /// Returns a subscription to the resolver that already runs for this service and these keys, with these options and on this runtime. If
    /// there is none, starts a resolver.
    pub(super) fn join_or_start(
        &self,
        service: &str,
        ranges: &[Range],
        options: &Options,
        start: impl FnOnce() -> Resolver,
    ) -> Resolver {
        if ranges.is_empty() {
            // Nothing is watched, and each resolver has its own reason.
            return start();
        }
        let runtime = Handle::current().id();
        // The lock is held during the start, so that two concurrent starts do not begin two watches. It is not held during a subscription,
        // which calls the filter of the user.
        // Declared before the guard, so that a resolver whose last clone is dropped meanwhile is dropped after the unlock: its filter is the
        // user's.
        let mut others = Vec::new();
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = running.by_service.entry(service.to_owned());
        // Nearly always, a service has one resolver.
        let entries = entries.or_insert_with(|| Vec::with_capacity(1));
        entries.retain(Entry::is_alive);
        let mut found = None;
        for entry in entries.iter() {
            if let Some(candidate) = entry.find(runtime, ranges) {
                if *candidate.tasks.options() == *options && !candidate.core.has_ended() {
                    found = Some(candidate);
                    break;
                }
                others.push(candidate);
            }
        }
        if let Some(Found {
            core,
            tasks,
            feedback,
        }) = found
        {
            drop(running);
            // A resolver that waits after a failure tries again at once, as a new one would.
            core.wake();
            return Resolver::subscribed(core, tasks, feedback);
        }
        let resolver = start();
        let (core, tasks, feedback) = resolver.parts();
        entries.push(Entry {
            runtime,
            ranges: ranges.to_vec(),
            core: Arc::downgrade(core),
            tasks: Arc::downgrade(tasks),
            feedback: feedback.clone(),
        });
        running.prune();
        resolver
    }
}

impl Running {
    /// Removes the services without a resolver if the map has more than `prune_above` services. Without this, the map would grow forever in
    /// a program that uses each service name only once.
    fn prune(&mut self) {
        if self.by_service.len() <= self.prune_above {
            return;
        }
        self.by_service
            .retain(|_, entries| entries.iter().any(Entry::is_alive));
        self.prune_above = self.by_service.len() * 2 + PRUNE_MIN;
    }
}

/// After a search, the map is not searched again before it has more services than this.
const PRUNE_MIN: usize = 16;
