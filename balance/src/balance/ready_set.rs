//! The ready set: immutable, read by every call without a lock, and cheap to replace.
//!
//! The set is a list of chunks, and successive sets share unchanged chunks. A change rebuilds the chunks that it touches and the short list
//! of chunks, but not the whole set. With 10 000 connections, a change takes a few microseconds instead of 100.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use super::hash_ring::{HashRing, HashRingBuilder, Name, RingBudget};
use super::rotation::{Ranking, Rotation};

/// The connections that can take calls at one moment.
#[derive(Debug)]
pub(crate) struct ReadySet<M> {
    chunks: Box<[Chunk<M>]>,
    len: usize,
    /// Draws a chunk by its weight; `None` if all connections have the same weight.
    alias: Option<Alias>,
    /// The order of turns. `None` if the policy takes no turns, or if all weights are equal. In the latter case, turns follow the order of
    /// the slots.
    rotation: Option<Rotation>,
    /// The endpoints of the hashes of calls; `None` if the policy does not use hashes.
    ring: Option<HashRing>,
}

/// A part of the set. Every chunk except the last one has [`CHUNK`] slots.
#[derive(Debug)]
struct Chunk<M> {
    slots: Arc<[Slot<M>]>,
    alias: Arc<Alias>,
    weight: u64,
}

impl<M> Clone for Chunk<M> {
    fn clone(&self) -> Self {
        Self {
            slots: Arc::clone(&self.slots),
            alias: Arc::clone(&self.alias),
            weight: self.weight,
        }
    }
}

/// One entry of the set.
#[derive(Clone, Debug)]
pub(crate) struct Slot<M> {
    pub(crate) connection: M,
    pub(crate) weight: u32,
}

impl<M> ReadySet<M> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_uniform(&self) -> bool {
        self.alias.is_none()
    }

    pub(crate) fn get(&self, index: usize) -> Option<&Slot<M>> {
        self.chunks
            .get(index / CHUNK)
            .and_then(|chunk| chunk.slots.get(index % CHUNK))
    }

    pub(crate) fn ring(&self) -> Option<&HashRing> {
        self.ring.as_ref()
    }

    pub(crate) fn slots(&self) -> impl Iterator<Item = &Slot<M>> {
        self.chunks.iter().flat_map(|chunk| &*chunk.slots)
    }

    /// Returns the slot that has this turn in round robin.
    pub(crate) fn in_turn(&self, turn: u64) -> Option<&Slot<M>> {
        let index = if let Some(rotation) = &self.rotation {
            rotation.index_at(turn)?
        } else {
            let index = turn.checked_rem(u64::try_from(self.len).ok()?)?;
            usize::try_from(index).ok()?
        };
        self.get(index)
    }

    /// Draws the index of a slot by weight, with two random words: `outer` draws the chunk, and `inner` draws the slot in the chunk.
    pub(crate) fn draw(&self, outer: u64, inner: u64) -> Option<usize> {
        let Some(alias) = &self.alias else {
            return Some(random_below(outer, self.len));
        };
        let index = alias.draw(outer);
        let chunk = self.chunks.get(index)?;
        Some(index * CHUNK + chunk.alias.draw(inner))
    }
}

impl<M> Default for ReadySet<M> {
    fn default() -> Self {
        Self {
            chunks: Box::default(),
            len: 0,
            alias: None,
            rotation: None,
            ring: None,
        }
    }
}

/// Returns a random number below `len`, from the upper half of a random word.
pub(super) fn random_below(random: u64, len: usize) -> usize {
    // The product of two 32-bit numbers, shifted right by 32 bits, is less than the second number. This avoids a division, and its bias is
    // negligible.
    let len = u64::try_from(len).unwrap_or(u64::MAX) & 0xffff_ffff;
    usize::try_from(((random >> 32) * len) >> 32).unwrap_or_default()
}

/// Draws an index by weight in constant time (Walker's alias method, in Vose's form).
#[derive(Debug)]
struct Alias(Box<[Column]>);

#[derive(Clone, Copy, Debug)]
struct Column {
    /// A random number below this limit selects the index of this column.
    keep: u32,
    /// Any other random number selects this index.
    other: u32,
}

