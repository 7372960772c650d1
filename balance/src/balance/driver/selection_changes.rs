//! Applies the selections that calls have requested, and changes of the traffic split.

use tokio::time::Instant;

use super::driver::Driver;
use super::selections::Known;
use crate::balance::picker::LbPolicy;

impl Driver {
    /// Adds the sets that calls have requested, and applies a new traffic split.
    pub(super) fn update_selections(&mut self) {
        let is_hashed = self.options.policy == LbPolicy::RingHash;
        let limit = if is_hashed { MAX_RINGS } else { usize::MAX };
        let wanted = self.shared.take_wanted(limit);
        let split = self.shared.new_split();
        let known = Known {
            endpoints: &self.endpoints,
            ready: &self.ready_sets,
        };
        if !wanted.is_empty() {
            // The sets can wait for further changes of a large channel: a call that has requested one waits, or has searched for an endpoint.
            self.publication.soon();
        }
        for criterion in wanted {
            self.selections.add(criterion, known);
        }
        if let Some(split) = split {
            tracing::info!(?split, "the traffic split has changed");
            self.selections.set_split(&split, known);
            self.publish();
            self.shared.on_split_applied(split);
        }
    }

    /// Drops the sets that no call has used for a while.
    pub(super) fn sweep_selections(&mut self, now: Instant) {
        if self.selections.sweep(now) {
            self.publication.soon();
        }
    }
}

/// Limit on the number of sets that are added at once if each needs a ring, whose computation takes a few milliseconds.
const MAX_RINGS: usize = 4;
