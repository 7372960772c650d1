//! The two sets of ready connections. Calls pick from the primary set, or from the last-resort set if the primary set is empty.

use std::collections::HashSet;

use super::pushbacks::take_effect;
use super::subchannel_table::SubchannelId;
use crate::balance::hash_ring::{Name, RingBudget};
use crate::balance::ready_connection::{ReadyEntry, TakesCalls};
use crate::balance::ready_set::{ReadySet, ReadySetBuilder};

/// An entry of a ready set.
pub(super) trait Entry: Clone {
    /// Returns the hash of the name of the endpoint, and its weight.
    fn name(&self) -> Name;

    /// Sets which waiting calls get streams of the entry.
    fn set_takes_calls(&self, takes_calls: TakesCalls);
}

impl Entry for ReadyEntry {
    fn name(&self) -> Name {
        self.connection().endpoint().name()
    }

    fn set_takes_calls(&self, takes_calls: TakesCalls) {
        self.connection().set_takes_calls(takes_calls);
    }
}

/// Which of the two sets an entry belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Ordinary,
    /// The endpoint would be ordinary if its server had not sent a pushback. The entry is in the last-resort set. In the sets of a selection,
    /// it stays in the primary set if too much of the selection is in pushback.
    PushedBack,
    LastResort,
}