impl Alias {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "shares below one are scaled to 32 bits, and a set has fewer than 2^32 slots"
    )]
    fn new(weights: impl Iterator<Item = u64>) -> Self {
        let mut shares: Vec<f64> = weights.map(|weight| weight as f64).collect();
        let mean = shares.iter().sum::<f64>() / shares.len().max(1) as f64;
        let mut columns = Vec::with_capacity(shares.len());
        let (mut small, mut large) = (Vec::new(), Vec::new());
        for (index, share) in shares.iter_mut().enumerate() {
            *share /= mean.max(f64::MIN_POSITIVE);
            columns.push(Column {
                keep: u32::MAX,
                other: index as u32,
            });
            if *share < 1.0 {
                small.push(index);
            } else {
                large.push(index);
            }
        }
        // The loop ends when one of the lists is empty. The columns that remain in the other list have a share of one, apart from rounding
        // errors. They always select their own index.
        while let (Some(&poor), Some(&rich)) = (small.last(), large.last()) {
            small.pop();
            columns[poor] = Column {
                keep: (shares[poor] * f64::from(u32::MAX)) as u32,
                other: rich as u32,
            };
            shares[rich] -= 1.0 - shares[poor];
            if shares[rich] < 1.0 {
                large.pop();
                small.push(rich);
            }
        }
        Self(columns.into())
    }

    fn draw(&self, random: u64) -> usize {
        let index = random_below(random, self.0.len());
        match self.0.get(index) {
            Some(column) if random & 0xffff_ffff >= u64::from(column.keep) => column.other as usize,
            _ => index,
        }
    }
}

/// The driver's mutable form of the ready set, from which the driver builds each new set.
#[derive(Debug)]
pub(crate) struct ReadySetBuilder<K, M> {
    slots: Vec<(K, Slot<M>)>,
    indexes: HashMap<K, usize>,
    /// Number of slots for each weight.
    weights: BTreeMap<u32, usize>,
    /// The slots ordered by weight; `None` if the policy takes no turns.
    ranking: Option<Ranking>,
    /// Builds the ring; `None` if the policy does not use hashes.
    ring: Option<Ring<M>>,
    chunks: Vec<Chunk<M>>,
    /// The indexes of the chunks that must be built again.
    stale: BTreeSet<usize>,
}

/// The builder of the ring, and the function that returns the hash and the weight of the endpoint of an entry.
type Ring<M> = (HashRingBuilder, fn(&M) -> Name);

impl<K, M> ReadySetBuilder<K, M> {
    /// Creates an empty builder. The sets that it builds have a rotation by weight only if `takes_turns` is true, because only weighted
    /// round robin uses one.
    pub(crate) fn new(takes_turns: bool) -> Self {
        Self {
            slots: Vec::new(),
            indexes: HashMap::new(),
            weights: BTreeMap::new(),
            ranking: takes_turns.then(Ranking::default),
            ring: None,
            chunks: Vec::new(),
            stale: BTreeSet::new(),
        }
    }

