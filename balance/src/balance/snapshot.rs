//! One published state, from which a call picks.

use std::cell::Cell;
use std::sync::Arc;

use arc_swap::Guard;

use super::endpoint::Endpoint;
use super::options::Options;
use super::permit::Permit;
use super::pick_key::PickKey;
use super::pick_policy::{PickPolicy, ProvidedPolicy, ReadyEndpoints};
use super::picker::{Candidate, Pick, Picker};
use super::ready_connection::{ReadyConnection, ReadyEntry};
use super::ready_set::ReadySet;
use super::select::Select;
use super::stream_queue::Awaited;
use super::subsets::{Split, SplitDraw, Subset, Subsets};
use super::summary::Summary;
use super::wanted::Wanted;

/// A published state: a ready set, the ready sets of selections, and the matching summary.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) ready: ReadySet<ReadyEntry>,
    /// `None` if no call selects endpoints, and there is no traffic split.
    pub(super) subsets: Option<Arc<Subsets>>,
    pub(super) summary: Summary,
    /// Part of the published state, so that a change of the policy and the ready set for it take effect together.
    pub(super) picker: Arc<Picker>,
}

impl Published {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            ready: ReadySet::default(),
            // The calls that are made before the first publication must not be sent to a part of the split that gets no calls.
            subsets: Subsets::unready(options.splits.current()),
            summary: Summary::default(),
            picker: Arc::new(
                Picker::new(options.policy, options.seed).with_load_reports(options.load_reports),
            ),
        }
    }
}

/// What picks use besides the published state.
#[derive(Debug)]
pub(super) struct Picking {
    /// The policy that the program provides, if it provides one.
    pub(super) pick_policy: Option<ProvidedPolicy>,
    pub(super) wanted: Wanted,
}

impl Picking {
    pub(super) fn policy(&self) -> Option<&dyn PickPolicy> {
        self.pick_policy.as_ref().map(|policy| &*policy.0)
    }
}

/// One published state, for two steps: a pick, and if the pick finds no connection, the decision whether the call waits or fails. If each
/// step loaded the state, an endpoint could become ready in between. The pick would then find no ready endpoint, the decision would find no
/// pending endpoint, and the call would fail.
#[derive(Debug)]
pub(crate) struct Snapshot<'a> {
    picking: &'a Picking,
    published: Guard<Arc<Published>>,
    key: &'a PickKey,
    draw: &'a SplitDraw,
    /// The part of the traffic split whose streams were all in use at the last pick.
    full_part: Cell<Option<usize>>,
    scan_limit: usize,
}

impl<'a> Snapshot<'a> {
    pub(super) fn new(
        picking: &'a Picking,
        published: Guard<Arc<Published>>,
        key: &'a PickKey,
        draw: &'a SplitDraw,
        scan_limit: usize,
    ) -> Self {
        Self {
            picking,
            published,
            key,
            draw,
            full_part: Cell::new(None),
            scan_limit,
        }
    }

    /// Makes the next pick examine all slots.
    pub(crate) fn scan_all(&mut self) {
        self.scan_limit = usize::MAX;
    }

    /// Picks a `usable` connection, as [`Shared::pick`](super::shared::Shared::pick) does.
    pub(crate) fn pick(&self, usable: impl Fn(&Arc<ReadyConnection>) -> bool) -> Pick<Permit> {
        let usable = |entry: &ReadyEntry| usable(entry.connection());
        let picked = match self.key {
            PickKey::Any if self.published.subsets.is_none() => {
                let set = &self.published.ready;
                self.published.picker.pick(set, usable, self.scan_limit)
            }
            key => self.pick_by(key, usable),
        };
        picked.map(|entry| Permit::reserved(entry.connection()))
    }

    /// Picks for a call that has a selection or a hash, or on a channel with a traffic split or a policy of the program.
    // Not inlined, so that the pick of any other call stays short.
    #[inline(never)]
    fn pick_by(&self, key: &PickKey, usable: impl Fn(&ReadyEntry) -> bool) -> Pick<&ReadyEntry> {
        if let Some(select) = key.select() {
            let picked = match self.subset(select) {
                Some(subset) => self.pick_from(&subset.ready, &usable),
                None if self.awaits_set() => {
                    self.picking.wanted.push(select.criterion());
                    return Pick::Empty;
                }
                None => self.search(select, &usable),
            };
            let has_none = matches!(picked, Pick::Empty | Pick::Excluded | Pick::Limited);
            if !(has_none && select.allows_any()) {
                return picked;
            }
        }
        match self.split() {
            Some(split) => self.pick_part(split, &usable),
            None => self.pick_from(&self.published.ready, &usable),
        }
    }

