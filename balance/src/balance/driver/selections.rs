//! The ready sets of selections, and the traffic split.
//!
//! For each criterion by which calls select endpoints, the driver keeps a ready set with the matching endpoints. It is updated together with
//! the ready sets of the whole channel, so a pick searches nothing. The number of matching endpoints is kept up to date as well, for calls
//! whose selection has no ready endpoint.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::endpoint_entry::EndpointEntry;
use super::ready_set_pair::{Placed, ReadySets, Standing};
use super::subchannel_table::{Class, SubchannelId};
use crate::address::Address;
use crate::attributes::Attributes;
use crate::balance::endpoint::Endpoint;
use crate::balance::hash_ring::{HashRing, RingBudget};
use crate::balance::ready_connection::ReadyEntry;
use crate::balance::select::Criterion;
use crate::balance::subsets::{Split, SplitPart, Subset, Subsets};
use crate::balance::traffic_split::TrafficSplit;

/// The ready sets of all criteria that are in use, and the traffic split.
#[derive(Debug)]
pub(super) struct Selections {
    sets: HashMap<Criterion, Selection>,
    /// The parts of the traffic split. Their criteria stay in `sets`.
    split: Vec<(Criterion, u32)>,
    /// The criteria of the parts that have a weight.
    weighted: Arc<[Criterion]>,
    takes_turns: bool,
    is_hashed: bool,
    /// The number of times that the use of the sets was recorded.
    round: u64,
    /// The value of `round` at the last sweep.
    swept_round: u64,
    swept: Instant,
    /// The number of times that the sets were frozen.
    frozen: u64,
    /// The published sets; `None` if one of them has changed since then.
    published: Option<Arc<Subsets>>,
}

/// The ready sets of one criterion.
#[derive(Debug)]
struct Selection {
    sets: ReadySets<ReadyEntry>,
    counts: Counts,
    /// Whether a call has used the set since its use was last recorded.
    used: Arc<AtomicBool>,
    /// The last round in which a use of the set was recorded.
    last_used: u64,
    /// Whether the set was published, so that the calls that have requested it had their answer.
    was_published: bool,
    /// The value of [`Selections::frozen`] since which the ring of the set has been stale; `u64::MAX` if it is not stale.
    stale_since: u64,
    /// The published set; `None` if it has changed since then.
    published: Option<Arc<Subset>>,
}

/// The number of endpoints that match a criterion, and how many of them may become ready at any moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    endpoints: usize,
    pending: usize,
}

/// The endpoints and the connections of the channel, from which a new set is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known<'a> {
    pub(super) endpoints: &'a HashMap<Address, EndpointEntry>,
    pub(super) ready: &'a ReadySets<ReadyEntry>,
}

/// The part of an endpoint that the counts depend on.
pub(super) type Counted<'a> = (&'a Attributes, Class);

