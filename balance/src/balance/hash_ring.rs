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
    /// The owner of each slot. One entry stands for all slots.
    owners: Arc<[u32]>,
    endpoints: Box<[RingEndpoint]>,
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
    /// depends only on the hash and the endpoints.
    pub(super) fn endpoints(
        &self,
        hash: u64,
        scan_limit: usize,
    ) -> impl Iterator<Item = &RingEndpoint> {
        let attempts = (0..=ATTEMPTS).filter_map(move |attempt| self.endpoint(hash, attempt));
        let len = self.endpoints.len();
        let start = usize::try_from(hash >> u32::BITS).unwrap_or_default() % len.max(1);
        let scan = (0..len.min(scan_limit)).map(move |step| (start + step) % len);
        attempts.chain(scan.filter_map(|index| self.endpoints.get(index)))
    }

    /// Returns the endpoint of a hash. With `attempt` 0, this is the owner of the hash. Each further attempt returns the owner of another
    /// slot, which depends only on the hash and the attempt.
    fn endpoint(&self, hash: u64, attempt: u64) -> Option<&RingEndpoint> {
        let hash = match attempt {
            0 => hash,
            _ => mix(hash.wrapping_add(attempt.wrapping_mul(GOLDEN))),
        };
        let owner = self.owners.get(slot_of(hash));
        let owner = *owner.or_else(|| self.owners.first())?;
        self.endpoints.get(owner as usize)
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

/// Builds the rings of successive ready sets. The owners are computed again only if an endpoint or a weight has changed.
#[derive(Debug, Default)]
pub(super) struct HashRingBuilder {
    names: Vec<Name>,
    owners: Arc<[u32]>,
}

/// The hash of the name of an endpoint, and its weight.
pub(super) type Name = (u64, u32);

impl HashRingBuilder {
    /// Returns the ring of a ready set whose entries belong to these endpoints. Several entries may belong to the same endpoint.
    pub(super) fn build(&mut self, entries: impl Iterator<Item = Name>) -> HashRing {
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
            endpoints.push(RingEndpoint {
                weight,
                first: *first,
                others: others.iter().map(|(_, index)| *index).collect(),
            });
        }
        if names != self.names {
            self.owners = owners(&names);
            self.names = names;
        }
        let interval = (endpoints.len() / COUNTS).max(1).next_power_of_two();
        HashRing {
            owners: Arc::clone(&self.owners),
            total_weight: self
                .names
                .iter()
                .map(|(_, weight)| u64::from(*weight))
                .sum(),
            endpoints: endpoints.into(),
            counted: AtomicU32::new(0),
            picks: AtomicU32::new(0),
            interval: u32::try_from(interval).unwrap_or(1 << 31),
        }
    }
}

/// Returns the owner of each slot, as an index of `names`.
fn owners(names: &[Name]) -> Arc<[u32]> {
    if names.len() <= 1 {
        // A single endpoint owns all slots, so one entry is enough.
        return std::iter::repeat_n(0, names.len()).collect();
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
    owners.into()
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
/// 1.2 % for 10 endpoints, 4 % for 100, and 12 % for 1 000. The table of owners has 256 KiB.
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
        let ring = builder.build(all.iter().map(|name| (hash(name.as_bytes()), 1)));
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
        let ring = builder.build([(7, 1), (9, 1), (7, 1)].into_iter());
        assert_eq!(ring.endpoints.len(), 2);
        let indexes: Vec<_> = ring.endpoints[0].indexes().collect();
        assert_eq!(indexes, [0, 2]);
        assert_eq!(ring.total_weight, 2);
        let owners = Arc::clone(&ring.owners);
        let again = builder.build([(9, 1), (7, 1)].into_iter());
        assert!(Arc::ptr_eq(&owners, &again.owners), "must not be rebuilt");
        assert!(builder.build(std::iter::empty()).endpoint(1, 0).is_none());
        let single = builder.build(std::iter::once((7, 1)));
        assert_eq!(single.endpoint(u64::MAX, 0).map(|one| one.first), Some(0));
    }

    #[test]
    fn the_bound_is_the_share_times_the_factor_rounded_up() {
        let mut builder = HashRingBuilder::default();
        let ring = builder.build([(7, 1), (9, 3)].into_iter());
        let [light, heavy] = &*ring.endpoints else {
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
}
