//! Chooses the endpoints of the subset. This file performs no I/O.
//!
//! ```text
//! source: all endpoints --insert, remove--> EndpointSubset --add, remove--> driver: the endpoints of the subset
//! driver: the class of each endpoint (ready, pending, failing) ----^
//! ```
//!
//! The *chosen* endpoints are those of gRFC A68, or those of the aperture. They are chosen again when the list or the index of the client
//! changes. While some of the chosen endpoints are not ready, the driver has *spare* endpoints as well. The spare endpoints are in the order
//! of gRFC A68. There are two kinds:
//!
//! - Ready endpoints that are no longer chosen. Each of them stays until a chosen endpoint is ready in its place.
//! - Other endpoints, in place of chosen endpoints that have been failing for [`OVERDUE`], or at once if all chosen endpoints are hopeless. An
//!   endpoint is hopeless while it is failing, and if it has lost its connection and has not got another one within [`RECONNECT`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;
use twox_hash::XxHash64;

use crate::address::Address;
use crate::attributes::Attributes;
use crate::balance::driver::subchannel_table::Class;
use crate::balance::peer_index::{PeerIndex, ring_place};

/// The endpoints that the source lists, and those of them that the driver has.
#[derive(Debug)]
pub(in crate::balance::driver) struct EndpointSubset {
    size: usize,
    /// The seed of the hashes. It differs between clients, so that they choose different endpoints.
    seed: u64,
    peer: Option<PeerIndex>,
    /// All endpoints of the source, sorted by hash.
    listed: BTreeMap<Rank, Attributes>,
    chosen: BTreeSet<Address>,
    /// Whether `chosen` must be computed again.
    is_outdated: bool,
    /// The endpoints that the driver has.
    used: BTreeMap<Address, Usage>,
    /// Endpoints in use whose attributes the source has reported again.
    reported: BTreeSet<Address>,
    update_at: Option<Instant>,
}

/// The place of an endpoint in the order of gRFC A68: its hash. The address makes the order unambiguous.
type Rank = (u64, Address);

/// What is known about an endpoint that the driver has.
#[derive(Clone, Copy, Debug)]
struct Usage {
    class: Class,
    /// The time since which the endpoint has been failing; `None` while it is ready or pending.
    failing_since: Option<Instant>,
    /// Whether the endpoint has been ready. A first dial is given all the time that it needs.
    was_ready: bool,
    /// The time from which the endpoint is hopeless.
    hopeless_at: Option<Instant>,
}

impl Usage {
    fn new(class: Class, now: Instant) -> Self {
        let failing_since = (class == Class::Failing).then_some(now);
        Self {
            class,
            failing_since,
            was_ready: class == Class::Ready,
            hopeless_at: failing_since,
        }
    }

    /// Returns what is known after the endpoint was given a class. `is_idle`: whether no connection is being dialled.
    fn after(self, class: Class, is_idle: bool, now: Instant) -> Self {
        let hopeless_at = match class {
            Class::Ready => None,
            Class::Failing => Some(self.hopeless_at.map_or(now, |at| at.min(now))),
            // A server that is not needed may close its connection. That is no failure.
            Class::Pending if is_idle => None,
            Class::Pending if self.was_ready => self.hopeless_at.or(Some(now + RECONNECT)),
            Class::Pending => self.hopeless_at,
        };
        let failing_since = (class == Class::Failing).then_some(now);
        Self {
            class,
            failing_since: failing_since.map(|now| self.failing_since.unwrap_or(now)),
            was_ready: self.was_ready || class == Class::Ready,
            hopeless_at,
        }
    }

    fn is_hopeless(&self, now: Instant) -> bool {
        self.hopeless_at.is_some_and(|at| at <= now)
    }
}

/// What the driver must change.
#[derive(Debug, Default)]
pub(in crate::balance::driver) struct SubsetChanges {
    /// Endpoints to add, and endpoints of the driver with their current attributes.
    pub(in crate::balance::driver) inserted: Vec<(Address, Attributes)>,
    pub(in crate::balance::driver) removed: Vec<Address>,
}

