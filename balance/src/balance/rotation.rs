//! Weighted round robin: maps the number of a turn to a slot of the ready set.
//!
//! The slot of a turn depends only on the number of the turn. Callers share only a counter, and each number is used once, so the shares of
//! the slots do not depend on how many threads pick.
//!
//! A small set gets a *schedule*: a list of slots that is computed in advance and repeated. One pass through the list is a period. In a
//! period, each slot appears in proportion to its weight, and as evenly spaced as possible. For a large set, or for large weights without a
//! common factor, the schedule would be too expensive to compute.
//!
//! Such a set gets a *line* instead, on which each slot covers a segment as long as its weight. Turn `n` selects the segment at a point of
//! the line. The position of the point, as a fraction of the line, is the fractional part of `n` times the golden ratio. Each new point
//! falls into one of the largest gaps between the earlier points. So in any sequence of consecutive turns, the number of turns of each
//! segment is in proportion to its length, to within about three turns. The same holds for any group of adjacent segments.

use std::sync::Arc;

/// The order of turns of a set with unequal weights.
#[derive(Debug)]
pub(super) enum Rotation {
    Schedule(Box<[u32]>),
    Line(Line),
}

impl Rotation {
    /// Returns the index of the slot that has this turn.
    pub(super) fn index_at(&self, turn: u64) -> Option<usize> {
        match self {
            Self::Schedule(indexes) => {
                let index = turn.checked_rem(u64::try_from(indexes.len()).ok()?)?;
                let index = indexes.get(usize::try_from(index).ok()?)?;
                Some(*index as usize)
            }
            Self::Line(line) => line.index_at(turn.wrapping_mul(GOLDEN)),
        }
    }
}

/// The slots of a set, ordered by weight. The next rotation is built from this list.
///
/// The list is divided into pieces that successive rotations share. Adding or removing a slot rebuilds only a few pieces and the list of
/// pieces. With 10 000 slots, this rebuild takes 10 microseconds. To build the whole line again would take more than 100 microseconds.
#[derive(Debug, Default)]
pub(super) struct Ranking {
    pieces: Vec<Piece>,
    len: usize,
}

/// Adjacent slots of the ranking.
#[derive(Debug)]
struct Piece {
    /// Weight and index of each slot, sorted. Never empty.
    slots: Vec<(u32, u32)>,
    /// The segments of these slots on the line. `None` if the slots have changed since the segments were last built.
    segments: Option<Segments<u32>>,
}

impl Piece {
    fn new(slots: Vec<(u32, u32)>) -> Self {
        Self {
            slots,
            segments: None,
        }
    }
}

impl Ranking {
    /// Adds a slot. The weight must be at least 1.
    pub(super) fn insert(&mut self, weight: u32, index: usize) {
        let slot = slot(weight, index);
        self.len += 1;
        let index = self.find(slot);
        let Some(piece) = self.pieces.get_mut(index) else {
            return self.pieces.push(Piece::new(vec![slot]));
        };
        let at = piece.slots.partition_point(|other| *other < slot);
        piece.slots.insert(at, slot);
        piece.segments = None;
        if piece.slots.len() > PIECE {
            let half = piece.slots.split_off(PIECE / 2);
            self.pieces.insert(index + 1, Piece::new(half));
        }
    }

    /// Removes a slot that was added with this weight.
    pub(super) fn remove(&mut self, weight: u32, index: usize) {
        let slot = slot(weight, index);
        let index = self.find(slot);
        let Some(piece) = self.pieces.get_mut(index) else {
            return;
        };
        let Ok(at) = piece.slots.binary_search(&slot) else {
            return;
        };
        self.len -= 1;
        piece.slots.remove(at);
        piece.segments = None;
        self.merge(index);
    }

    /// Removes an empty piece, or merges a small piece with the next one, so that the number of pieces stays in proportion to the number of
    /// slots.
    fn merge(&mut self, index: usize) {
        let len = |index: usize| self.pieces.get(index).map_or(0, |piece| piece.slots.len());
        if len(index) == 0 {
            self.pieces.remove(index);
        } else if len(index) + len(index + 1) <= PIECE / 2 && index + 1 < self.pieces.len() {
            let next = self.pieces.remove(index + 1);
            self.pieces[index].slots.extend(next.slots);
        }
    }

    /// Returns the index of the piece that contains the slot, or into which the slot must be inserted.
    fn find(&self, slot: (u32, u32)) -> usize {
        let begun = |piece: &Piece| piece.slots.first().is_some_and(|first| *first <= slot);
        self.pieces.partition_point(begun).saturating_sub(1)
    }

