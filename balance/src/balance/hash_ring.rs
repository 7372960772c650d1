//! Consistent hashing: maps the hash of a call to an endpoint, so that few calls move when the set of endpoints changes. This module
//! performs no I/O.
//!
//! The range of hashes is divided into [`SLOTS`] slots of equal size. Each slot is owned by one endpoint. Endpoints compete for each slot by
//! weighted rendezvous hashing: every endpoint makes an endless sequence of *claims*, each at a time and on a slot that depend only on the
//! name and the weight of this endpoint. An endpoint with twice the weight claims twice as fast. The earliest claim on a slot wins.
//!
//! So the share of an endpoint is in proportion to its weight. If an endpoint is removed, only its slots change their owner, and they are
//! spread over all other endpoints. If an endpoint is added, it takes slots from all others, and no slot changes between two old endpoints.
//! The ring of gRPC (gRFC A42) has less: it gives all slots of a removed endpoint to few neighbours, the share of an endpoint varies more,
//! and as the number of entries per endpoint depends on the size of the set, each change also moves slots between the other endpoints.
//!
//! To find the owners, claims are made in the order of rounds until every slot is claimed. With `n` endpoints, about `SLOTS * ln(SLOTS)`
//! claims are needed, for any `n`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The owners of all slots, and the entries of the ready set that belong to each owner.
#[derive(Debug)]
pub(crate) struct HashRing {
    owners: Owners,
    /// The endpoints, by the numbers in `owners`. While the ring is stale, it has `None` for each endpoint that was removed since the owners
    /// were computed, and the new endpoints, which own no slot yet, are at the end.
    endpoints: Box<[Option<RingEndpoint>]>,
    is_stale: bool,
    total_weight: u64,
    /// The calls in flight at the last count.
    counted: AtomicU32,
    /// The number of picks. One pick in `interval` counts the calls in flight.
    picks: AtomicU32,
    /// A power of two.
    interval: u32,
}

/// An endpoint of the ring.
#[derive(Debug)]
pub(crate) struct RingEndpoint {
    weight: u32,
    /// The index of its first connection in the ready set.
    first: u32,
    /// The indexes of its other connections.
    others: Box<[u32]>,
}

impl RingEndpoint {
    /// Returns the indexes of the endpoint's connections in the ready set.
    pub(super) fn indexes(&self) -> impl Iterator<Item = usize> {
        let all = std::iter::once(&self.first).chain(&self.others);
        all.map(|index| *index as usize)
    }
}

impl HashRing {
    /// Returns the endpoints in the order in which a call with this hash tries them: the owner of the hash, then the owners of
    /// [`ATTEMPTS`] other slots, and then up to `scan_limit` endpoints one after the other. An endpoint can occur several times. The order
    /// depends only on the hash and the endpoints. While the ring is stale, the slots of a removed endpoint have no owner, so its calls are
    /// sent to the next endpoint in their order.
    pub(super) fn endpoints(
        &self,
        hash: u64,
        scan_limit: usize,
    ) -> impl Iterator<Item = &RingEndpoint> {
        let attempts = (0..=ATTEMPTS).filter_map(move |attempt| self.endpoint(hash, attempt));
        let len = self.endpoints.len();
        let start = usize::try_from(hash >> u32::BITS).unwrap_or_default() % len.max(1);
        let scan = (0..len).map(move |step| (start + step) % len);
        // The places of removed endpoints do not count.
        let scan = scan.filter_map(|index| self.endpoints.get(index)?.as_ref());
        attempts.chain(scan.take(scan_limit))
    }

    /// Returns whether the owners were computed for other endpoints or weights.
    pub(super) fn is_stale(&self) -> bool {
        self.is_stale
    }

    /// Returns the endpoint of a hash. With `attempt` 0, this is the owner of the hash. Each further attempt returns the owner of another
    /// slot, which depends only on the hash and the attempt.
    fn endpoint(&self, hash: u64, attempt: u64) -> Option<&RingEndpoint> {
        let hash = match attempt {
            0 => hash,
            _ => mix(hash.wrapping_add(attempt.wrapping_mul(GOLDEN))),
        };
        let owner = self.owners.of(slot_of(hash))?;
        self.endpoints.get(owner)?.as_ref()
    }