impl Known<'_> {
    fn count(&self, criterion: &Criterion) -> Counts {
        let mut counts = Counts::default();
        for entry in self.endpoints.values() {
            if matches(criterion, &entry.endpoint) {
                counts.endpoints += 1;
                counts.pending += usize::from(entry.class == Class::Pending);
            }
        }
        counts
    }
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
            weighted: Arc::default(),
            takes_turns,
            is_hashed,
            round: 0,
            swept_round: 0,
            swept: now,
            frozen: 0,
            published: None,
        };
        let none = Known {
            endpoints: &HashMap::new(),
            ready: &ReadySets::new(false, false),
        };
        selections.set_split(split, none);
        selections
    }

    /// Adds a set for a criterion, unless there is one. If there are too many sets, drops the one that was not used for the longest time.
    pub(super) fn add(&mut self, criterion: Criterion, known: Known<'_>) {
        if self.sets.contains_key(&criterion) {
            return;
        }
        let counts = known.count(&criterion);
        if self.sets.len() >= self.limit() {
            self.drop_oldest(|_| true);
        } else if counts.endpoints == 0 && self.unmatched() >= MAX_UNMATCHED {
            self.drop_oldest(|selection| selection.counts.endpoints == 0);
        }
        let mut sets = ReadySets::of_selection(self.takes_turns, self.is_hashed);
        for (id, entry, weight, standing) in known.ready.placed() {
            if matches(&criterion, entry.connection().endpoint()) {
                sets.place(id, entry.clone(), weight, standing);
            }
        }
        let selection = Selection {
            sets,
            counts,
            used: Arc::new(AtomicBool::new(true)),
            last_used: self.round,
            was_published: false,
            stale_since: u64::MAX,
            published: None,
        };
        self.sets.insert(criterion, selection);
        self.published = None;
    }

    pub(super) fn set_split(&mut self, split: &TrafficSplit, known: Known<'_>) {
        self.split = split.criteria();
        self.weighted = split.weighted();
        self.published = None;
        for (criterion, _) in self.split.clone() {
            self.add(criterion, known);
        }
    }

    /// Sets whether the sets have a rotation by weight, as those of the whole channel.
    pub(super) fn set_takes_turns(&mut self, takes_turns: bool) {
        self.takes_turns = takes_turns;
        for selection in self.sets.values_mut() {
            selection.sets.set_takes_turns(takes_turns);
            selection.published = None;
        }
        self.published = None;
    }

    /// Sets whether the sets have a ring, as those of the whole channel. The driver cannot compute the rings of many selections at once, so
    /// calls request their sets again.
    pub(super) fn set_hashed(&mut self, is_hashed: bool) {
        self.is_hashed = is_hashed;
        if is_hashed {
            let split = &self.split;
            self.sets.retain(|criterion, _| is_part(split, criterion));
        }
        for selection in self.sets.values_mut() {
            selection.sets.set_hashed(is_hashed);
            selection.published = None;
        }
        self.published = None;
    }

    /// Puts a ready connection into the sets of the criteria that its endpoint matches.
    pub(super) fn place(
        &mut self,
        id: SubchannelId,
        entry: &ReadyEntry,
        weight: u32,
        standing: Standing,
    ) -> Placed {
        let mut placed = Placed::Unchanged;
        let endpoint = entry.connection().endpoint();
        for (criterion, selection) in &mut self.sets {
            let outcome = if matches(criterion, endpoint) {
                let entry = entry.clone();
                selection.sets.place(id, entry, weight, standing)
            } else if selection.sets.remove(id) {
                Placed::Moved
            } else {
                Placed::Unchanged
            };
            if outcome != Placed::Unchanged {
                selection.published = None;
                self.published = None;
            }
            placed = placed.max(outcome);
        }
        placed
    }

    pub(super) fn remove(&mut self, id: SubchannelId) {
        for selection in self.sets.values_mut() {
            if selection.sets.remove(id) {
                selection.published = None;
                self.published = None;
            }
        }
    }

    /// Updates the counts after an endpoint was added (`before` is `None`) or removed (`after` is `None`), or its attributes or its class have
    /// changed.
    pub(super) fn recount(
        &mut self,
        address: &Address,
        before: Option<Counted<'_>>,
        after: Option<Counted<'_>>,
    ) {
        for (criterion, selection) in &mut self.sets {
            let count = |counted: Option<Counted<'_>>| {
                let matching =
                    counted.filter(|(attributes, _)| criterion.matches(address, attributes));
                matching.map_or(Counts::default(), |(_, class)| Counts {
                    endpoints: 1,
                    pending: usize::from(class == Class::Pending),
                })
            };
            let (before, after) = (count(before), count(after));
            if before == after {
                continue;
            }
            let counts = &mut selection.counts;
            counts.endpoints =
                (counts.endpoints + after.endpoints).saturating_sub(before.endpoints);
            counts.pending = (counts.pending + after.pending).saturating_sub(before.pending);
            // The counts are only used while no endpoint of the set is ready.
            let published = &selection.published;
            if published.as_ref().is_none_or(|set| set.ready.len() == 0) {
                selection.published = None;
                self.published = None;
            }
        }
    }

    /// Returns the sets to publish, or `None` if there are none.
    pub(super) fn freeze(&mut self, rings: &mut RingBudget) -> Option<Arc<Subsets>> {
        if self.sets.is_empty() {
            self.published = None;
        } else if self.published.is_none() {
            let mut subsets = Subsets::default();
            let mut is_stale = false;
            self.frozen += 1;
            // The ring that has been stale for the longest time is computed first. Otherwise other sets that change all the time could keep
            // it stale.
            let mut sets: Vec<_> = self.sets.iter_mut().collect();
            sets.sort_by_key(|(_, selection)| selection.stale_since);
            for (criterion, selection) in sets {
                let subset = selection.freeze(rings, self.frozen);
                is_stale |= selection.published.is_none();
                subsets.sets.insert(criterion.clone(), subset);
            }
            if !self.split.is_empty() {
                subsets.split = Some(Split {
                    parts: parts(&self.split, &subsets.sets),
                    weighted: Arc::clone(&self.weighted),
                });
            }
            let subsets = Arc::new(subsets);
            if is_stale {
                return Some(subsets);
            }
            self.published = Some(subsets);
        }
        self.published.clone()
    }

    /// Drops the sets that no call has used for a while. Returns whether a set was dropped.
    pub(super) fn sweep(&mut self, now: Instant) -> bool {
        if self.sets.is_empty() || now.saturating_duration_since(self.swept) < SWEEP {
            return false;
        }
        self.swept = now;
        self.record_use();
        let bound = std::mem::replace(&mut self.swept_round, self.round);
        let before = self.sets.len();
        let split = &self.split;
        self.sets.retain(|criterion, selection| {
            selection.last_used > bound || is_part(split, criterion)
        });
        let is_dropped = self.sets.len() < before;
        if is_dropped {
            self.published = None;
        }
        is_dropped
    }

    /// Records which sets were used since this function was last called.
    fn record_use(&mut self) {
        self.round += 1;
        for selection in self.sets.values_mut() {
            if selection.used.swap(false, Ordering::Relaxed) {
                selection.last_used = self.round;
            }
        }
    }

    /// Drops one of these sets: that which was not used for the longest time. Sets that were not published yet are kept if possible, because
    /// a call waits for them. The sets of the traffic split are always kept.
    fn drop_oldest(&mut self, is_candidate: impl Fn(&Selection) -> bool) {
        self.record_use();
        let split = &self.split;
        let candidates = self
            .sets
            .iter()
            .filter(|(criterion, selection)| is_candidate(selection) && !is_part(split, criterion));
        let oldest =
            candidates.min_by_key(|(_, selection)| (!selection.was_published, selection.last_used));
        if let Some(oldest) = oldest.map(|(criterion, _)| criterion.clone()) {
            self.sets.remove(&oldest);
            self.published = None;
        }
    }

    /// Returns the number of sets without a matching endpoint that were published.
    fn unmatched(&self) -> usize {
        let sets = self.sets.values();
        let unmatched = sets.filter(|set| set.counts.endpoints == 0 && set.was_published);
        unmatched.count()
    }

    fn limit(&self) -> usize {
        if self.is_hashed {
            MAX_HASHED_SETS
        } else {
            MAX_SETS
        }
    }
}