impl EndpointSubset {
    /// Creates a subset of up to `size` endpoints, from those that the driver has.
    pub(in crate::balance::driver) fn new(
        size: usize,
        seed: u64,
        peer: Option<PeerIndex>,
        endpoints: impl IntoIterator<Item = (Address, Attributes, Class)>,
        now: Instant,
    ) -> Self {
        let mut subset = Self {
            size,
            seed,
            peer,
            listed: BTreeMap::new(),
            chosen: BTreeSet::new(),
            is_outdated: true,
            used: BTreeMap::new(),
            reported: BTreeSet::new(),
            update_at: Some(now),
        };
        for (address, attributes, class) in endpoints {
            subset.used.insert(address.clone(), Usage::new(class, now));
            subset.listed.insert(subset.rank(&address), attributes);
        }
        subset
    }

    /// Handles an endpoint that the source lists, or whose attributes have changed.
    pub(in crate::balance::driver) fn insert(&mut self, address: &Address, attributes: Attributes) {
        let is_last_resort = attributes.is_last_resort();
        let before = self.listed.insert(self.rank(address), attributes);
        let before = before.map(|attributes| attributes.is_last_resort());
        self.is_outdated |= before != Some(is_last_resort);
        if self.used.contains_key(address) {
            self.reported.insert(address.clone());
        }
    }

    /// Handles an endpoint that the source no longer lists.
    pub(in crate::balance::driver) fn remove(&mut self, address: &Address) {
        self.is_outdated |= self.listed.remove(&self.rank(address)).is_some();
    }

    /// Handles the class of an endpoint that the driver has. `is_idle`: whether it has no connection and none is being dialled.
    pub(in crate::balance::driver) fn on_class(
        &mut self,
        address: &Address,
        class: Class,
        is_idle: bool,
        now: Instant,
    ) {
        let Some(usage) = self.used.get_mut(address) else {
            return;
        };
        let before = std::mem::replace(usage, usage.after(class, is_idle, now));
        if usage.class != before.class {
            self.update_at = Some(now);
        } else if usage.hopeless_at != before.hopeless_at {
            let at = usage.hopeless_at.unwrap_or(now);
            self.update_at = Some(self.update_at.map_or(at, |earlier| earlier.min(at)));
        }
    }

    pub(in crate::balance::driver) fn set_size(&mut self, size: usize) {
        self.is_outdated |= size != self.size;
        self.size = size;
    }

    /// Sets the index of the client among its peers. `None`: the index is unknown, so gRFC A68 applies.
    pub(in crate::balance::driver) fn set_peer(&mut self, peer: Option<PeerIndex>) {
        self.is_outdated |= peer != self.peer;
        self.peer = peer;
    }

    /// Returns the number of endpoints that the source lists.
    pub(in crate::balance::driver) fn listed(&self) -> usize {
        self.listed.len()
    }

    /// Returns the time at which [`update`](Self::update) must be called, even if the list does not change.
    pub(in crate::balance::driver) fn next(&self) -> Option<Instant> {
        self.update_at
    }

    /// Returns the endpoints that are listed and that the driver does not have. Called when the channel no longer has a subset.
    pub(in crate::balance::driver) fn into_unused(self) -> Vec<(Address, Attributes)> {
        let listed = self.listed.into_iter();
        let unused = listed.filter(|((_, address), _)| !self.used.contains_key(address));
        unused
            .map(|((_, address), attributes)| (address, attributes))
            .collect()
    }

    /// Computes the endpoints that the driver should have, and returns the difference to those that it has.
    pub(in crate::balance::driver) fn update(&mut self, now: Instant) -> SubsetChanges {
        if std::mem::take(&mut self.is_outdated) {
            self.chosen = self.choose();
        }
        let wanted = self.wanted(now);
        let mut changes = SubsetChanges::default();
        self.used.retain(|address, _| {
            let stays = wanted.contains(address);
            if !stays {
                changes.removed.push(address.clone());
            }
            stays
        });
        for address in wanted {
            let is_new = !self.used.contains_key(&address);
            if !is_new && !self.reported.contains(&address) {
                continue;
            }
            let Some(attributes) = self.listed.get(&self.rank(&address)) else {
                continue;
            };
            changes.inserted.push((address.clone(), attributes.clone()));
            if is_new {
                // The driver does not dial a last resort, and reports no change of its class.
                let class = if attributes.is_last_resort() {
                    Class::Failing
                } else {
                    Class::Pending
                };
                self.used.insert(address, Usage::new(class, now));
            }
        }
        self.reported.clear();
        let times = self.used.values().flat_map(|usage| {
            let overdue_at = usage.failing_since.map(|since| since + OVERDUE);
            [overdue_at, usage.hopeless_at]
        });
        self.update_at = times.flatten().filter(|at| *at > now).min();
        changes
    }

