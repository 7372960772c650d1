//! The two sets of ready connections. Calls pick from the primary set, or from the last-resort set if the primary set is empty.

use super::subchannel_table::SubchannelId;
use crate::balance::hash_ring::{Name, RingBudget};
use crate::balance::ready_connection::ReadyEntry;
use crate::balance::ready_set::{ReadySet, ReadySetBuilder};

/// An entry of a ready set.
pub(super) trait Entry: Clone {
    /// Returns the hash of the name of the endpoint, and its weight.
    fn name(&self) -> Name;

    /// Sets whether the entry is in the set that calls pick from.
    fn set_takes_calls(&self, takes_calls: bool);
}

impl Entry for ReadyEntry {
    fn name(&self) -> Name {
        self.connection().endpoint().name()
    }

    fn set_takes_calls(&self, takes_calls: bool) {
        self.connection().set_takes_calls(takes_calls);
    }
}

/// The builders of the primary set and of the last-resort set.
#[derive(Debug)]
pub(super) struct ReadySets<E> {
    primary: ReadySetBuilder<SubchannelId, E>,
    last_resort: ReadySetBuilder<SubchannelId, E>,
    /// Whether calls pick from the last-resort set.
    is_last_resort: bool,
    /// Whether the sets are those of a selection. If so, they do not decide whether waiting calls get the streams of an entry.
    is_selection: bool,
}

/// The effect of [`ReadySets::place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Placed {
    /// The entry was already in the right set, with this weight.
    Unchanged,
    /// The entry is new, or its weight has changed.
    Changed,
    /// The entry was in the other set.
    Moved,
}

impl<E: Entry> ReadySets<E> {
    /// Creates empty sets. They have a rotation if `takes_turns`, and a ring if `is_hashed`.
    pub(super) fn new(takes_turns: bool, is_hashed: bool) -> Self {
        let mut sets = Self {
            primary: ReadySetBuilder::new(takes_turns),
            last_resort: ReadySetBuilder::new(takes_turns),
            is_last_resort: false,
            is_selection: false,
        };
        sets.set_hashed(is_hashed);
        sets
    }

    /// Creates empty sets for the endpoints that calls select.
    pub(super) fn of_selection(takes_turns: bool, is_hashed: bool) -> Self {
        Self {
            is_selection: true,
            ..Self::new(takes_turns, is_hashed)
        }
    }

    /// Sets whether the sets have an order of turns, from the next [`freeze`](Self::freeze) on.
    pub(super) fn set_takes_turns(&mut self, takes_turns: bool) {
        self.primary.set_takes_turns(takes_turns);
        self.last_resort.set_takes_turns(takes_turns);
    }

    /// Sets whether the sets have a ring, from the next [`freeze`](Self::freeze) on.
    pub(super) fn set_hashed(&mut self, is_hashed: bool) {
        let name: Option<fn(&E) -> Name> = is_hashed.then_some(E::name);
        self.primary.set_ring(name);
        self.last_resort.set_ring(name);
    }

    /// Puts an entry into the last-resort set if `is_last_resort`, else into the primary set, and removes it from the other set. If the
    /// entry is already in the right set, only its weight is changed.
    pub(super) fn place(
        &mut self,
        id: SubchannelId,
        entry: E,
        weight: u32,
        is_last_resort: bool,
    ) -> Placed {
        let (set, other) = if is_last_resort {
            (&mut self.last_resort, &mut self.primary)
        } else {
            (&mut self.primary, &mut self.last_resort)
        };
        if !self.is_selection {
            entry.set_takes_calls(!is_last_resort || self.is_last_resort);
        }
        let moved = other.remove(&id);
        if !set.contains(&id) {
            set.insert(id, entry, weight);
        } else if !set.reweigh(&id, weight) {
            return Placed::Unchanged;
        }
        if moved {
            Placed::Moved
        } else {
            Placed::Changed
        }
    }

    /// Removes an entry. Returns whether it was in one of the sets.
    pub(super) fn remove(&mut self, id: SubchannelId) -> bool {
        self.primary.remove(&id) || self.last_resort.remove(&id)
    }