impl Selection {
    /// Returns the set to publish.
    fn freeze(&mut self, rings: &mut RingBudget, frozen: u64) -> Arc<Subset> {
        self.was_published = true;
        if let Some(published) = &self.published {
            return Arc::clone(published);
        }
        let ready = self.sets.freeze(rings);
        let is_stale = ready.ring().is_some_and(HashRing::is_stale);
        self.stale_since = if is_stale {
            self.stale_since.min(frozen)
        } else {
            u64::MAX
        };
        let subset = Arc::new(Subset {
            ready,
            endpoints: self.counts.endpoints,
            pending: self.counts.pending,
            is_last_resort: self.sets.is_last_resort(),
            used: Arc::clone(&self.used),
        });
        // A set with a stale ring is frozen again by the next publication.
        self.published = (!is_stale).then(|| Arc::clone(&subset));
        subset
    }
}

fn is_part(split: &[(Criterion, u32)], criterion: &Criterion) -> bool {
    split.iter().any(|(part, _)| part == criterion)
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
            parts.push(SplitPart {
                end,
                subset: Arc::clone(subset),
                criterion: [criterion.clone()].into(),
            });
        }
    }
    parts.into()
}

/// Returns whether an endpoint matches a criterion.
fn matches(criterion: &Criterion, endpoint: &Endpoint) -> bool {
    criterion.matches(endpoint.address(), &endpoint.attributes())
}