    /// Returns an estimate of the calls in flight on all endpoints, including the one that is about to be sent. One pick in `interval`
    /// counts them with `count`. In between, each pick adds one, so the estimate may be too high by at most an eighth of a call for each
    /// endpoint.
    pub(super) fn in_flight(&self, count: impl FnOnce() -> u32) -> u32 {
        let since = self.picks.fetch_add(1, Ordering::Relaxed) & (self.interval - 1);
        if since > 0 {
            let counted = self.counted.load(Ordering::Relaxed);
            return counted.saturating_add(since + 1);
        }
        let counted = count();
        self.counted.store(counted, Ordering::Relaxed);
        counted.saturating_add(1)
    }

    /// Returns whether an endpoint with this many calls in flight can take one more. Its bound is its share of `all` calls by weight, times
    /// [`LOAD_BOUND`], rounded up.
    pub(super) fn is_below_bound(&self, endpoint: &RingEndpoint, in_flight: u32, all: u32) -> bool {
        let (numerator, denominator) = LOAD_BOUND;
        let share = u128::from(all) * u128::from(endpoint.weight) * numerator;
        u128::from(in_flight) * u128::from(self.total_weight) * denominator < share
    }
}

/// The owner of each slot, as the number of an endpoint. One entry stands for all slots. The entries are as small as the number of endpoints
/// permits, because a channel can have a ring for each of its selections.
#[derive(Clone, Debug)]
enum Owners {
    Few(Arc<[u8]>),
    Many(Arc<[u16]>),
    VeryMany(Arc<[u32]>),
}

impl Owners {
    fn new(owners: &[u32]) -> Self {
        let few: Result<_, _> = owners.iter().map(|owner| u8::try_from(*owner)).collect();
        if let Ok(few) = few {
            return Self::Few(few);
        }
        let many: Result<_, _> = owners.iter().map(|owner| u16::try_from(*owner)).collect();
        many.map_or_else(|_| Self::VeryMany(owners.into()), Self::Many)
    }

    /// Returns the owner of a slot; `None` if there are no endpoints.
    fn of(&self, slot: usize) -> Option<usize> {
        fn of<T: Copy>(owners: &[T], slot: usize) -> Option<T> {
            owners.get(slot).or_else(|| owners.first()).copied()
        }
        match self {
            Self::Few(owners) => of(owners, slot).map(usize::from),
            Self::Many(owners) => of(owners, slot).map(usize::from),
            Self::VeryMany(owners) => of(owners, slot).map(|owner| owner as usize),
        }
    }
}

impl Default for Owners {
    fn default() -> Self {
        Self::Few(Arc::default())
    }
}

/// The number of rings whose owners a publication may compute. This takes 4 to 8 ms for each ring (measured with 2 to 10 000
/// endpoints), and the driver does nothing else in the meantime.
#[derive(Debug)]
pub(super) struct RingBudget {
    left: u32,
    is_exceeded: bool,
}

impl RingBudget {
    pub(super) fn new(left: u32) -> Self {
        Self {
            left,
            is_exceeded: false,
        }
    }

    /// Returns how many rings may still be computed.
    pub(super) fn left(&self) -> u32 {
        self.left
    }

    /// Returns whether a ring was left stale.
    pub(super) fn is_exceeded(&self) -> bool {
        self.is_exceeded
    }

    /// Returns whether a ring may be computed. The first computation of a ring is always allowed.
    fn take(&mut self, is_first: bool) -> bool {
        let is_left = self.left > 0 || is_first;
        self.left = self.left.saturating_sub(1);
        self.is_exceeded |= !is_left;
        is_left
    }
}

/// Builds the rings of successive ready sets. The owners are computed again only if an endpoint or a weight has changed.
#[derive(Debug, Default)]
pub(super) struct HashRingBuilder {
    /// The endpoints for which the owners were computed, sorted by hash.
    names: Vec<Name>,
    owners: Owners,
}

/// The hash of the name of an endpoint, and its weight.
pub(super) type Name = (u64, u32);

