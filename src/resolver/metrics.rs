//! The counters of a resolver.

use super::status::ResolverStatus;
use crate::metrics::{Counter, LISTS, MASS_REMOVALS, Metrics, REJECTED, REPAIRED, TARGET, WATCHES};

/// The counters of a resolver.
pub(super) struct ResolverMetrics {
    lists: Option<Box<dyn Counter>>,
    watches: Option<Box<dyn Counter>>,
    rejected: Option<Box<dyn Counter>>,
    mass_removals: Option<Box<dyn Counter>>,
    repaired: Option<Box<dyn Counter>>,
}

impl ResolverMetrics {
    pub(super) fn new(metrics: &Metrics, target: &str) -> Self {
        let counter = |instrument| metrics.counter(instrument, &[(TARGET, target)]);
        Self {
            lists: counter(&LISTS),
            watches: counter(&WATCHES),
            rejected: counter(&REJECTED),
            mass_removals: counter(&MASS_REMOVALS),
            repaired: counter(&REPAIRED),
        }
    }

    /// Adds the difference between two statuses. The status counts for as long as the resolver exists; a counter also outlives it.
    pub(super) fn on_status(&self, before: &ResolverStatus, after: &ResolverStatus) {
        for (counter, before, after) in [
            (&self.lists, before.lists, after.lists),
            (&self.watches, before.watches, after.watches),
            (
                &self.rejected,
                before.rejected_values,
                after.rejected_values,
            ),
            (
                &self.mass_removals,
                before.mass_removals,
                after.mass_removals,
            ),
            (&self.repaired, before.repaired, after.repaired),
        ] {
            if let Some(counter) = counter
                && after > before
            {
                counter.add(after - before);
            }
        }
    }
}

impl std::fmt::Debug for ResolverMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResolverMetrics").finish_non_exhaustive()
    }
}