/// Limit on the number of sets. Each change of an endpoint is compared with every set.
const MAX_SETS: usize = 1_024;
/// Limit on the number of sets with a ring. A ring has 64 KiB for up to 256 endpoints, so all rings together have at most 16 MiB, or 32 MiB
/// if selections have more endpoints.
const MAX_HASHED_SETS: usize = 256;
/// Limit on the number of sets without a matching endpoint. They only make failing calls cheaper, and must not displace other sets.
const MAX_UNMATCHED: usize = 64;
/// A set that no call has used between two sweeps is dropped.
const SWEEP: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    /// A channel without connections.
    struct World {
        endpoints: HashMap<Address, EndpointEntry>,
        ready: ReadySets<ReadyEntry>,
    }

    impl World {
        /// Creates a channel with one endpoint for each version below `endpoints`.
        fn new(endpoints: usize) -> Self {
            let entry = |number: usize| {
                let address: Address = format!("10.0.0.5:{}", number + 1).parse().expect("valid");
                let attributes = Attributes::new().with_version(number.to_string());
                let endpoint = Endpoint::new(address.clone());
                endpoint.set_attributes(&attributes);
                let endpoint = Arc::new(endpoint);
                let entry = EndpointEntry::new(endpoint, attributes, Duration::ZERO, None);
                (address, entry)
            };
            Self {
                endpoints: (0..endpoints).map(entry).collect(),
                ready: ReadySets::new(false, false),
            }
        }

        fn known(&self) -> Known<'_> {
            Known {
                endpoints: &self.endpoints,
                ready: &self.ready,
            }
        }
    }

    fn version(number: usize) -> Criterion {
        Criterion::labels([("version", number.to_string())])
    }

    fn selections(split: &TrafficSplit, now: Instant) -> Selections {
        Selections::new(split, false, false, now)
    }

    fn freeze(selections: &mut Selections) -> Option<Arc<Subsets>> {
        selections.freeze(&mut RingBudget::new(0))
    }

    #[test]
    fn the_number_of_sets_is_limited_and_unused_sets_are_dropped() {
        let now = Instant::now();
        let world = World::new(2 * MAX_SETS);
        let split = TrafficSplit::new().version("canary", 5).rest(95);
        let mut selections = selections(&split, now);
        for number in 0..2 * MAX_SETS {
            selections.add(version(number), world.known());
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
        selections.set_split(&TrafficSplit::new(), world.known());
        selections.sweep(now + SWEEP * 3);
        assert!(selections.sets.is_empty());
        assert!(freeze(&mut selections).is_none());
    }

    #[test]
    fn at_the_limit_each_new_set_replaces_the_one_that_was_not_used_for_the_longest_time() {
        let world = World::new(2 * MAX_SETS);
        let mut selections = selections(&TrafficSplit::new(), Instant::now());
        for number in 0..MAX_SETS {
            selections.add(version(number), world.known());
        }
        freeze(&mut selections);
        // All sets are in use, and two new ones are added in a row.
        for number in [MAX_SETS, MAX_SETS + 1] {
            selections.add(version(number), world.known());
            assert_eq!(selections.sets.len(), MAX_SETS);
        }
        let kept = (0..MAX_SETS).filter(|number| selections.sets.contains_key(&version(*number)));
        assert_eq!(kept.count(), MAX_SETS - 2);
        // Sets that calls use stay, while all others are replaced.
        freeze(&mut selections);
        let used: Vec<_> = (0..MAX_SETS)
            .filter(|number| selections.sets.contains_key(&version(*number)))
            .take(10)
            .collect();
        for number in MAX_SETS + 2..2 * MAX_SETS {
            let subsets = freeze(&mut selections).expect("sets");
            for used in &used {
                subsets.sets[&version(*used)].mark_used();
            }
            selections.add(version(number), world.known());
        }
        let is_kept = |number: &usize| selections.sets.contains_key(&version(*number));
        assert!(used.iter().all(is_kept));
        assert_eq!((0..=MAX_SETS + 1).filter(is_kept).count(), used.len());
    }

    #[test]
    fn sets_of_the_same_batch_do_not_replace_each_other() {
        let world = World::new(MAX_SETS + 10);
        let mut selections = selections(&TrafficSplit::new(), Instant::now());
        for number in 0..MAX_SETS {
            selections.add(version(number), world.known());
        }
        for subset in freeze(&mut selections).expect("sets").sets.values() {
            subset.mark_used();
        }
        let batch = MAX_SETS..MAX_SETS + 10;
        for number in batch.clone() {
            selections.add(version(number), world.known());
        }
        for number in batch {
            assert!(selections.sets.contains_key(&version(number)), "{number}");
        }
    }

    #[test]
    fn selections_without_a_match_replace_only_each_other() {
        let world = World::new(10);
        let mut selections = selections(&TrafficSplit::new(), Instant::now());
        for number in 0..10 {
            selections.add(version(number), world.known());
        }
        for number in 10..1_000 {
            selections.add(version(number), world.known());
            freeze(&mut selections);
            assert!(selections.sets.contains_key(&version(number)));
        }
        assert_eq!(selections.sets.len(), 10 + MAX_UNMATCHED);
        assert!((0..10).all(|number| selections.sets.contains_key(&version(number))));
    }

    #[test]
    fn a_publication_without_a_change_builds_no_set_again() {
        let world = World::new(3);
        let mut selections = selections(&TrafficSplit::new(), Instant::now());
        selections.add(version(1), world.known());
        selections.add(version(9), world.known());
        let first = freeze(&mut selections).expect("sets");
        let again = freeze(&mut selections).expect("sets");
        assert!(Arc::ptr_eq(&first, &again));
        // A change builds only the sets again whose counts have changed.
        let attributes = Attributes::new().with_version("1");
        let address: Address = "10.0.0.7:1".parse().expect("valid");
        selections.recount(&address, None, Some((&attributes, Class::Pending)));
        let changed = freeze(&mut selections).expect("sets");
        let is_same = |number| {
            Arc::ptr_eq(
                &first.sets[&version(number)],
                &changed.sets[&version(number)],
            )
        };
        assert!(is_same(9) && !is_same(1));
    }

    #[test]
    fn the_counts_follow_the_endpoints() {
        let world = World::new(3);
        let mut selections = selections(&TrafficSplit::new(), Instant::now());
        selections.add(version(1), world.known());
        let address: Address = "10.0.0.7:1".parse().expect("valid");
        let (one, two) = (
            Attributes::new().with_version("1"),
            Attributes::new().with_version("2"),
        );
        let states = [
            (Some((&one, Class::Failing)), (2, 0)),
            (Some((&one, Class::Pending)), (2, 1)),
            (Some((&two, Class::Pending)), (1, 0)),
            (Some((&one, Class::Pending)), (2, 1)),
            (Some((&one, Class::Ready)), (2, 0)),
            (None, (1, 0)),
        ];
        let mut before = None;
        for (after, expected) in states {
            selections.recount(&address, before, after);
            let subsets = freeze(&mut selections).expect("sets");
            let subset = &subsets.sets[&version(1)];
            assert_eq!((subset.endpoints, subset.pending), expected);
            before = after;
        }
    }
}