    /// Returns the place of an endpoint in the order of gRFC A68.
    fn rank(&self, address: &Address) -> Rank {
        let hash = XxHash64::oneshot(self.seed, address.as_str().as_bytes());
        (hash, address.clone())
    }

    /// Returns the first endpoints in the order of the client. Last resorts are taken only if there are not enough other endpoints, because
    /// they are not dialled.
    fn choose(&self) -> BTreeSet<Address> {
        let mut chosen = BTreeSet::new();
        let arc = self.arc();
        for takes_last_resorts in [false, true] {
            let arc = arc.iter().copied();
            for (rank, attributes) in arc.chain(&self.listed) {
                if chosen.len() == self.size {
                    return chosen;
                }
                if attributes.is_last_resort() == takes_last_resorts {
                    chosen.insert(rank.1.clone());
                }
            }
        }
        chosen
    }

    /// Returns the endpoints of the aperture. There are none while the index of the client is unknown.
    ///
    /// Last resorts have a place in the ring, so that the apertures of all clients stay where they are while servers are lost by mistake.
    fn arc(&self) -> Vec<(&Rank, &Attributes)> {
        let Some(peer) = self.peer else {
            return Vec::new();
        };
        let mut ring: Vec<_> = self.listed.iter().collect();
        ring.sort_by_cached_key(|&(rank, _)| ring_place(&rank.1));
        let arc = peer.arc(ring.len(), self.size);
        arc.filter_map(|position| ring.get(position).copied())
            .collect()
    }

    /// Returns the endpoints that the driver should have: the chosen ones, the spare ones, and the last resorts that it has, because a last
    /// resort that is removed loses its connection and gets no other.
    fn wanted(&self, now: Instant) -> BTreeSet<Address> {
        let mut wanted = self.chosen.clone();
        let class = |address: &Address| self.used.get(address).map(|usage| usage.class);
        let is_hopeless = |address: &Address| {
            let usage = self.used.get(address);
            usage.is_some_and(|usage| usage.is_hopeless(now))
        };
        let all_hopeless = self.chosen.iter().all(is_hopeless);
        let is_overdue = |address: &Address| {
            let since = self.used.get(address).and_then(|usage| usage.failing_since);
            let is_overdue = since.is_some_and(|since| since + OVERDUE <= now);
            is_overdue || (all_hopeless && is_hopeless(address))
        };
        let chosen = self.chosen.iter();
        let mut gaps = chosen
            .clone()
            .filter(|address| class(address) != Some(Class::Ready))
            .count();
        let mut missing = chosen.filter(|address| is_overdue(address)).count();
        // There are at most as many spare endpoints as chosen ones.
        let mut limit = self.size;
        for (rank, attributes) in self.used_in_order() {
            if attributes.is_last_resort() {
                wanted.insert(rank.1);
            } else if gaps > 0 && class(&rank.1) == Some(Class::Ready) && wanted.insert(rank.1) {
                gaps -= 1;
                limit -= 1;
                missing = missing.saturating_sub(1);
            }
        }
        for ((_, address), attributes) in &self.listed {
            if missing == 0 || limit == 0 {
                break;
            }
            if attributes.is_last_resort() || wanted.contains(address) {
                continue;
            }
            limit -= 1;
            missing -= usize::from(!is_overdue(address));
            wanted.insert(address.clone());
        }
        wanted
    }

    /// Returns the endpoints that the driver has and the source still lists, in the order of gRFC A68.
    fn used_in_order(&self) -> Vec<(Rank, &Attributes)> {
        let ranks = self.used.keys().map(|address| self.rank(address));
        let listed = ranks.filter_map(|rank| {
            let attributes = self.listed.get(&rank)?;
            Some((rank, attributes))
        });
        let mut used: Vec<_> = listed.collect();
        used.sort_by(|(a, _), (b, _)| a.cmp(b));
        used
    }
}

/// Time for which a chosen endpoint may fail before another endpoint is used in its place. A server that is restarted usually listens again
/// within this time.
pub(in crate::balance::driver) const OVERDUE: Duration = Duration::from_secs(10);
/// Time within which an endpoint that has lost its connection should have another one. A dial that takes longer has probably lost its packets,
/// and would otherwise keep calls waiting until it times out.
pub(in crate::balance::driver) const RECONNECT: Duration = Duration::from_secs(1);