    /// Returns whether the subchannel is in the primary set.
    pub(super) fn is_primary(&self, id: SubchannelId) -> bool {
        self.primary.contains(&id)
    }

    /// Returns the number of entries in the primary set.
    pub(super) fn primary_len(&self) -> usize {
        self.primary.len()
    }

    /// Returns the entries of the primary set.
    pub(super) fn primary(&self) -> impl Iterator<Item = &E> {
        self.primary.entries()
    }

    /// Returns all entries as [`place`](Self::place) has received them.
    pub(super) fn placed(&self) -> impl Iterator<Item = (SubchannelId, &E, u32, bool)> {
        let primary = self.primary.keyed().zip(std::iter::repeat(false));
        let last_resort = self.last_resort.keyed().zip(std::iter::repeat(true));
        let all = primary.chain(last_resort);
        all.map(|((id, entry, weight), is_last_resort)| (*id, entry, weight, is_last_resort))
    }

    /// Returns the entries of both sets.
    pub(super) fn all(&self) -> impl Iterator<Item = &E> {
        self.primary.entries().chain(self.last_resort.entries())
    }

    /// Returns whether calls pick from the last-resort set, as of the last [`freeze`](Self::freeze).
    pub(super) fn is_last_resort(&self) -> bool {
        self.is_last_resort
    }

    /// Returns the set that calls pick from: the primary set, or the last-resort set if the primary set is empty.
    pub(super) fn freeze(&mut self, rings: &mut RingBudget) -> ReadySet<E> {
        let is_last_resort = self.primary.is_empty();
        let was_last_resort = std::mem::replace(&mut self.is_last_resort, is_last_resort);
        if was_last_resort != is_last_resort && !self.is_selection {
            for entry in self.last_resort.entries() {
                entry.set_takes_calls(is_last_resort);
            }
        }
        let (used, unused) = if is_last_resort {
            (&mut self.last_resort, &mut self.primary)
        } else {
            (&mut self.primary, &mut self.last_resort)
        };
        // Both builders are frozen, although only one set is used. A builder keeps the connections of its last frozen set open until it is
        // frozen again.
        unused.freeze();
        used.freeze_with_ring(rings)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    #[derive(Clone, Debug, Default)]
    struct Fake(Rc<Cell<bool>>);

    impl Entry for Fake {
        fn name(&self) -> Name {
            (0, 1)
        }

        fn set_takes_calls(&self, takes_calls: bool) {
            self.0.set(takes_calls);
        }
    }

    #[test]
    fn last_resorts_take_calls_only_while_the_primary_set_is_empty() {
        let mut sets = ReadySets::new(false, false);
        let (ordinary, last_resort) = (Fake::default(), Fake::default());
        sets.place(1, ordinary.clone(), 1, false);
        sets.place(2, last_resort.clone(), 1, true);
        assert_eq!(sets.freeze(&mut RingBudget::new(0)).len(), 1);
        assert!(!sets.is_last_resort());
        assert!(ordinary.0.get() && !last_resort.0.get());
        assert!(sets.remove(1));
        sets.freeze(&mut RingBudget::new(0));
        assert!(sets.is_last_resort() && last_resort.0.get());
        sets.place(1, ordinary, 1, false);
        sets.freeze(&mut RingBudget::new(0));
        assert!(!sets.is_last_resort() && !last_resort.0.get());
    }

    #[test]
    fn an_entry_is_in_at_most_one_of_the_sets() {
        let mut sets = ReadySets::new(false, false);
        let entry = Fake::default();
        assert_eq!(sets.place(1, entry.clone(), 1, false), Placed::Changed);
        assert_eq!(sets.place(1, entry.clone(), 1, false), Placed::Unchanged);
        assert_eq!(sets.place(1, entry.clone(), 2, false), Placed::Changed);
        assert_eq!(sets.place(1, entry.clone(), 2, true), Placed::Moved);
        assert!(!sets.is_primary(1));
        assert_eq!(sets.all().count(), 1);
        assert!(sets.remove(1));
        assert!(!sets.remove(1));
    }
}
