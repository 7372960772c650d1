//! The published ready sets of selections and of the parts of the traffic split.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ready_connection::ReadyEntry;
use super::ready_set::ReadySet;
use super::select::Criterion;
use super::traffic_split::TrafficSplit;

/// The ready sets of all criteria that are in use.
#[derive(Debug, Default)]
pub(super) struct Subsets {
    pub(super) sets: HashMap<Criterion, Arc<Subset>>,
    /// `None` if there is no traffic split.
    pub(super) split: Option<Split>,
}

impl Subsets {
    /// Returns the sets of a channel without ready endpoints; `None` if there is no traffic split.
    pub(super) fn unready(split: &TrafficSplit) -> Option<Arc<Self>> {
        let split = (!split.is_empty()).then(|| Split {
            parts: Box::default(),
            weighted: split.weighted(),
        });
        split.map(|split| {
            Arc::new(Self {
                sets: HashMap::new(),
                split: Some(split),
            })
        })
    }
}

/// The endpoints that match a criterion.
#[derive(Debug)]
pub(super) struct Subset {
    pub(super) ready: ReadySet<ReadyEntry>,
    /// Number of matching endpoints. Only used while none of them is ready.
    pub(super) endpoints: usize,
    /// Number of matching endpoints that may become ready at any moment. Only used while none of them is ready.
    pub(super) pending: usize,
    /// Whether all matching endpoints that are ready are last resorts.
    pub(super) is_last_resort: bool,
    /// Whether a call has used the set since the driver last cleared this flag.
    pub(super) used: Arc<AtomicBool>,
}

impl Subset {
    /// Keeps the set in use. The flag is stored only if it changes, because all calls read this cache line.
    pub(super) fn mark_used(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }
}

/// The traffic split.
#[derive(Debug)]
pub(super) struct Split {
    /// The parts that have a weight and a ready endpoint.
    pub(super) parts: Box<[SplitPart]>,
    /// The criteria of all parts that have a weight.
    pub(super) weighted: Arc<[Criterion]>,
}

/// A part of the traffic split that has a weight and a ready endpoint.
#[derive(Debug)]
pub(super) struct SplitPart {
    /// The sum of the weights of this part and of all parts before it.
    pub(super) end: u64,
    pub(super) subset: Arc<Subset>,
    /// The criterion of the part, in the form that the wait queue uses.
    pub(super) criterion: Arc<[Criterion]>,
}

impl Split {
    /// Draws a part by weight, with a random word. Returns its index.
    pub(super) fn draw(&self, random: u64) -> usize {
        let total = self.parts.last().map_or(0, |part| part.end);
        // The upper half of a 128-bit product is below `total`. This avoids a division.
        let product = (u128::from(random) * u128::from(total)) >> 64;
        self.parts
            .partition_point(|part| u128::from(part.end) <= product)
    }
}

/// The random word with which an attempt of a call draws its part of the traffic split. All picks of the attempt use the same word. With a
/// new word for each pick, a call whose part has no free stream would draw again and again, until it gets a part with free streams.
#[derive(Debug, Default)]
pub(crate) struct SplitDraw(Cell<u64>);

impl SplitDraw {
    /// Returns the word of the attempt. Its first pick calls `random`.
    pub(super) fn word(&self, random: impl FnOnce() -> u64) -> u64 {
        if self.0.get() == 0 {
            // 0 stands for a word that was not drawn yet. The lowest bit has no effect on the shares.
            self.0.set(random() | 1);
        }
        self.0.get()
    }
}