impl HashRingBuilder {
    /// Returns the ring of a ready set whose entries belong to these endpoints. Several entries may belong to the same endpoint. If the
    /// budget is used up, the ring has the previous owners and is stale. The first ring has no previous owners, so it is always computed.
    pub(super) fn build(
        &mut self,
        entries: impl Iterator<Item = Name>,
        budget: &mut RingBudget,
    ) -> HashRing {
        let mut entries: Vec<(Name, u32)> = entries.zip(0..).collect();
        // The order does not depend on the order of the ready set, so the owners stay valid while the endpoints stay the same.
        entries.sort_unstable();
        let (mut names, mut endpoints) = (Vec::<Name>::new(), Vec::new());
        for group in entries.chunk_by(|((left, _), _), ((right, _), _)| left == right) {
            let [((hash, _), first), others @ ..] = group else {
                continue;
            };
            // Endpoints with the same name can have different weights. The largest one counts.
            let ((_, weight), _) = group.last().unwrap_or(&group[0]);
            let weight = (*weight).max(1);
            names.push((*hash, weight));
            endpoints.push(Some(RingEndpoint {
                weight,
                first: *first,
                others: others.iter().map(|(_, index)| *index).collect(),
            }));
        }
        let interval = (endpoints.len() / COUNTS).max(1).next_power_of_two();
        let total_weight = names.iter().map(|(_, weight)| u64::from(*weight)).sum();
        let (owners, is_stale) = if names.len() <= 1 {
            // The previous owners are kept: if the other endpoints return, nothing needs to be computed.
            (Owners::new(&owners(&names)), false)
        } else if names == self.names {
            (self.owners.clone(), false)
        } else if budget.take(self.names.is_empty()) {
            self.owners = Owners::new(&owners(&names));
            self.names = names;
            (self.owners.clone(), false)
        } else {
            endpoints = self.numbered(&names, endpoints);
            (self.owners.clone(), true)
        };
        HashRing {
            owners,
            endpoints: endpoints.into(),
            is_stale,
            total_weight,
            counted: AtomicU32::new(0),
            picks: AtomicU32::new(0),
            interval: u32::try_from(interval).unwrap_or(1 << 31),
        }
    }

    /// Returns the endpoints by their numbers in the previous owners, followed by the new endpoints.
    fn numbered(
        &self,
        names: &[Name],
        endpoints: Vec<Option<RingEndpoint>>,
    ) -> Vec<Option<RingEndpoint>> {
        let mut numbered: Vec<_> = self.names.iter().map(|_| None).collect();
        for ((hash, _), endpoint) in names.iter().zip(endpoints) {
            let number = self.names.binary_search_by_key(hash, |(hash, _)| *hash);
            match number.ok().and_then(|number| numbered.get_mut(number)) {
                Some(place) => *place = endpoint,
                None => numbered.push(endpoint),
            }
        }
        numbered
    }
}

/// Returns the owner of each slot, as an index of `names`.
fn owners(names: &[Name]) -> Vec<u32> {
    if names.len() <= 1 {
        // A single endpoint owns all slots, so one entry is enough.
        return vec![0; names.len()];
    }
    let mut owners = vec![0_u32; SLOTS];
    let mut times = vec![u64::MAX; SLOTS];
    let mut claims: Vec<_> = names.iter().map(|name| Claims::new(*name)).collect();
    let total: u64 = names.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let (mut free, mut until) = (SLOTS, 0_u64);
    // The time in which all endpoints together make as many claims as there are slots.
    let round = u64::try_from(((SLOTS as u128) << TIME_BITS) / u128::from(total.max(1)));
    let round = round.unwrap_or(u64::MAX).max(1);
    while free > 0 {
        until = until.saturating_add(round);
        for (owner, claims) in (0..).zip(&mut claims) {
            while claims.next.0 < until {
                let (time, slot) = claims.next;
                claims.advance();
                free -= usize::from(times[slot] == u64::MAX);
                // If two claims have the same time, the endpoint with the smaller hash wins. Endpoints are sorted by hash.
                if (time, owner) < (times[slot], owners[slot]) {
                    (times[slot], owners[slot]) = (time, owner);
                }
            }
        }
    }
    owners
}

/// The sequence of claims of an endpoint.
struct Claims {
    hash: u64,
    /// 2^64 divided by the weight. A multiplication by it replaces a division by the weight.
    inverse: u64,
    number: u64,
    /// The time and the slot of the next claim.
    next: (u64, usize),
}

impl Claims {
    fn new((hash, weight): Name) -> Self {
        let mut claims = Self {
            hash,
            inverse: u64::MAX / u64::from(weight.max(1)),
            number: 0,
            next: (0, 0),
        };
        claims.next = claims.claim();
        claims
    }

    fn advance(&mut self) {
        self.number += 1;
        self.next = self.claim();
    }