    fn pick_from<'s>(
        &self,
        set: &'s ReadySet<ReadyEntry>,
        usable: &impl Fn(&ReadyEntry) -> bool,
    ) -> Pick<&'s ReadyEntry> {
        if let Some(policy) = self.picking.policy()
            && let Some(call) = self.key.call()
            && set.len() > 0
        {
            let index = policy.pick(call, &ReadyEndpoints::new(set, usable));
            let entry = index
                .and_then(|index| set.get(index))
                .map(|slot| &slot.connection);
            if let Some(entry) = entry.filter(|entry| usable(entry) && entry.acquire()) {
                return Pick::Taken(entry);
            }
        }
        match self.key.hash() {
            Some(hash) => self
                .published
                .picker
                .pick_hashed(set, hash, usable, self.scan_limit),
            None => self.published.picker.pick(set, usable, self.scan_limit),
        }
    }

    /// Returns whether the call must wait until the driver has published the set of its selection. The policy of the program and the
    /// consistent hash pick from a set. A search would ignore them, for each call of a caller with few calls, because a set that is not used
    /// is dropped.
    pub(crate) fn awaits_set(&self) -> bool {
        let Some(select) = self.key.select().filter(|_| self.key.has_preference()) else {
            return false;
        };
        self.summary().ended.is_none() && self.subset(select).is_none()
    }

    /// Searches all ready endpoints for a selection that has no set yet, and requests a set for later calls.
    #[cold]
    fn search(&self, select: &Select, usable: &impl Fn(&ReadyEntry) -> bool) -> Pick<&ReadyEntry> {
        self.picking.wanted.push(select.criterion());
        let selected = |entry: &ReadyEntry| {
            let endpoint = entry.connection().endpoint();
            select
                .criterion()
                .matches(endpoint.address(), &endpoint.attributes())
        };
        let usable = |entry: &ReadyEntry| selected(entry) && usable(entry);
        self.published
            .picker
            .pick(&self.published.ready, usable, usize::MAX)
    }

    /// Draws a part of the traffic split and picks among its endpoints. If the call cannot use any of them, for example because it has failed
    /// there, picks from the other parts.
    fn pick_part<'s>(
        &self,
        split: &'s Split,
        usable: &impl Fn(&ReadyEntry) -> bool,
    ) -> Pick<&'s ReadyEntry> {
        let parts = &split.parts;
        if parts.is_empty() {
            return Pick::Empty;
        }
        let word = self.draw.word(|| self.published.picker.random());
        let drawn = split.draw(word);
        let mut is_limited = false;
        for step in 0..parts.len() {
            let index = (drawn + step) % parts.len();
            let Some(part) = parts.get(index) else {
                break;
            };
            match self.pick_from(&part.subset.ready, usable) {
                Pick::Excluded | Pick::Empty => {}
                Pick::Limited => is_limited = true,
                Pick::Full => {
                    // The call waits for a stream instead of changing the shares of the parts.
                    self.full_part.set(Some(index));
                    return Pick::Full;
                }
                taken @ Pick::Taken(_) => return taken,
            }
        }
        if is_limited {
            Pick::Limited
        } else {
            Pick::Excluded
        }
    }

    /// Returns the endpoints for a stream of which the call waits, if the last pick has found no free one.
    pub(crate) fn awaited(&self) -> Awaited {
        let select = self.key.select();
        if let Some(select) = self.strict_selection() {
            return Some([select.criterion().clone()].into());
        }
        let split = self.split()?;
        let full = self.full_part.get();
        let full = full.and_then(|index| split.parts.get(index));
        let parts = full.map_or(&split.weighted, |part| &part.criterion);
        Some(match select {
            Some(select) => {
                let selected = std::iter::once(select.criterion());
                selected.chain(&**parts).cloned().collect()
            }
            None => Arc::clone(parts),
        })
    }

    /// Returns whether the call waits for endpoints of its selection, or of its part of the traffic split, that are all last resorts. The wait
    /// queue hands over no stream of them while other endpoints of the channel are ready.
    pub(crate) fn awaits_last_resorts(&self) -> bool {
        let selected = self.key.select().and_then(|select| self.subset(select));
        let of_part = || {
            let split = self.split()?;
            let part = split.parts.get(self.full_part.get()?)?;
            Some(&*part.subset)
        };
        // The set of the selection may have no ready endpoint, and the call then waits for its part.
        let is_last_resort = |subset: &Subset| subset.is_last_resort && subset.ready.len() > 0;
        selected.is_some_and(is_last_resort) || of_part().is_some_and(is_last_resort)
    }

    fn subset(&self, select: &Select) -> Option<&Subset> {
        let subset = self
            .published
            .subsets
            .as_ref()?
            .sets
            .get(select.criterion())?;
        subset.mark_used();
        Some(subset)
    }

    fn split(&self) -> Option<&Split> {
        self.published.subsets.as_ref()?.split.as_ref()
    }

    /// Returns the selection of the call, if the call can be sent only to the selected endpoints.
    fn strict_selection(&self) -> Option<&Select> {
        self.key.select().filter(|select| !select.allows_any())
    }

    pub(crate) fn summary(&self) -> &Summary {
        &self.published.summary
    }

    /// Returns the number of endpoints that the call can be sent to, in any state, and how many of them may become ready at any moment.
    pub(crate) fn endpoints_and_pending(&self) -> (usize, usize) {
        let summary = self.summary();
        match self.strict_selection().map(|select| self.subset(select)) {
            Some(Some(subset)) if subset.ready.len() > 0 => (subset.ready.len(), 0),
            Some(Some(subset)) => (subset.endpoints, subset.pending),
            // The driver builds the set of this selection next. Until then, an endpoint may match.
            Some(None) if summary.ended.is_none() => (summary.endpoints, summary.endpoints),
            _ => (summary.endpoints, summary.pending),
        }
    }

    /// Explains why no endpoint can take the call, if the reason is its selection or the traffic split. `endpoints` returns all endpoints. It
    /// is only called for a selection, because it copies the whole list.
    pub(crate) fn explain(&self, endpoints: impl FnOnce() -> Vec<Arc<Endpoint>>) -> Option<String> {
        let Some(select) = self.strict_selection() else {
            let is_unsplit = self.split().is_none() || self.published.ready.len() == 0;
            return (!is_unsplit)
                .then(|| "no part of the traffic split has a ready endpoint".to_owned());
        };
        let endpoints = endpoints();
        let attributes: Vec<_> = endpoints.iter().map(|one| one.attributes()).collect();
        let endpoints = endpoints
            .iter()
            .zip(&attributes)
            .map(|(endpoint, attributes)| (endpoint.address(), &***attributes));
        Some(select.criterion().explain(endpoints))
    }
}

#[cfg(test)]
mod tests {
    use arc_swap::ArcSwap;
    use tokio::sync::Notify;

    use super::super::pick_key::Details;
    use super::*;

    #[test]
    fn the_endpoints_are_listed_only_to_explain_a_selection() {
        let options = Options::default();
        let published = ArcSwap::from_pointee(Published::new(&options));
        let picking = Picking {
            pick_policy: None,
            wanted: Wanted::new(Arc::new(Notify::new())),
        };
        let draw = SplitDraw::default();
        let explain = |select: Option<Select>, endpoints: fn() -> Vec<Arc<Endpoint>>| {
            let key = PickKey::new(Details {
                select,
                hash: None,
                call: None,
            });
            Snapshot::new(&picking, published.load(), &key, &draw, 1).explain(endpoints)
        };
        let unlisted: fn() -> Vec<Arc<Endpoint>> = || unreachable!("a copy of all endpoints");
        assert_eq!(explain(None, unlisted), None);
        let any = Select::version("1.2").or_any();
        assert_eq!(explain(Some(any), unlisted), None);
        let explained = explain(Some(Select::version("1.2")), Vec::new);
        assert!(explained.is_some_and(|text| text.contains("1.2")));
    }
}
