//! Applies the selections that calls have requested, and changes of the traffic split.

use std::sync::Arc;

use tokio::time::Instant;

use super::driver::Driver;
use super::selections::matches;
use super::subchannel_table::Class;
use crate::balance::hash_ring::RingBudget;
use crate::balance::subsets::Subsets;

impl Driver {
    /// Adds the sets that calls have requested, and applies a new traffic split.
    pub(super) fn update_selections(&mut self) {
        let (wanted, split) = (self.shared.take_wanted(), self.shared.new_split());
        if wanted.is_empty() && split.is_none() {
            return;
        }
        if let Some(split) = &split {
            tracing::info!(?split, "the traffic split has changed");
            self.selections.set_split(split, &self.ready_sets);
        }
        for criterion in wanted {
            self.selections.add(criterion, &self.ready_sets);
        }
        self.publish();
        if let Some(split) = &split {
            self.shared.on_split_applied(split);
        }
    }

    /// Returns the ready sets of the selections, to be published.
    pub(super) fn freeze_selections(&mut self, rings: &mut RingBudget) -> Option<Arc<Subsets>> {
        let endpoints = &self.endpoints;
        self.selections.freeze(
            |criterion| {
                let mut counts = (0, 0);
                for entry in endpoints.values() {
                    if matches(criterion, &entry.endpoint) {
                        counts.0 += 1;
                        counts.1 += usize::from(entry.class == Class::Pending);
                    }
                }
                counts
            },
            rings,
        )
    }

    /// Drops the sets that no call has used for a while.
    pub(super) fn sweep_selections(&mut self, now: Instant) {
        if self.selections.sweep(now) {
            self.publication.soon();
        }
    }
}