    /// Sets whether the sets have a ring, from the next [`freeze`](Self::freeze) on. `name` returns the hash and the weight of the endpoint
    /// of an entry.
    pub(crate) fn set_ring(&mut self, name: Option<fn(&M) -> Name>) {
        if self.ring.is_some() != name.is_some() {
            self.ring = name.map(|name| (HashRingBuilder::default(), name));
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

impl<K: Clone + Eq + Hash, M: Clone> ReadySetBuilder<K, M> {
    /// Sets whether the sets have a rotation by weight, from the next [`freeze`](Self::freeze) on.
    pub(crate) fn set_takes_turns(&mut self, takes_turns: bool) {
        if self.ranking.is_some() == takes_turns {
            return;
        }
        self.ranking = takes_turns.then(|| {
            let mut ranking = Ranking::default();
            for (index, (_, slot)) in self.slots.iter().enumerate() {
                ranking.insert(slot.weight, index);
            }
            ranking
        });
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &M> {
        self.slots.iter().map(|(_, slot)| &slot.connection)
    }

    /// Returns the key, the entry and the weight of each slot.
    pub(crate) fn keyed(&self) -> impl Iterator<Item = (&K, &M, u32)> {
        let slots = self.slots.iter();
        slots.map(|(key, slot)| (key, &slot.connection, slot.weight))
    }

    pub(crate) fn contains(&self, key: &K) -> bool {
        self.indexes.contains_key(key)
    }

    /// Returns the slot of a key.
    pub(crate) fn slot(&self, key: &K) -> Option<&Slot<M>> {
        let index = self.indexes.get(key)?;
        self.slots.get(*index).map(|(_, slot)| slot)
    }

    /// Returns the sum of the weights.
    pub(crate) fn weight(&self) -> u64 {
        let weights = self.weights.iter();
        weights
            .map(|(weight, slots)| u64::from(*weight).saturating_mul(*slots as u64))
            .sum()
    }

    /// Adds an entry, or replaces the entry of this key.
    pub(crate) fn insert(&mut self, key: K, connection: M, weight: u32) {
        self.remove(&key);
        let weight = weight.max(1);
        self.indexes.insert(key.clone(), self.slots.len());
        self.stale.insert(self.slots.len() / CHUNK);
        self.add_weight(weight, self.slots.len());
        self.slots.push((key, Slot { connection, weight }));
    }

    /// Removes an entry. Returns whether it existed.
    pub(crate) fn remove(&mut self, key: &K) -> bool {
        let Some(index) = self.indexes.remove(key) else {
            return false;
        };
        let (_, slot) = self.slots.swap_remove(index);
        self.remove_weight(slot.weight, index);
        if let Some((moved, slot)) = self.slots.get(index) {
            self.indexes.insert(moved.clone(), index);
            if let Some(ranking) = &mut self.ranking {
                ranking.remove(slot.weight, self.slots.len());
                ranking.insert(slot.weight, index);
            }
        }
        self.stale.insert(index / CHUNK);
        self.stale.insert(self.slots.len() / CHUNK);
        true
    }

    /// Changes the weight of an entry in place. Returns whether the weight has changed.
    pub(crate) fn reweigh(&mut self, key: &K, weight: u32) -> bool {
        let weight = weight.max(1);
        let Some(&index) = self.indexes.get(key) else {
            return false;
        };
        let Some((_, slot)) = self.slots.get_mut(index) else {
            return false;
        };
        let before = std::mem::replace(&mut slot.weight, weight);
        if before == weight {
            return false;
        }
        self.remove_weight(before, index);
        self.add_weight(weight, index);
        self.stale.insert(index / CHUNK);
        true
    }

    fn add_weight(&mut self, weight: u32, index: usize) {
        *self.weights.entry(weight).or_default() += 1;
        if let Some(ranking) = &mut self.ranking {
            ranking.insert(weight, index);
        }
    }

    fn remove_weight(&mut self, weight: u32, index: usize) {
        if let Some(ranking) = &mut self.ranking {
            ranking.remove(weight, index);
        }
        if let Some(count) = self.weights.get_mut(&weight) {
            *count -= 1;
            if *count == 0 {
                self.weights.remove(&weight);
            }
        }
    }

    /// Returns the current set, with a ring if the policy uses hashes. Rebuilds only the chunks that have changed since the last call.
    pub(super) fn freeze_with_ring(&mut self, budget: &mut RingBudget) -> ReadySet<M> {
        let slots = &self.slots;
        let ring = self.ring.as_mut().map(|(builder, name)| {
            let names = slots.iter().map(|(_, slot)| name(&slot.connection));
            builder.build(names, budget)
        });
        ReadySet {
            ring,
            ..self.freeze()
        }
    }

    /// Returns the current set without a ring.
    pub(crate) fn freeze(&mut self) -> ReadySet<M> {
        self.chunks.truncate(self.slots.len().div_ceil(CHUNK));
        for index in std::mem::take(&mut self.stale) {
            let start = index * CHUNK;
            let end = (start + CHUNK).min(self.slots.len());
            if start >= end {
                continue;
            }
            let chunk = Chunk::new(&self.slots[start..end]);
            match self.chunks.get_mut(index) {
                Some(stale) => *stale = chunk,
                None => self.chunks.push(chunk),
            }
        }
        let uniform = self.weights.len() <= 1;
        let alias = || Alias::new(self.chunks.iter().map(|chunk| chunk.weight));
        let ranking = self.ranking.as_mut().filter(|_| !uniform);
        ReadySet {
            ring: None,
            chunks: self.chunks.clone().into(),
            len: self.slots.len(),
            alias: (!uniform).then(alias),
            rotation: ranking.map(Ranking::rotation),
        }
    }
}

impl<M: Clone> Chunk<M> {
    fn new<K>(slots: &[(K, Slot<M>)]) -> Self {
        let weights = || slots.iter().map(|(_, slot)| u64::from(slot.weight));
        Self {
            slots: slots.iter().map(|(_, slot)| slot.clone()).collect(),
            alias: Arc::new(Alias::new(weights())),
            weight: weights().sum(),
        }
    }
}

/// Number of slots in a chunk. A change copies the slots of each chunk that it touches. Of all other chunks, it copies only the references.
const CHUNK: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries(set: &ReadySet<u32>) -> BTreeMap<u32, u32> {
        (0..set.len())
            .map(|index| set.get(index).expect("within the length"))
            .map(|slot| (slot.connection, slot.weight))
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u32, u32),
        Remove(u32),
        Reweigh(u32, u32),
        Freeze,
    }

    fn op() -> impl Strategy<Value = Op> {
        let key = 0..300_u32;
        prop_oneof![
            4 => (key.clone(), 1..5_u32).prop_map(|(key, weight)| Op::Insert(key, weight)),
            2 => key.clone().prop_map(Op::Remove),
            1 => (key, 1..5_u32).prop_map(|(key, weight)| Op::Reweigh(key, weight)),
            1 => Just(Op::Freeze),
        ]
    }

    proptest! {
        #[test]
        fn a_frozen_set_contains_exactly_the_entries_that_the_changes_leave(ops in proptest::collection::vec(op(), 0..600)) {
            let mut builder = ReadySetBuilder::new(true);
            let mut model = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Insert(key, weight) => {
                        builder.insert(key, key, weight);
                        model.insert(key, weight);
                    }
                    Op::Remove(key) => {
                        prop_assert_eq!(builder.remove(&key), model.remove(&key).is_some());
                    }
                    Op::Reweigh(key, weight) => {
                        builder.reweigh(&key, weight);
                        model.entry(key).and_modify(|old| *old = weight);
                    }
                    Op::Freeze => {
                        prop_assert_eq!(&entries(&builder.freeze()), &model);
                    }
                }
            }
            let set = builder.freeze();
            prop_assert_eq!(set.len(), model.len());
            prop_assert_eq!(&entries(&set), &model);
            let mut weights: Vec<_> = model.values().collect();
            weights.dedup();
            prop_assert_eq!(set.is_uniform(), weights.len() <= 1);
        }
    }

    #[test]
    fn draws_are_proportional_to_the_weights() {
        let mut builder = ReadySetBuilder::new(true);
        for key in 0..200_u32 {
            builder.insert(key, key, if key < 100 { 1 } else { 3 });
        }
        let set = builder.freeze();
        let mut rng = fastrand::Rng::with_seed(7);
        let mut heavy = 0_u32;
        let mut each = vec![0_u32; 200];
        for _ in 0..200_000 {
            let index = set.draw(rng.u64(..), rng.u64(..)).expect("has slots");
            let slot = set.get(index).expect("within the length");
            heavy += u32::from(slot.weight == 3);
            each[slot.connection as usize] += 1;
        }
        let share = f64::from(heavy) / 200_000.0;
        assert!((share - 0.75).abs() < 0.01, "share {share}");
        assert!(each.iter().all(|&drawn| drawn > 300), "a slot is too rare");
    }

    #[test]
    fn a_draw_from_an_empty_set_yields_no_slot() {
        let set = ReadySet::<u32>::default();
        let index = set.draw(u64::MAX, u64::MAX);
        assert!(index.and_then(|index| set.get(index)).is_none());
    }
}