    /// Returns the current claim. Claim `k` of an endpoint with the weight `w` is made at a random time between `k / w` and `(k + 1) / w`.
    /// Only integers are used, so the result is the same on every platform.
    fn claim(&self) -> (u64, usize) {
        let random = mix(self.hash.wrapping_add(self.number.wrapping_mul(GOLDEN)));
        let time = (self.number << TIME_BITS) | (random & ((1 << TIME_BITS) - 1));
        let time = (u128::from(time) * u128::from(self.inverse)) >> 64;
        // The product of two 64-bit numbers, shifted right by 64 bits, fits into 64 bits.
        (u64::try_from(time).unwrap_or(u64::MAX), slot_of(random))
    }
}

/// Returns the slot of a hash.
fn slot_of(hash: u64) -> usize {
    usize::try_from(hash >> (u64::BITS - SLOT_BITS)).unwrap_or_default()
}

/// The output function of `SplitMix64`.
fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The increment of `SplitMix64`.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Number of slots. With `n` endpoints of equal weight, the standard deviation of the share of an endpoint is the square root of `n / SLOTS`:
/// 1.2 % for 10 endpoints, 4 % for 100, and 12 % for 1 000. The table of owners has 64 KiB for up to 256 endpoints, and 128 KiB for up to
/// 65 536.
const SLOTS: usize = 1 << SLOT_BITS;
const SLOT_BITS: u32 = 16;
/// Number of bits of the fractional part of a claim's number. The slot uses the upper 16 bits of the same random word, so the two do not
/// overlap.
const TIME_BITS: u32 = 40;
/// An endpoint takes no more calls while its calls in flight exceed its share by this factor, 1.25, as a fraction. The value is that of the
/// paper "Consistent Hashing with Bounded Loads" (Mirrokni, Thorup, Zadimoghaddam) and of its use at Vimeo.
const LOAD_BOUND: (u128, u128) = (5, 4);
/// Number of further slots that are tried. At least a fifth of the endpoints are below their bound, so all attempts fail for about one call
/// in 40, even under the most uneven load.
const ATTEMPTS: u64 = 16;
/// The calls in flight are counted once in about `n / COUNTS` picks among `n` endpoints.
const COUNTS: usize = 16;

#[cfg(test)]
mod tests {
    use super::super::hash_key::hash;
    use super::*;

    fn names(count: u64) -> Vec<Name> {
        let name = |index: u64| (hash(format!("10.0.0.{index}:50051").as_bytes()), 1);
        (0..count).map(name).collect()
    }

    /// Returns the names of the owners of all slots.
    fn owned(names: &[Name]) -> Vec<u64> {
        let mut sorted = names.to_vec();
        sorted.sort_unstable();
        let owners = owners(&sorted);
        let owner = |slot| owners.get(slot).or(owners.first()).expect("an owner");
        let owner = |slot| sorted[*owner(slot) as usize].0;
        (0..SLOTS).map(owner).collect()
    }

    fn build(builder: &mut HashRingBuilder, entries: impl Iterator<Item = Name>) -> HashRing {
        let ring = builder.build(entries, &mut RingBudget::new(1));
        assert!(!ring.is_stale());
        ring
    }

    fn share(owned: &[u64], name: Name) -> f64 {
        let slots = owned.iter().filter(|owner| **owner == name.0).count();
        f64::from(u32::try_from(slots).expect("few slots")) / f64::from(1 << SLOT_BITS)
    }

    #[test]
    fn removing_one_of_n_endpoints_moves_only_its_own_slots() {
        for count in [2, 3, 12] {
            let all = names(count);
            let before = owned(&all);
            let mut moved = 0;
            for removed in 0..all.len() {
                let mut rest = all.clone();
                let (removed, _) = rest.swap_remove(removed);
                for (before, after) in before.iter().zip(owned(&rest)) {
                    assert!(*before == after || *before == removed);
                    moved += usize::from(*before != after);
                }
            }
            // Each slot moves exactly once, when its owner is removed, so one removal moves 1/n of the slots on average.
            assert_eq!(moved, SLOTS);
        }
    }

    #[test]
    fn the_slots_of_a_removed_endpoint_are_spread_over_all_others() {
        let all = names(10);
        let (before, after) = (owned(&all), owned(&all[1..]));
        for name in &all[1..] {
            let gained = share(&after, *name) - share(&before, *name);
            assert!((gained - 1.0 / 90.0).abs() < 0.003, "gained {gained}");
        }
    }