/// The builders of the primary set and of the last-resort set.
#[derive(Debug)]
pub(super) struct ReadySets<E> {
    primary: ReadySetBuilder<SubchannelId, E>,
    last_resort: ReadySetBuilder<SubchannelId, E>,
    /// The entries whose endpoints are in pushback.
    pushed_back: HashSet<SubchannelId>,
    /// Whether these entries are in the last-resort set. Always true if the sets are those of the channel, for which the driver decides.
    excludes_pushed_back: bool,
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
            pushed_back: HashSet::new(),
            excludes_pushed_back: true,
            is_last_resort: false,
            is_selection: false,
        };
        sets.set_hashed(is_hashed);
        sets
    }

    /// Creates empty sets for the endpoints that calls select.
    pub(super) fn of_selection(takes_turns: bool, is_hashed: bool) -> Self {
        Self {
            excludes_pushed_back: false,
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

    /// Puts an entry into the set of its standing, and removes it from the other set. If the entry is already in the right set, only its
    /// weight is changed.
    pub(super) fn place(
        &mut self,
        id: SubchannelId,
        entry: E,
        weight: u32,
        standing: Standing,
    ) -> Placed {
        if !self.is_selection {
            entry.set_takes_calls(self.takes_calls(standing));
        }
        let has_changed = if standing == Standing::PushedBack {
            self.pushed_back.insert(id)
        } else {
            self.pushed_back.remove(&id)
        };
        let is_last_resort = match standing {
            Standing::Ordinary => false,
            Standing::PushedBack => self.excludes_pushed_back,
            Standing::LastResort => true,
        };
        let (set, other) = if is_last_resort {
            (&mut self.last_resort, &mut self.primary)
        } else {
            (&mut self.primary, &mut self.last_resort)
        };
        let moved = other.remove(&id) || has_changed;
        if !set.contains(&id) {
            set.insert(id, entry, weight);
        } else if !set.reweigh(&id, weight) && !moved {
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
        self.pushed_back.remove(&id);
        self.primary.remove(&id) || self.last_resort.remove(&id)
    }

    /// Returns whether the subchannel is in the primary set.
    pub(super) fn is_primary(&self, id: SubchannelId) -> bool {
        self.primary.contains(&id)
    }

    /// Returns the entries of the primary set.
    pub(super) fn primary(&self) -> impl Iterator<Item = &E> {
        self.primary.entries()
    }

    /// Returns all entries as [`place`](Self::place) has received them.
    pub(super) fn placed(&self) -> impl Iterator<Item = (SubchannelId, &E, u32, Standing)> {
        let primary = self.primary.keyed().zip(std::iter::repeat(false));
        let last_resort = self.last_resort.keyed().zip(std::iter::repeat(true));
        let all = primary.chain(last_resort);
        all.map(move |((id, entry, weight), is_last_resort)| {
            (*id, entry, weight, self.standing(*id, is_last_resort))
        })
    }

    fn standing(&self, id: SubchannelId, is_last_resort: bool) -> Standing {
        if self.pushed_back.contains(&id) {
            Standing::PushedBack
        } else if is_last_resort {
            Standing::LastResort
        } else {
            Standing::Ordinary
        }
    }

    fn takes_calls(&self, standing: Standing) -> TakesCalls {
        match standing {
            _ if self.is_last_resort => TakesCalls::All,
            Standing::Ordinary => TakesCalls::All,
            Standing::PushedBack => TakesCalls::Selected,
            Standing::LastResort => TakesCalls::No,
        }
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
        if self.is_selection {
            self.move_pushed_back();
        }
        let is_last_resort = self.primary.is_empty();
        let was_last_resort = std::mem::replace(&mut self.is_last_resort, is_last_resort);
        if was_last_resort != is_last_resort && !self.is_selection {
            for (id, entry, _) in self.last_resort.keyed() {
                entry.set_takes_calls(self.takes_calls(self.standing(*id, true)));
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

    /// Puts the entries in pushback into the last-resort set, or into the primary set if the other entries of the selection would get too many
    /// calls.
    fn move_pushed_back(&mut self) {
        if self.pushed_back.is_empty() {
            self.excludes_pushed_back = false;
            return;
        }
        let (set, other) = if self.excludes_pushed_back {
            (&mut self.last_resort, &mut self.primary)
        } else {
            (&mut self.primary, &mut self.last_resort)
        };
        let slots = self.pushed_back.iter();
        let slots: Vec<_> = slots
            .filter_map(|id| Some((*id, set.slot(id)?.clone())))
            .collect();
        let pushed_back: u64 = slots.iter().map(|(_, slot)| u64::from(slot.weight)).sum();
        let all = if self.excludes_pushed_back {
            other.weight() + pushed_back
        } else {
            set.weight()
        };
        let excludes = take_effect(pushed_back, all, self.excludes_pushed_back);
        if excludes == self.excludes_pushed_back {
            return;
        }
        for (id, slot) in slots {
            set.remove(&id);
            other.insert(id, slot.connection, slot.weight);
        }
        self.excludes_pushed_back = excludes;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    #[derive(Clone, Debug, Default)]
    struct Fake(Rc<Cell<Option<TakesCalls>>>);

    impl Fake {
        fn takes(&self, takes_calls: TakesCalls) -> bool {
            self.0.get() == Some(takes_calls)
        }
    }

    impl Entry for Fake {
        fn name(&self) -> Name {
            (0, 1)
        }

        fn set_takes_calls(&self, takes_calls: TakesCalls) {
            self.0.set(Some(takes_calls));
        }
    }

    #[test]
    fn last_resorts_take_calls_only_while_the_primary_set_is_empty() {
        let mut sets = ReadySets::new(false, false);
        let (ordinary, last_resort) = (Fake::default(), Fake::default());
        sets.place(1, ordinary.clone(), 1, Standing::Ordinary);
        sets.place(2, last_resort.clone(), 1, Standing::LastResort);
        assert_eq!(sets.freeze(&mut RingBudget::new(0)).len(), 1);
        assert!(!sets.is_last_resort());
        assert!(ordinary.takes(TakesCalls::All) && last_resort.takes(TakesCalls::No));
        assert!(sets.remove(1));
        sets.freeze(&mut RingBudget::new(0));
        assert!(sets.is_last_resort() && last_resort.takes(TakesCalls::All));
        sets.place(1, ordinary, 1, Standing::Ordinary);
        sets.freeze(&mut RingBudget::new(0));
        assert!(!sets.is_last_resort() && last_resort.takes(TakesCalls::No));
    }

    /// Calls that wait for a selection may have no other server than one in pushback.
    #[test]
    fn an_entry_in_pushback_takes_the_calls_that_wait_for_selected_endpoints() {
        let mut sets = ReadySets::new(false, false);
        let (ordinary, pushed_back) = (Fake::default(), Fake::default());
        sets.place(1, ordinary, 1, Standing::Ordinary);
        sets.place(2, pushed_back.clone(), 1, Standing::PushedBack);
        assert_eq!(sets.freeze(&mut RingBudget::new(0)).len(), 1);
        assert!(pushed_back.takes(TakesCalls::Selected));
        sets.remove(1);
        sets.freeze(&mut RingBudget::new(0));
        assert!(pushed_back.takes(TakesCalls::All));
        sets.place(1, Fake::default(), 1, Standing::Ordinary);
        sets.freeze(&mut RingBudget::new(0));
        assert!(pushed_back.takes(TakesCalls::Selected));
    }

    #[test]
    fn a_selection_excludes_entries_in_pushback_while_enough_others_are_left() {
        use Standing::{Ordinary, PushedBack};
        let mut sets = ReadySets::of_selection(false, false);
        let place = |sets: &mut ReadySets<Fake>, id, weight, standing| {
            sets.place(id, Fake::default(), weight, standing)
        };
        let len = |sets: &mut ReadySets<Fake>| sets.freeze(&mut RingBudget::new(0)).len();
        // Alone, an entry in pushback stays in the primary set.
        place(&mut sets, 1, 2, PushedBack);
        assert_eq!(len(&mut sets), 1);
        assert!(!sets.is_last_resort() && sets.is_primary(1));
        place(&mut sets, 2, 1, Ordinary);
        assert_eq!(len(&mut sets), 2, "more than half of the weight");
        place(&mut sets, 3, 1, Ordinary);
        assert_eq!(len(&mut sets), 2, "half of the weight");
        assert!(!sets.is_primary(1));
        let again = place(&mut sets, 1, 2, PushedBack);
        assert_eq!(again, Placed::Unchanged);
        sets.remove(2);
        assert_eq!(len(&mut sets), 1, "two thirds of the weight");
        assert_eq!(place(&mut sets, 3, 1, PushedBack), Placed::Moved);
        assert_eq!(len(&mut sets), 2);
        assert!(!sets.is_last_resort());
        assert_eq!(place(&mut sets, 3, 1, Ordinary), Placed::Moved);
        assert_eq!(len(&mut sets), 2, "two thirds do not begin to be excluded");
        assert_eq!(place(&mut sets, 1, 2, Ordinary), Placed::Moved);
        assert_eq!(len(&mut sets), 2);
    }

    #[test]
    fn an_entry_is_in_at_most_one_of_the_sets() {
        let mut sets = ReadySets::new(false, false);
        let entry = Fake::default();
        let mut place = |weight, standing| sets.place(1, entry.clone(), weight, standing);
        assert_eq!(place(1, Standing::Ordinary), Placed::Changed);
        assert_eq!(place(1, Standing::Ordinary), Placed::Unchanged);
        assert_eq!(place(2, Standing::Ordinary), Placed::Changed);
        assert_eq!(place(2, Standing::LastResort), Placed::Moved);
        assert!(!sets.is_primary(1));
        assert_eq!(sets.all().count(), 1);
        assert!(sets.remove(1));
        assert!(!sets.remove(1));
    }
}
