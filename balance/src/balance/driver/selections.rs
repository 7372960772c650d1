//! The ready sets of selections, and the traffic split.
//!
//! For each criterion by which calls select endpoints, the driver keeps a ready set with the matching endpoints. It is updated together with
//! the ready sets of the whole channel, so a pick searches nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::ready_set_pair::{Placed, ReadySets};
use super::subchannel_table::SubchannelId;
use crate::balance::endpoint::Endpoint;
use crate::balance::hash_ring::{HashRing, RingBudget};
use crate::balance::ready_connection::ReadyEntry;
use crate::balance::select::Criterion;
use crate::balance::subsets::{SplitPart, Subset, Subsets};
use crate::balance::traffic_split::TrafficSplit;

/// The ready sets of all criteria that are in use, and the traffic split.
#[derive(Debug)]
pub(super) struct Selections {
    sets: HashMap<Criterion, Selection>,
    /// The parts of the traffic split. Their criteria stay in `sets`.
    split: Vec<(Criterion, u32)>,
    takes_turns: bool,
    is_hashed: bool,
    swept: Instant,
}

/// The ready sets of one criterion.
#[derive(Debug)]
struct Selection {
    sets: ReadySets<ReadyEntry>,
    used: Arc<AtomicBool>,
    /// The published set; `None` if it has changed since then.
    published: Option<Arc<Subset>>,
}

impl Selections {
    pub(super) fn new(
        split: &TrafficSplit,
        takes_turns: bool,
        is_hashed: bool,
        now: Instant,
    ) -> Self {
        let mut selections = Self {
            sets: HashMap::new(),
            split: Vec::new(),
            takes_turns,
            is_hashed,
            swept: now,
        };
        selections.set_split(split, &ReadySets::new(false, false));
        selections
    }

    /// Adds a set for a criterion, unless there is one. `all` contains the connections to all endpoints. If there are too many sets, drops the
    /// sets that are not in use, or else any other.
    pub(super) fn add(&mut self, criterion: Criterion, all: &ReadySets<ReadyEntry>) {
        if self.sets.contains_key(&criterion) {
            return;
        }
        if self.sets.len() >= MAX_SETS {
            self.drop_unused();
        }
        let split = &self.split;
        let removable = |criterion: &&Criterion| !split.iter().any(|(part, _)| part == *criterion);
        if self.sets.len() >= MAX_SETS
            && let Some(criterion) = self.sets.keys().find(removable).cloned()
        {
            self.sets.remove(&criterion);
        }
        let mut sets = ReadySets::of_selection(self.takes_turns, self.is_hashed);
        for (id, entry, weight, is_last_resort) in all.placed() {
            if matches(&criterion, entry.connection().endpoint()) {
                sets.place(id, entry.clone(), weight, is_last_resort);
            }
        }
        let selection = Selection {
            sets,
            used: Arc::new(AtomicBool::new(true)),
            published: None,
        };
        self.sets.insert(criterion, selection);
    }

    pub(super) fn set_split(&mut self, split: &TrafficSplit, all: &ReadySets<ReadyEntry>) {
        self.split = split.criteria();
        for (criterion, _) in self.split.clone() {
            self.add(criterion, all);
        }
    }

    /// Sets whether the sets have a rotation by weight, as those of the whole channel.
    pub(super) fn set_takes_turns(&mut self, takes_turns: bool) {
        self.takes_turns = takes_turns;
        for selection in self.sets.values_mut() {
            selection.sets.set_takes_turns(takes_turns);
            selection.published = None;
        }
    }

    /// Puts a ready connection into the sets of the criteria that its endpoint matches.
    pub(super) fn place(
        &mut self,
        id: SubchannelId,
        entry: &ReadyEntry,
        weight: u32,
        is_last_resort: bool,
    ) -> Placed {
        let mut placed = Placed::Unchanged;
        let endpoint = entry.connection().endpoint();
        for (criterion, selection) in &mut self.sets {
            let outcome = if matches(criterion, endpoint) {
                let entry = entry.clone();
                selection.sets.place(id, entry, weight, is_last_resort)
            } else if selection.sets.remove(id) {
                Placed::Moved
            } else {
                Placed::Unchanged
            };
            if outcome != Placed::Unchanged {
                selection.published = None;
            }
            placed = placed.max(outcome);
        }
        placed
    }

    pub(super) fn remove(&mut self, id: SubchannelId) {
        for selection in self.sets.values_mut() {
            if selection.sets.remove(id) {
                selection.published = None;
            }
        }
    }

