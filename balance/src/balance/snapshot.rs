//! One published state, from which a call picks.

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
use super::subsets::{SplitPart, Subset, Subsets};
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
            subsets: None,
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
    scan_limit: usize,
}

impl<'a> Snapshot<'a> {
    pub(super) fn new(
        picking: &'a Picking,
        published: Guard<Arc<Published>>,
        key: &'a PickKey,
        scan_limit: usize,
    ) -> Self {
        Self {
            picking,
            published,
            key,
            scan_limit,
        }
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
                None => self.search(select, &usable),
            };
            let has_none = matches!(picked, Pick::Empty | Pick::Excluded);
            if !(has_none && select.allows_any()) {
                return picked;
            }
        }
        match self.split() {
            Some(parts) => self.pick_part(parts, &usable),
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
        parts: &'s [SplitPart],
        usable: &impl Fn(&ReadyEntry) -> bool,
    ) -> Pick<&'s ReadyEntry> {
        if parts.is_empty() {
            return Pick::Empty;
        }
        let drawn = Subsets::draw(parts, self.published.picker.random());
        let mut outcome = Pick::Excluded;
        for step in 0..parts.len() {
            let Some(part) = parts.get((drawn + step) % parts.len()) else {
                break;
            };
            match self.pick_from(&part.subset.ready, usable) {
                Pick::Excluded | Pick::Empty => {}
                // The call waits for a stream instead of changing the shares of the parts.
                picked => {
                    outcome = picked;
                    break;
                }
            }
        }
        outcome
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

    fn split(&self) -> Option<&[SplitPart]> {
        self.published.subsets.as_ref()?.split.as_deref()
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

    /// Explains why no endpoint can take the call, if the reason is its selection or the traffic split.
    /// `endpoints` contains all endpoints.
    pub(crate) fn explain(&self, endpoints: &[Arc<Endpoint>]) -> Option<String> {
        let Some(select) = self.strict_selection() else {
            let is_unsplit = self.split().is_none() || self.published.ready.len() == 0;
            return (!is_unsplit)
                .then(|| "no part of the traffic split has a ready endpoint".to_owned());
        };
        let attributes: Vec<_> = endpoints.iter().map(|one| one.attributes()).collect();
        let endpoints = endpoints
            .iter()
            .zip(&attributes)
            .map(|(endpoint, attributes)| (endpoint.address(), &***attributes));
        Some(select.criterion().explain(endpoints))
    }
}