    #[test]
    fn the_share_of_an_endpoint_is_in_proportion_to_its_weight() {
        let mut weighted = names(10);
        for (index, (_, weight)) in (1..).zip(&mut weighted) {
            *weight = index;
        }
        let owners = owned(&weighted);
        for name in &weighted {
            let fair = f64::from(name.1) / 55.0;
            let share = share(&owners, *name);
            assert!((share - fair).abs() < fair * 0.06, "{share} of {fair}");
        }
        // Only the ratios of the weights matter.
        let scaled = weighted.iter().map(|(hash, weight)| (*hash, weight * 4096));
        let scaled = owned(&scaled.collect::<Vec<_>>());
        let moved = owners.iter().zip(&scaled).filter(|(a, b)| a != b).count();
        assert!(moved < 10, "{moved} slots have moved");
        assert!(owned(&[(1, u32::MAX), (2, 1)]).contains(&1));
    }

    #[test]
    fn the_shares_of_many_endpoints_are_near_each_other() {
        for (count, deviation) in [(10_u32, 0.02), (100, 0.06), (1_000, 0.15)] {
            let all = names(count.into());
            let owners = owned(&all);
            let mut counts = std::collections::HashMap::<u64, u32>::new();
            for owner in owners {
                *counts.entry(owner).or_default() += 1;
            }
            let mean = f64::from(1 << SLOT_BITS) / f64::from(count);
            let square = |name: &Name| {
                let slots = counts.get(&name.0).copied().unwrap_or_default();
                (f64::from(slots) / mean - 1.0).powi(2)
            };
            let variance = all.iter().map(square).sum::<f64>() / f64::from(count);
            assert!(variance.sqrt() < deviation, "{count}: {}", variance.sqrt());
        }
    }

    /// The values were computed with a second implementation in another language. A change would send the keys of all callers to other
    /// servers.
    #[test]
    fn keys_are_mapped_to_the_same_endpoints_in_every_version() {
        let all = [
            "10.0.0.1:50051",
            "10.0.0.2:50051",
            "10.0.0.3:50051",
            "10.0.0.4:50051",
        ];
        let mut builder = HashRingBuilder::default();
        let ring = build(
            &mut builder,
            all.iter().map(|name| (hash(name.as_bytes()), 1)),
        );
        let owner = |key: &str, attempt| {
            let endpoint = ring.endpoint(hash(key.as_bytes()), attempt);
            endpoint.expect("an owner").first
        };
        let keys = ["", "a", "customer-17", "customer-18", "session/4711", "x"];
        let owners: Vec<_> = keys.iter().map(|key| owner(key, 0)).collect();
        assert_eq!(owners, GOLDEN_OWNERS);
        let next: Vec<_> = (0..6).map(|attempt| owner("a", attempt)).collect();
        assert_eq!(next, GOLDEN_ATTEMPTS);
    }

    const GOLDEN_OWNERS: [u32; 6] = [2, 3, 0, 0, 1, 2];
    const GOLDEN_ATTEMPTS: [u32; 6] = [3, 3, 1, 2, 3, 1];

    #[test]
    fn connections_of_one_endpoint_share_its_slots() {
        let mut builder = HashRingBuilder::default();
        let ring = build(&mut builder, [(7, 1), (9, 1), (7, 1)].into_iter());
        assert_eq!(ring.endpoints.len(), 2);
        let first = ring.endpoints[0].as_ref().expect("an endpoint");
        assert_eq!(first.indexes().collect::<Vec<_>>(), [0, 2]);
        assert_eq!(ring.total_weight, 2);
        let again = build(&mut builder, [(9, 1), (7, 1)].into_iter());
        let (Owners::Few(before), Owners::Few(after)) = (&ring.owners, &again.owners) else {
            unreachable!("there are two endpoints");
        };
        assert!(Arc::ptr_eq(before, after), "must not be rebuilt");
        let empty = build(&mut builder, std::iter::empty());
        assert!(empty.endpoint(1, 0).is_none());
        let single = build(&mut builder, std::iter::once((7, 1)));
        assert_eq!(single.endpoint(u64::MAX, 0).map(|one| one.first), Some(0));
    }