    /// Returns the sets to publish, or `None` if there are none. `count` returns the number of endpoints that match a criterion, and how
    /// many of them may become ready at any moment.
    pub(super) fn freeze(
        &mut self,
        count: impl Fn(&Criterion) -> (usize, usize),
        rings: &mut RingBudget,
    ) -> Option<Arc<Subsets>> {
        if self.sets.is_empty() {
            return None;
        }
        let mut subsets = Subsets::default();
        for (criterion, selection) in &mut self.sets {
            let subset = selection.freeze(|| count(criterion), rings);
            subsets.sets.insert(criterion.clone(), subset);
        }
        if !self.split.is_empty() {
            subsets.split = Some(parts(&self.split, &subsets.sets));
        }
        Some(Arc::new(subsets))
    }

    /// Drops the sets that no call has used for a while. Returns whether a set was dropped.
    pub(super) fn sweep(&mut self, now: Instant) -> bool {
        if self.sets.is_empty() || now.saturating_duration_since(self.swept) < SWEEP {
            return false;
        }
        self.swept = now;
        self.drop_unused()
    }

    /// Drops the sets that no call has used since this function was last called, except for those of the traffic split.
    fn drop_unused(&mut self) -> bool {
        let before = self.sets.len();
        let split = &self.split;
        self.sets.retain(|criterion, selection| {
            selection.used.swap(false, Ordering::Relaxed)
                || split.iter().any(|(part, _)| part == criterion)
        });
        self.sets.len() < before
    }
}

impl Selection {
    /// Returns the set to publish. A set without ready endpoints is always built again, because its counts may have changed.
    fn freeze(
        &mut self,
        count: impl FnOnce() -> (usize, usize),
        rings: &mut RingBudget,
    ) -> Arc<Subset> {
        if let Some(published) = &self.published
            && published.ready.len() > 0
        {
            return Arc::clone(published);
        }
        let ready = self.sets.freeze(rings);
        let is_stale = ready.ring().is_some_and(HashRing::is_stale);
        let (endpoints, pending) = if ready.len() > 0 { (0, 0) } else { count() };
        let subset = Arc::new(Subset {
            ready,
            endpoints,
            pending,
            used: Arc::clone(&self.used),
        });
        // A set with a stale ring is frozen again by the next publication.
        self.published = (!is_stale).then(|| Arc::clone(&subset));
        subset
    }
}

/// Returns the parts of the split that have a weight and a ready endpoint.
fn parts(split: &[(Criterion, u32)], sets: &HashMap<Criterion, Arc<Subset>>) -> Box<[SplitPart]> {
    let mut end = 0;
    let mut parts = Vec::new();
    for (criterion, weight) in split {
        if let Some(subset) = sets.get(criterion)
            && subset.ready.len() > 0
            && *weight > 0
        {
            end += u64::from(*weight);
            let subset = Arc::clone(subset);
            parts.push(SplitPart { end, subset });
        }
    }
    parts.into()
}

/// Returns whether an endpoint matches a criterion.
pub(super) fn matches(criterion: &Criterion, endpoint: &Endpoint) -> bool {
    criterion.matches(endpoint.address(), &endpoint.attributes())
}

/// Limit on the number of sets. Each publication looks at every set.
const MAX_SETS: usize = 1_024;
/// A set that no call has used between two sweeps is dropped.
const SWEEP: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    fn version(number: usize) -> Criterion {
        Criterion::labels([("version", number.to_string())])
    }

    #[test]
    fn the_number_of_sets_is_limited_and_unused_sets_are_dropped() {
        let now = Instant::now();
        let split = TrafficSplit::new().version("canary", 5).rest(95);
        let all = ReadySets::new(false, false);
        let mut selections = Selections::new(&split, false, false, now);
        for number in 0..2 * MAX_SETS {
            selections.add(version(number), &all);
            assert!(selections.sets.len() <= MAX_SETS);
            assert!(selections.sets.contains_key(&version(number)));
        }
        let last = version(2 * MAX_SETS - 1);
        assert!(!selections.sweep(now), "a sweep must not be early");
        selections.sweep(now + SWEEP);
        assert!(selections.sets.contains_key(&last), "was just added");
        selections.sweep(now + SWEEP * 2);
        let left: Vec<_> = selections.sets.keys().cloned().collect();
        let parts: Vec<_> = split.criteria().into_iter().map(|(part, _)| part).collect();
        assert_eq!(left.len(), parts.len());
        assert!(parts.iter().all(|part| left.contains(part)));
        selections.set_split(&TrafficSplit::new(), &all);
        selections.sweep(now + SWEEP * 3);
        assert!(selections.sets.is_empty());
        assert!(
            selections
                .freeze(|_| (0, 0), &mut RingBudget::new(0))
                .is_none()
        );
    }
}