    /// Returns the rotation of the current slots.
    pub(super) fn rotation(&mut self) -> Rotation {
        self.schedule()
            .map_or_else(|| Rotation::Line(self.line()), Rotation::Schedule)
    }

    /// Returns a schedule, or `None` if it would be too expensive to compute.
    fn schedule(&self) -> Option<Box<[u32]>> {
        if self.len * self.len > MAX_STEPS {
            return None;
        }
        let slots: Vec<_> = self.pieces.iter().flat_map(|piece| &piece.slots).collect();
        let unit = slots.iter().fold(0, |unit, (weight, _)| gcd(unit, *weight));
        let weights = slots
            .iter()
            .map(|(weight, _)| u64::from(weight / unit.max(1)));
        let steps = weights.sum::<u64>().saturating_mul(self.len as u64);
        (steps <= MAX_STEPS as u64).then(|| schedule(&slots, unit))
    }

    fn line(&mut self) -> Line {
        let segments = |piece: &mut Piece| {
            let segments = piece
                .segments
                .get_or_insert_with(|| Segments::new(&piece.slots));
            (segments.length(), segments.clone())
        };
        let pieces: Vec<_> = self.pieces.iter_mut().map(segments).collect();
        Line(Segments::new(&pieces))
    }
}

fn slot(weight: u32, index: usize) -> (u32, u32) {
    (weight, u32::try_from(index).unwrap_or(u32::MAX))
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Computes a period by earliest deadline first. A slot whose share of the turns is `s` must get one turn in each interval from turn `k /
/// s` to turn `(k + 1) / s`, for `k` = 0, 1, 2 and so on. A slot is due if its current interval has begun and the slot has not had its turn
/// for this interval. Of the slots that are due, the slot whose interval ends first gets the next turn. This keeps each slot less than one
/// turn from its share at any time.
fn schedule(slots: &[&(u32, u32)], unit: u32) -> Box<[u32]> {
    // `MAX_STEPS` limits the sum of the weights, so no product below overflows.
    let weights = slots.iter().map(|(weight, _)| i64::from(weight / unit));
    let weights: Vec<_> = weights.collect();
    let turns: i64 = weights.iter().sum();
    // The number of turns by which each slot is behind its share, multiplied by `turns` so that it is an integer.
    let mut owed = vec![0; slots.len()];
    let next = |_| {
        let mut next = None;
        for (index, weight) in weights.iter().enumerate() {
            owed[index] += weight;
            // The current interval of the slot ends after `left / weight` turns.
            let left = turns - owed[index];
            // If two intervals end at the same time, the slot with the larger weight gets the turn, because its following interval ends
            // earlier. The slots are sorted by weight, so this is the later slot in the list.
            let is_first = |(_, first, of)| left * of <= first * weight;
            if owed[index] > 0 && next.is_none_or(is_first) {
                next = Some((index, left, weight));
            }
        }
        let index = next.map_or(0, |(index, ..)| index);
        owed[index] -= turns;
        slots[index].1
    };
    (0..turns).map(next).collect()
}

/// A line with one segment per slot. Each segment is as long as the weight of its slot. Slots of similar weight are adjacent, so that
/// together they get their share as exactly as a single slot.
#[derive(Debug)]
pub(super) struct Line(Segments<Segments<u32>>);

impl Line {
    /// Returns the index of the slot at a point. The point is a fraction of the line in units of 2^-64.
    fn index_at(&self, fraction: u64) -> Option<usize> {
        let length = u128::from(self.0.length());
        let point = u64::try_from((u128::from(fraction) * length) >> 64).ok()?;
        let (piece, start) = self.0.at(point)?;
        let (index, _) = piece.at(point - start)?;
        Some(*index as usize)
    }
}

/// Adjacent segments. The lookup of a random point takes constant time on average.
#[derive(Clone, Debug)]
struct Segments<T> {
    list: Arc<[Segment<T>]>,
    /// The line is divided into buckets of equal length. For each bucket, this list contains the index of the first segment that reaches
    /// into the bucket. One more entry at the end is the index of the last segment.
    guide: Arc<[u32]>,
    /// The length of a bucket is `1 << shift`.
    shift: u32,
}

#[derive(Clone, Debug)]
struct Segment<T> {
    end: u64,
    value: T,
}

impl<T: Clone> Segments<T> {
    /// Lays out segments of these lengths. There is at least one segment, and each length is at least 1.
    fn new<L: Copy + Into<u64>>(lengths: &[(L, T)]) -> Self {
        let mut end = 0;
        let segments = lengths.iter().map(|(length, value)| {
            end += (*length).into();
            let value = value.clone();
            Segment { end, value }
        });
        let list: Arc<[_]> = segments.collect();
        // There are at least as many buckets as segments. The bucket of a random point therefore has no more than two segments on average,
        // whatever their lengths are.
        let mean = end / u64::try_from(list.len()).unwrap_or(u64::MAX).max(1);
        let shift = mean.max(1).ilog2();
        let mut guide = Vec::new();
        for (index, segment) in (0..).zip(list.iter()) {
            // Adds this segment to the guide for each bucket that starts before the end of the segment, unless an earlier segment reaches
            // into the bucket.
            let buckets = ((segment.end - 1) >> shift) + 1;
            guide.resize(usize::try_from(buckets).unwrap_or_default(), index);
        }
        guide.extend(guide.last().copied());
        Self {
            list,
            guide: guide.into(),
            shift,
        }
    }

    fn length(&self) -> u64 {
        self.list.last().map_or(0, |segment| segment.end)
    }

    /// Returns the value of the segment at a point, and the start of that segment.
    fn at(&self, point: u64) -> Option<(&T, u64)> {
        let bucket = usize::try_from(point >> self.shift).ok()?;
        let (first, last) = (*self.guide.get(bucket)?, *self.guide.get(bucket + 1)?);
        let (first, last) = (first as usize, last as usize);
        // A binary search, because one bucket can contain many short segments.
        let before = self.list.get(first..last)?;
        let index = first + before.partition_point(|segment| segment.end <= point);
        let start = index.checked_sub(1).and_then(|index| self.list.get(index));
        let start = start.map_or(0, |segment| segment.end);
        self.list.get(index).map(|segment| (&segment.value, start))
    }
}

/// The fractional part of the golden ratio, in units of 2^-64. The fractional parts of its multiples are spread more evenly than those of
/// any other number.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Limit on the number of turns of a schedule times its number of slots. A schedule is computed for each new set. At this limit, the
/// computation takes 25 microseconds.
const MAX_STEPS: usize = 1 << 13;
/// Maximum number of slots in a piece.
const PIECE: usize = 128;

#[cfg(test)]
#[expect(
    clippy::cast_precision_loss,
    reason = "the counts of the tests are small"
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranking(weights: &[u32]) -> Ranking {
        let mut ranking = Ranking::default();
        for (index, weight) in weights.iter().enumerate() {
            ranking.insert(*weight, index);
        }
        ranking
    }

    fn turns(rotation: &Rotation, start: u64, turns: u64) -> impl Iterator<Item = usize> {
        (start..start + turns).map(|turn| rotation.index_at(turn).expect("has slots"))
    }

    /// Returns the number of turns that each slot should get.
    fn fair(weights: &[u32], turns: u64) -> Vec<f64> {
        let total: f64 = weights.iter().copied().map(f64::from).sum();
        let fair = |weight: &u32| f64::from(*weight) / total * turns as f64;
        weights.iter().map(fair).collect()
    }

    fn counts(weights: &[u32], start: u64, length: u64) -> Vec<f64> {
        let rotation = ranking(weights).rotation();
        let mut counts = vec![0.0; weights.len()];
        for index in turns(&rotation, start, length) {
            counts[index] += 1.0;
        }
        counts
    }

    /// Weights of very different sizes.
    fn weight() -> impl Strategy<Value = u32> {
        prop_oneof![1..10_u32, 1..1_000_u32, 1..100_000_u32, 1..=u32::MAX]
    }

    /// Limit on the difference between the number of turns that a slot on a line gets and the number that it should get.
    const LINE: f64 = 4.0;

    proptest! {
        #[test]
        fn shares_match_the_weights_over_any_consecutive_turns(
            weights in proptest::collection::vec(weight(), 1..300),
            start: u32,
            length in 1..10_000_u64,
        ) {
            let counts = counts(&weights, start.into(), length);
            for (count, fair) in counts.iter().zip(fair(&weights, length)) {
                prop_assert!((count - fair).abs() < LINE, "{count} turns instead of {fair}");
            }
        }

        #[test]
        fn no_slot_deviates_far_from_its_share(
            weights in proptest::collection::vec(weight(), 1..30),
            start: u32,
        ) {
            let rotation = ranking(&weights).rotation();
            let bound = if matches!(rotation, Rotation::Schedule(_)) { 2.0 } else { LINE };
            let due = fair(&weights, 1);
            let mut owed = vec![0.0; weights.len()];
            for index in turns(&rotation, start.into(), 3_000) {
                for (owed, due) in owed.iter_mut().zip(&due) {
                    *owed += due;
                }
                owed[index] -= 1.0;
                prop_assert!(owed.iter().all(|owed| owed.abs() < bound), "{owed:?}");
            }
        }

        #[test]
        fn a_schedule_is_exact_and_evenly_spaced(
            weights in proptest::collection::vec(1..30_u32, 2..20),
            unit in 1..100_u32,
        ) {
            let scaled: Vec<_> = weights.iter().map(|weight| weight * unit).collect();
            let Rotation::Schedule(indexes) = ranking(&scaled).rotation() else {
                panic!("a small set should have a schedule");
            };
            let due = fair(&weights, 1);
            let mut owed = vec![0.0; weights.len()];
            for index in &indexes {
                for (owed, due) in owed.iter_mut().zip(&due) {
                    *owed += due;
                }
                owed[*index as usize] -= 1.0;
                prop_assert!(owed.iter().all(|owed| owed.abs() < 1.0), "{owed:?}");
            }
            prop_assert!(owed.iter().all(|owed| owed.abs() < 1e-6), "{owed:?}");
        }

        #[test]
        fn changes_produce_the_same_rotation_as_a_rebuild(
            changes in proptest::collection::vec((0..400_usize, 0..2_000_u32), 1..1_000),
        ) {
            let (mut changed, mut weights) = (Ranking::default(), vec![0; 400]);
            for (number, (index, weight)) in changes.into_iter().enumerate() {
                let before = std::mem::replace(&mut weights[index], weight);
                if before > 0 {
                    changed.remove(before, index);
                }
                if weight > 0 {
                    changed.insert(weight, index);
                }
                if number % 50 == 0 {
                    changed.rotation();
                }
            }
            let mut new = Ranking::default();
            for (index, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0) {
                new.insert(*weight, index);
            }
            let pieces = changed.pieces.iter().map(|piece| piece.slots.len());
            prop_assert!(pieces.clone().all(|slots| (1..=PIECE).contains(&slots)));
            let (changed, new) = (changed.rotation(), new.rotation());
            for turn in 0..2_000 {
                prop_assert_eq!(changed.index_at(turn), new.index_at(turn));
            }
        }
    }

    #[test]
    fn a_heavy_slot_among_ten_thousand_gets_its_share() {
        for heavy in [1_000, 100_000, u32::MAX] {
            let mut weights = vec![1; 10_000];
            weights[4_321] = heavy;
            let counts = counts(&weights, 77, 10_000);
            let error = counts[4_321] - fair(&weights, 10_000)[4_321];
            assert!(error.abs() < LINE, "weight {heavy}: off by {error} turns");
        }
    }

    #[test]
    fn slots_of_similar_weight_together_get_their_share() {
        let mut rng = fastrand::Rng::with_seed(7);
        let decades = (0..10_000).map(|index| 10_u32.pow(index % 6)).collect();
        let random = (0..10_000).map(|_| rng.u32(1..=100_000)).collect();
        for weights in [decades, random] {
            let weights: Vec<u32> = weights;
            let counts = counts(&weights, rng.u64(..1 << 32), 10_000);
            let fair = fair(&weights, 10_000);
            let sum = |of: &[f64], from: u32, to: u32| {
                let pairs = of.iter().zip(&weights);
                let class = pairs.filter(|(_, weight)| (from..to).contains(*weight));
                class.map(|(count, _)| count).sum::<f64>()
            };
            for from in [0, 5, 50, 500, 5_000, 25_000, 50_000, 75_000] {
                let (count, fair) = (sum(&counts, from, 100_001), sum(&fair, from, 100_001));
                assert!(
                    (count - fair).abs() < LINE,
                    "weights from {from}: {count} turns instead of {fair}"
                );
                let (count, fair) = (10_000.0 - count, 10_000.0 - fair);
                assert!(
                    (count - fair).abs() < LINE,
                    "weights below {from}: {count} turns instead of {fair}"
                );
            }
        }
    }

    #[test]
    fn a_slot_of_weight_two_among_slots_of_weight_one_never_has_two_turns_in_a_row() {
        let rotation = ranking(&[1, 2, 1, 1]).rotation();
        let indexes: Vec<_> = turns(&rotation, 3, 100).collect();
        assert!(
            indexes.windows(2).all(|pair| pair[0] != pair[1]),
            "{indexes:?}"
        );
    }

    #[test]
    fn a_slot_of_weight_one_beside_one_of_weight_100_gets_one_turn_per_period() {
        let rotation = ranking(&[100, 1]).rotation();
        let light: Vec<_> = (0..202)
            .filter(|turn| rotation.index_at(*turn) == Some(1))
            .collect();
        assert_eq!(light.len(), 2);
        assert_eq!(light[1] - light[0], 101);
    }
}