    #[test]
    fn the_bound_is_the_share_times_the_factor_rounded_up() {
        let mut builder = HashRingBuilder::default();
        let ring = build(&mut builder, [(7, 1), (9, 3)].into_iter());
        let [Some(light), Some(heavy)] = &*ring.endpoints else {
            unreachable!("there are two endpoints");
        };
        // 10 calls: 2.5 for the light endpoint, times 1.25 is 3.125, rounded up is 4.
        assert!(ring.is_below_bound(light, 3, 10));
        assert!(!ring.is_below_bound(light, 4, 10));
        // 7.5 times 1.25 is 9.375.
        assert!(ring.is_below_bound(heavy, 9, 10));
        assert!(!ring.is_below_bound(heavy, 10, 10));
        assert!(ring.is_below_bound(light, 0, 1), "an idle endpoint");
    }

    /// Returns the index of the entry that owns each of a few hashes.
    fn entries_of(ring: &HashRing) -> Vec<u32> {
        let first = |hash: u64| ring.endpoints(mix(hash), 128).next();
        let hashes = 0..2_000;
        hashes
            .map(|hash| first(hash).expect("an endpoint").first)
            .collect()
    }

    #[test]
    fn without_a_budget_only_the_slots_of_a_removed_endpoint_move() {
        let mut all = names(20);
        all.sort_unstable();
        let mut builder = HashRingBuilder::default();
        let before = entries_of(&build(&mut builder, all.iter().copied()));
        let mut none = RingBudget::new(0);
        // The removed endpoint is the last one, and a new endpoint takes its index in the ready set.
        let added = (7, 1);
        let changed = all[..19].iter().copied().chain([added]);
        let stale = builder.build(changed.clone(), &mut none);
        assert!(stale.is_stale() && none.is_exceeded());
        let (mut heirs, mut moved) = (std::collections::BTreeSet::new(), 0);
        for (before, after) in before.iter().zip(entries_of(&stale)) {
            assert!(*before == after || *before == 19);
            if *before == 19 {
                assert!(after < 19, "the new endpoint owns no slot yet");
                heirs.insert(after);
                moved += 1;
            }
        }
        assert!(heirs.len() > 15, "{moved} hashes have moved to {heirs:?}");
        assert_eq!(stale.total_weight, 20);
        // The endpoint that returns has its slots again, without a computation.
        let returned = builder.build(all.iter().copied(), &mut none);
        assert!(!returned.is_stale());
        assert_eq!(entries_of(&returned), before);
        let fresh = build(&mut builder, changed.clone());
        let of_new = build(&mut HashRingBuilder::default(), changed);
        assert_eq!(entries_of(&fresh), entries_of(&of_new));
    }

    #[test]
    fn the_table_of_owners_is_as_small_as_the_number_of_endpoints_permits() {
        let mut owners = vec![255_u32; SLOTS];
        assert!(matches!(Owners::new(&owners), Owners::Few(_)));
        owners[SLOTS - 1] = 256;
        let many = Owners::new(&owners);
        assert!(matches!(many, Owners::Many(_)));
        assert_eq!((many.of(0), many.of(SLOTS - 1)), (Some(255), Some(256)));
        owners[0] = 1 << 16;
        let very_many = Owners::new(&owners);
        assert!(matches!(very_many, Owners::VeryMany(_)));
        assert_eq!(very_many.of(0), Some(1 << 16));
        assert_eq!(Owners::default().of(7), None);
    }

    /// Prints the time that the computation of the owners takes: `cargo test --release -- --ignored --nocapture owners_take`.
    #[test]
    #[ignore = "it measures, and asserts nothing"]
    fn owners_take_a_few_milliseconds() {
        for count in [2, 10, 100, 1_000, 10_000] {
            let mut all = names(count);
            all.sort_unstable();
            let start = tokio::time::Instant::now();
            let len = owners(&all).len();
            let took = tokio::time::Instant::now().saturating_duration_since(start);
            println!("{count} endpoints: {took:?} for {len} slots");
        }
    }

    #[test]
    fn the_places_of_removed_endpoints_do_not_count_in_a_scan() {
        let all = names(1_000);
        let mut builder = HashRingBuilder::default();
        build(&mut builder, all.iter().copied());
        let left = all[..2].iter().copied();
        let ring = builder.build(left, &mut RingBudget::new(0));
        assert!(ring.is_stale());
        for (hash, _) in all {
            assert!(ring.endpoints(hash, 1).next().is_some());
        }
    }
}
