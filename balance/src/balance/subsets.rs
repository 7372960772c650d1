//! The published ready sets of selections and of the parts of the traffic split.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ready_connection::ReadyEntry;
use super::ready_set::ReadySet;
use super::select::Criterion;

/// The ready sets of all criteria that are in use.
#[derive(Debug, Default)]
pub(super) struct Subsets {
    pub(super) sets: HashMap<Criterion, Arc<Subset>>,
    /// The parts of the traffic split; `None` if there is no split.
    pub(super) split: Option<Box<[SplitPart]>>,
}

/// The endpoints that match a criterion.
#[derive(Debug)]
pub(super) struct Subset {
    pub(super) ready: ReadySet<ReadyEntry>,
    /// Number of matching endpoints. Only used while none of them is ready.
    pub(super) endpoints: usize,
    /// Number of matching endpoints that may become ready at any moment. Only used while none of them is ready.
    pub(super) pending: usize,
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

/// A part of the traffic split that has a weight and a ready endpoint.
#[derive(Debug)]
pub(super) struct SplitPart {
    /// The sum of the weights of this part and of all parts before it.
    pub(super) end: u64,
    pub(super) subset: Arc<Subset>,
}

impl Subsets {
    /// Draws a part of the traffic split by weight, with a random word. Returns its index.
    pub(super) fn draw(parts: &[SplitPart], random: u64) -> usize {
        let total = parts.last().map_or(0, |part| part.end);
        // The upper half of a 128-bit product is below `total`. This avoids a division.
        let product = (u128::from(random) * u128::from(total)) >> 64;
        parts.partition_point(|part| u128::from(part.end) <= product)
    }
}
