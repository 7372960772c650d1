//! Picks a connection of the ready set for a call, and reserves a stream on it.
//!
//! A pick takes no lock, allocates nothing and reads no clock. Its cost depends neither on the number of endpoints nor on their weights. A
//! pick has side effects: it counts the call as in flight, draws random numbers, and uses up turns in round robin.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ready_set::{ReadySet, Slot, random_below};

/// How a channel picks among the ready endpoints. Every policy respects the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LbPolicy {
    /// Picks the better of two endpoints that are drawn at random: the endpoint with the smaller product of latency and load. The latency
    /// is the mean time until the head of a response. Latencies that differ by at most 25 % count as equal. The load is the number of calls
    /// in flight plus one. This is the default.
    ///
    /// The mean covers the last few seconds. On a channel with few calls, it covers the last few samples of each endpoint, for about half a
    /// minute at most. Without new samples, it decays to the median of all endpoints, so that a slow endpoint is tried again. An endpoint
    /// that is fifty times as slow as the others is tried again after 16 s on a channel with many calls, and after 160 s at most. With few
    /// calls, one slow call does not show that an endpoint is slow. Two in a row do, if each takes more than four times the median.
    ///
    /// Endpoints are drawn by weight. If two endpoints have different weights, their calls in flight are divided by their weights, and
    /// their latencies are ignored unless they differ by more than a factor of four. If the latencies are ignored, the endpoint that was
    /// drawn first is usually picked. The second one is picked only if the first has more than twice as many calls in flight per unit of
    /// weight. For this comparison, one call divided by the smaller weight is added to the calls per unit of weight of the second.
    ///
    /// With [load reports](crate::channel::ChannelBuilder::load_reports), the calls in flight are those of all clients, if the servers report
    /// them. Otherwise they are those of this channel.
    #[default]
    Latency,
    /// Draws two endpoints at random, and picks the endpoint with fewer calls in flight. Weights have the same effect as in
    /// [`LbPolicy::Latency`].
    LeastRequest,
    /// Picks the endpoints in turn. Each endpoint gets turns in proportion to its weight, and its turns are evenly spaced. Latency and
    /// calls in flight are ignored.
    ///
    /// With [load reports](crate::channel::ChannelBuilder::load_reports), the weight of an endpoint is multiplied by the weight that gRFC A58
    /// computes from its reports: the calls per second that it would serve at full utilization.
    WeightedRoundRobin,
    /// Picks the endpoint by the hash of a key of the call (consistent hashing, gRFCs A42 and A76), so that calls with the same key are sent
    /// to the same endpoint. Use it for servers that keep data per key in memory, such as caches and sessions.
    ///
    /// The key is the extension [`HashKey`](crate::channel::HashKey) of the request, or else the value of the header that
    /// [`request_hash_header`](crate::channel::ChannelBuilder::request_hash_header) names. A call without a key is sent to a random endpoint,
    /// by weight.
    ///
    /// All channels map a key to the same endpoint if they have the same ready endpoints with the same weights. Neither the order of the
    /// endpoints nor a restart changes the mapping. If an endpoint is removed or not ready, its keys are spread over all other endpoints,
    /// and no other key moves. When the endpoint is ready again, its keys return. A new endpoint takes its share of keys from all others. If
    /// many endpoints change at once, the mapping of the keys that move is final after about 20 ms.
    ///
    /// The load is bounded: if an endpoint has as many calls in flight as 1.25 times its share by weight of all calls in flight on this
    /// channel, rounded up, the call is sent to the next endpoint in an order that depends on the key. So a single busy key cannot overload
    /// its endpoint, and at low load, concurrent calls with the same key may use several endpoints.
    RingHash,
}

impl LbPolicy {
    /// Returns whether the policy needs a ready set with an order of turns.
    pub(super) fn takes_turns(self) -> bool {
        self == Self::WeightedRoundRobin
    }
}

/// The properties of a connection that a pick reads.
pub(crate) trait Candidate {
    /// Returns the latency in microseconds; 0 if unknown.
    fn latency(&self) -> f32;
    fn in_flight(&self) -> u32;
    /// Returns the calls in flight at the server, which include those of other clients as far as they are known.
    fn server_in_flight(&self) -> u32 {
        self.in_flight()
    }
    /// Reserves a stream for a call. Returns false if no stream is free.
    fn acquire(&self) -> bool;
    /// Returns whether the limit on the requests of the endpoint is the reason why no stream can be reserved.
    fn is_limited(&self) -> bool {
        false
    }
}

/// The result of a pick.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Pick<T> {
    /// A stream on this connection is reserved for the call.
    Taken(T),
    /// Connections are ready, but every usable connection that was examined is full.
    Full,
    /// Connections are ready, but the limit on requests is reached: that of the channel, or those of all usable endpoints that were examined.
    Limited,
    /// Connections are ready, but none of the connections that were examined is usable for this call.
    Excluded,
    /// No connection is ready.
    Empty,
}

impl<T> Pick<T> {
    /// Converts the connection.
    pub(super) fn map<U>(self, f: impl FnOnce(T) -> U) -> Pick<U> {
        match self {
            Self::Taken(connection) => Pick::Taken(f(connection)),
            Self::Full => Pick::Full,
            Self::Limited => Pick::Limited,
            Self::Excluded => Pick::Excluded,
            Self::Empty => Pick::Empty,
        }
    }
}

/// What the connections that a pick has examined lack. The greatest of them decides: if one endpoint is below its limit on requests, the call
/// can wait for a stream.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lack {
    Usable,
    Requests,
    Streams,
}

impl Lack {
    #[cold]
    fn of<M: Candidate>(full: &M) -> Self {
        if full.is_limited() {
            Self::Requests
        } else {
            Self::Streams
        }
    }
}

/// Picks connections by the policy of the channel.
#[derive(Debug)]
pub(crate) struct Picker {
    policy: LbPolicy,
    rng: Rng,
    /// The number of the next turn in round robin.
    cursor: AtomicU64,
    /// Whether picks compare the calls in flight at the servers, and not only those on the connections.
    uses_server_loads: bool,
}

impl Picker {
    pub(crate) fn new(policy: LbPolicy, seed: Option<u64>) -> Self {
        let rng = seed.map_or(Rng::Thread, |seed| Rng::Seeded(AtomicU64::new(seed)));
        // Starts at a random turn. If all clients started at the first endpoint, they would overload it after each deployment of the
        // clients.
        let cursor = AtomicU64::new(rng.next() >> 32);
        Self {
            policy,
            rng,
            cursor,
            uses_server_loads: false,
        }
    }

    /// Sets whether the servers report their load. [`LbPolicy::Latency`] uses the calls in flight that they report.
    pub(crate) fn with_load_reports(mut self, load_reports: bool) -> Self {
        self.uses_server_loads = load_reports && self.policy == LbPolicy::Latency;
        self
    }

    /// Returns a random word.
    pub(crate) fn random(&self) -> u64 {
        self.rng.next()
    }

    /// Picks a connection that is `usable` for the call, and reserves a stream on it. If none of the connections that the policy draws can
    /// take the call, scans up to `scan_limit` adjacent slots (entries of the set).
    pub(crate) fn pick<'a, M: Candidate>(
        &self,
        set: &'a ReadySet<M>,
        usable: impl Fn(&M) -> bool,
        scan_limit: usize,
    ) -> Pick<&'a M> {
        if set.len() == 0 {
            return Pick::Empty;
        }
        let lack = Cell::new(Lack::Usable);
        let taken = |slot: &Slot<M>| {
            if !usable(&slot.connection) {
                return false;
            }
            let taken = slot.connection.acquire();
            if !taken {
                lack.set(lack.get().max(Lack::of(&slot.connection)));
            }
            taken
        };
        for _ in 0..DRAWS {
            let Some((first, second)) = self.candidates(set) else {
                break;
            };
            if taken(first) {
                return Pick::Taken(&first.connection);
            }
            if let Some(second) = second.filter(|second| taken(second)) {
                return Pick::Taken(&second.connection);
            }
        }
        // The set has a single slot, or none of the drawn connections can take the call. Scans a part of the set for a usable connection
        // with a free stream.
        let start = random_below(self.rng.next(), set.len());
        for step in 0..set.len().min(scan_limit) {
            let slot = set.get((start + step) % set.len());
            if let Some(slot) = slot.filter(|slot| taken(slot)) {
                return Pick::Taken(&slot.connection);
            }
        }
        match lack.get() {
            Lack::Usable => Pick::Excluded,
            Lack::Requests => Pick::Limited,
            Lack::Streams => Pick::Full,
        }
    }

    /// Returns the slot to try first. If the policy draws two slots, also returns the worse of the two, to try next. Returns `None` if the
    /// set has a single slot.
    fn candidates<'a, M: Candidate>(&self, set: &'a ReadySet<M>) -> Option<Candidates<'a, M>> {
        if set.len() == 1 {
            return None;
        }
        if self.policy.takes_turns() {
            // If the slot is full, its turn is skipped. The next slot does not get this turn, because it would then get two turns in a row.
            let turn = self.cursor.fetch_add(1, Ordering::Relaxed);
            return Some((set.in_turn(turn)?, None));
        }
        if self.policy == LbPolicy::RingHash {
            return self.draw_one(set);
        }
        let (first, second) = self.draw_two(set)?;
        Some(if self.is_worse(first, second) {
            (second, Some(first))
        } else {
            (first, Some(second))
        })
    }

    /// Draws one slot by weight.
    // Not inlined, so that the picks of the other policies stay short.
    #[inline(never)]
    fn draw_one<'a, M>(&self, set: &'a ReadySet<M>) -> Option<Candidates<'a, M>> {
        let index = set.draw(self.rng.next(), self.rng.next())?;
        Some((set.get(index)?, None))
    }

    /// Draws two different slots. Both are drawn by weight. If the second draw yields the first slot again, another slot is drawn instead,
    /// without regard to the weights.
    fn draw_two<'a, M>(&self, set: &'a ReadySet<M>) -> Option<(&'a Slot<M>, &'a Slot<M>)> {
        let random = self.rng.next();
        let (first, second) = if set.is_uniform() {
            let first = random_below(random, set.len());
            // The first draw uses the upper half of the random word, and the second draw the lower half.
            (first, other_index(first, random << 32, set.len()))
        } else {
            let first = set.draw(random, self.rng.next())?;
            let second = set.draw(self.rng.next(), self.rng.next())?;
            // An endpoint with a large weight is often drawn twice. If the endpoint were compared with itself, it would never be avoided,
            // however slow it is.
            let second = if second == first {
                other_index(first, self.rng.next(), set.len())
            } else {
                second
            };
            (first, second)
        };
        Some((set.get(first)?, set.get(second)?))
    }

    /// Returns whether the policy prefers the second slot to the first.
    fn is_worse<M: Candidate>(&self, first: &Slot<M>, second: &Slot<M>) -> bool {
        let (one, other) = (&first.connection, &second.connection);
        let in_flight = if self.uses_server_loads {
            (one.server_in_flight(), other.server_in_flight())
        } else {
            (one.in_flight(), other.in_flight())
        };
        let latencies = || (first.connection.latency(), second.connection.latency());
        let latencies = (self.policy == LbPolicy::Latency).then(latencies);
        if first.weight != second.weight {
            let weights = (first.weight, second.weight);
            return is_worse_by_far(in_flight, weights, latencies.unwrap_or_default());
        }
        latencies.map_or(in_flight.0 > in_flight.1, |latencies| {
            is_worse_among_equals(in_flight, latencies)
        })
    }
}

/// The slot to try first, and the slot to try next.
type Candidates<'a, M> = (&'a Slot<M>, Option<&'a Slot<M>>);

/// Returns a random index that is not `first`.
fn other_index(first: usize, random: u64, len: usize) -> usize {
    let second = first + 1 + random_below(random, len - 1);
    if second < len { second } else { second - len }
}

/// Returns whether the first of two endpoints of the same weight is the worse choice.
fn is_worse_among_equals(in_flight: (u32, u32), latencies: (f32, f32)) -> bool {
    let (first, second) = (float(in_flight.0) + 1.0, float(in_flight.1) + 1.0);
    if are_alike(latencies, LATENCY_NOISE) {
        first > second
    } else {
        first * latencies.0 > second * latencies.1
    }
}

/// Returns whether the first of two endpoints of different weights is worse by far.
///
/// Smaller differences are ignored: the endpoint that was drawn first is used. The draw alone then gives each endpoint its share, for any
/// number of callers. Small differences do not show that an endpoint is slow, for three reasons. Differences in latency are often caused by
/// the weights: the endpoint with the larger weight is busier, and the other one is idle for longer between calls. If few calls are in
/// flight, one call more or less is a large relative difference. If many calls are in flight, their number varies with the latency.
// Never inlined, so that the code of picks from sets with equal weights does not contain the conversions of this function.
#[inline(never)]
fn is_worse_by_far(in_flight: (u32, u32), weights: (u32, u32), latencies: (f32, f32)) -> bool {
    // Calls in flight divided by the weight. Both sides are multiplied by both weights to avoid the division.
    let (first, second) = (
        float(in_flight.0) * float(weights.1),
        float(in_flight.1) * float(weights.0),
    );
    // One call at the endpoint with the smaller weight, in the same unit as `first` and `second`. If each side added one call divided by
    // its own weight instead, the endpoint with the larger weight would always be the better one of two idle endpoints.
    let one_call = float(weights.0.max(weights.1));
    if are_alike(latencies, LATENCY_NOISE_UNEQUAL_WEIGHTS) {
        first > IMBALANCE * (second + one_call)
    } else {
        (first + one_call) * latencies.0 > (second + one_call) * latencies.1
    }
}

/// Returns true if two latencies differ by at most the factor `noise`, or if one of them is unknown. If smaller differences counted, a
/// single caller would send all calls to one of two equal endpoints.
fn are_alike((left, right): (f32, f32), noise: f32) -> bool {
    let unknown = left <= 0.0 || right <= 0.0;
    unknown || (left <= right * noise && right <= left * noise)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact up to 16 million, and above that precise enough to compare"
)]
fn float(number: u32) -> f32 {
    number as f32
}

/// The source of random numbers.
#[derive(Debug)]
enum Rng {
    /// One generator per thread, so that callers share no state.
    Thread,
    /// One sequence for the channel, so that picks are reproducible.
    Seeded(AtomicU64),
}

impl Rng {
    fn next(&self) -> u64 {
        match self {
            Self::Thread => fastrand::u64(..),
            Self::Seeded(state) => {
                // SplitMix64: the state is only a counter, so one atomic addition is enough to share it between callers.
                let mut word = state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
                word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                word ^ (word >> 31)
            }
        }
    }
}

/// Maximum number of draws before the scan. In round robin, each draw is one turn.
const DRAWS: usize = 4;
/// Maximum number of slots that are scanned after the draws, if the call is not in the wait queue. A call in the queue can scan more slots.
pub(crate) const SCAN_LIMIT: usize = 128;
/// Latencies of endpoints with equal weights are alike if they differ by at most this factor.
const LATENCY_NOISE: f32 = 1.25;
/// The same factor for endpoints of different weights.
const LATENCY_NOISE_UNEQUAL_WEIGHTS: f32 = 4.0;
/// If two endpoints have different weights and similar latencies, the first is worse by far if it has more than this many times as many
/// calls in flight per unit of weight as the second. One call divided by the smaller weight is added to the calls per unit of weight of the
/// second before the comparison.
const IMBALANCE: f32 = 2.0;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use super::super::ready_set::ReadySetBuilder;
    use super::*;

    /// A connection that only counts its calls.
    #[derive(Debug, Default)]
    struct Fake {
        name: u32,
        latency: f32,
        in_flight: AtomicU32,
        calls: AtomicU32,
        limit: u32,
        /// Calls of other clients.
        others: AtomicU32,
    }

    impl Candidate for Arc<Fake> {
        fn latency(&self) -> f32 {
            self.latency
        }

        fn in_flight(&self) -> u32 {
            self.in_flight.load(Ordering::Relaxed)
        }

        fn server_in_flight(&self) -> u32 {
            self.in_flight() + self.others.load(Ordering::Relaxed)
        }

        fn acquire(&self) -> bool {
            let free = self.in_flight() < self.limit;
            if free {
                self.in_flight.fetch_add(1, Ordering::Relaxed);
                self.calls.fetch_add(1, Ordering::Relaxed);
            }
            free
        }
    }

    fn set(
        fakes: impl IntoIterator<Item = (f32, u32, u32)>,
    ) -> (Vec<Arc<Fake>>, ReadySet<Arc<Fake>>) {
        let mut builder = ReadySetBuilder::new(true);
        let mut all = Vec::new();
        for (name, (latency, weight, limit)) in (0..).zip(fakes) {
            let fake = Arc::new(Fake {
                name,
                latency,
                limit,
                ..Fake::default()
            });
            builder.insert(name, Arc::clone(&fake), weight);
            all.push(fake);
        }
        (all, builder.freeze())
    }

    /// Makes calls one after the other: each call ends before the next one starts. Returns the share of the calls that each endpoint gets.
    fn shares(picker: &Picker, fakes: &[Arc<Fake>], set: &ReadySet<Arc<Fake>>) -> Vec<f64> {
        const CALLS: u32 = 40_000;
        for _ in 0..CALLS {
            match picker.pick(set, |_| true, SCAN_LIMIT) {
                Pick::Taken(fake) => fake.in_flight.store(0, Ordering::Relaxed),
                other => panic!("all connections are free, but the pick returned {other:?}"),
            }
        }
        let share =
            |fake: &Arc<Fake>| f64::from(fake.calls.load(Ordering::Relaxed)) / f64::from(CALLS);
        fakes.iter().map(share).collect()
    }

    fn assert_near(shares: &[f64], expected: &[f64]) {
        for (share, expected) in shares.iter().zip(expected) {
            assert!(
                (share - expected).abs() < 0.015,
                "{share} instead of {expected} in {shares:?}"
            );
        }
    }

    const POLICIES: [LbPolicy; 3] = [
        LbPolicy::Latency,
        LbPolicy::LeastRequest,
        LbPolicy::WeightedRoundRobin,
    ];

    #[test]
    fn equal_endpoints_get_equal_shares_from_a_single_caller() {
        for policy in POLICIES {
            // The latencies differ only as much as measurements of equal servers do.
            let (fakes, set) = set([(100.0, 1, 9), (110.0, 1, 9), (95.0, 1, 9), (102.0, 1, 9)]);
            let picker = Picker::new(policy, Some(7));
            assert_near(&shares(&picker, &fakes, &set), &[0.25; 4]);
        }
    }

    #[test]
    fn shares_follow_the_weights_in_every_policy() {
        for policy in POLICIES {
            let (fakes, set) = set([(100.0, 1, 9), (100.0, 3, 9), (100.0, 4, 9)]);
            let picker = Picker::new(policy, Some(7));
            assert_near(&shares(&picker, &fakes, &set), &[0.125, 0.375, 0.5]);
        }
    }

    #[test]
    fn busy_endpoints_share_calls_by_weight() {
        for policy in [LbPolicy::Latency, LbPolicy::LeastRequest] {
            let (fakes, set) = set([(100.0, 1, u32::MAX), (100.0, 3, u32::MAX)]);
            let picker = Picker::new(policy, Some(7));
            for _ in 0..4_000 {
                assert!(matches!(
                    picker.pick(&set, |_| true, SCAN_LIMIT),
                    Pick::Taken(_)
                ));
            }
            let share = f64::from(fakes[1].in_flight()) / 4_000.0;
            assert!((share - 0.75).abs() < 0.02, "share {share}");
        }
    }

    #[test]
    fn a_slow_endpoint_is_avoided_while_the_others_are_free() {
        let (fakes, set) = set([(50_000.0, 1, 9), (1_000.0, 1, 9), (1_000.0, 1, 9)]);
        let picker = Picker::new(LbPolicy::Latency, Some(7));
        assert_near(&shares(&picker, &fakes, &set), &[0.0, 0.5, 0.5]);
    }

    #[test]
    fn the_calls_of_other_clients_count_only_with_load_reports_and_by_latency() {
        let picks = |policy, load_reports| {
            let (fakes, set) = set([(100.0, 1, 1_000), (100.0, 1, 1_000)]);
            fakes[0].others.store(100, Ordering::Relaxed);
            let picker = Picker::new(policy, Some(7)).with_load_reports(load_reports);
            for _ in 0..100 {
                picker.pick(&set, |_| true, SCAN_LIMIT);
            }
            fakes[0].in_flight()
        };
        assert_eq!(picks(LbPolicy::Latency, true), 0);
        assert_eq!(picks(LbPolicy::Latency, false), 50);
        assert_eq!(picks(LbPolicy::LeastRequest, true), 50);
    }

    #[test]
    fn an_endpoint_without_samples_is_not_flooded() {
        let (fakes, set) = set([(0.0, 1, u32::MAX), (1_000.0, 1, u32::MAX)]);
        let picker = Picker::new(LbPolicy::Latency, Some(7));
        for _ in 0..1_000 {
            picker.pick(&set, |_| true, SCAN_LIMIT);
        }
        assert_eq!(fakes[0].in_flight(), 500);
    }

    #[test]
    fn round_robin_picks_in_turns() {
        let (fakes, set) = set([(0.0, 1, u32::MAX), (0.0, 1, u32::MAX), (0.0, 1, u32::MAX)]);
        let picker = Picker::new(LbPolicy::WeightedRoundRobin, Some(7));
        for _ in 0..3 {
            assert!(matches!(
                picker.pick(&set, |_| true, SCAN_LIMIT),
                Pick::Taken(_)
            ));
        }
        assert!(fakes.iter().all(|fake| fake.in_flight() == 1));
    }

    #[test]
    fn round_robin_picks_each_equal_endpoint_once_per_round() {
        let (fakes, set) = set((0..100).map(|_| (0.0, 7, u32::MAX)));
        let picker = Picker::new(LbPolicy::WeightedRoundRobin, Some(7));
        for round in 1..5 {
            for _ in 0..100 {
                picker.pick(&set, |_| true, SCAN_LIMIT);
            }
            assert!(fakes.iter().all(|fake| fake.in_flight() == round));
        }
    }

    #[test]
    fn round_robin_is_exact_when_threads_pick_concurrently() {
        let weights = [1, 5, 25, 69];
        let (fakes, set) = set(weights.map(|weight| (0.0, weight, u32::MAX)));
        let picker = Picker::new(LbPolicy::WeightedRoundRobin, Some(7));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2_500 {
                        picker.pick(&set, |_| true, SCAN_LIMIT);
                    }
                });
            }
        });
        let calls = fakes.iter().map(Candidate::in_flight);
        assert!(calls.eq(weights.map(|weight| weight * 100)), "{fakes:?}");
    }

    #[test]
    fn a_full_endpoint_misses_its_turns_and_the_others_share_them_by_weight() {
        let weights = [1, 1, 1, 1, 1, 1, 1, 2];
        let (fakes, set) = set(weights.map(|weight| (0.0, weight, 1_000)));
        fakes[0].in_flight.store(1_000, Ordering::Relaxed);
        let picker = Picker::new(LbPolicy::WeightedRoundRobin, Some(7));
        for _ in 0..800 {
            picker.pick(&set, |_| true, SCAN_LIMIT);
        }
        let calls: Vec<_> = fakes
            .iter()
            .map(|fake| fake.calls.load(Ordering::Relaxed))
            .collect();
        assert_eq!(calls, [0, 100, 100, 100, 100, 100, 100, 200]);
    }

    #[test]
    fn full_connections_are_skipped_and_the_only_free_one_is_found() {
        for (policy, heavy) in POLICIES
            .into_iter()
            .flat_map(|policy| [(policy, 1), (policy, 9)])
        {
            let weight = |name| if name == 5 { heavy } else { 1 };
            let (_, set) = set((0..100).map(|name| (100.0, weight(name), u32::from(name == 63))));
            let picker = Picker::new(policy, Some(7));
            match picker.pick(&set, |_| true, SCAN_LIMIT) {
                Pick::Taken(fake) => assert_eq!(fake.name, 63),
                other => panic!("one connection was free, but the pick returned {other:?}"),
            }
            assert_eq!(picker.pick(&set, |_| true, SCAN_LIMIT), Pick::Full);
        }
    }

    impl PartialEq for Fake {
        fn eq(&self, other: &Self) -> bool {
            self.name == other.name
        }
    }

    #[test]
    fn excluded_connections_are_not_picked() {
        let (fakes, set) = set([(100.0, 1, 9), (100.0, 1, 9)]);
        let picker = Picker::new(LbPolicy::Latency, Some(7));
        for _ in 0..9 {
            match picker.pick(&set, |fake| fake.name != 0, SCAN_LIMIT) {
                Pick::Taken(fake) => assert_eq!(fake.name, 1),
                other => panic!("one connection is usable, but the pick returned {other:?}"),
            }
        }
        assert_eq!(
            picker.pick(&set, |fake| fake.name != 0, SCAN_LIMIT),
            Pick::Full
        );
        assert_eq!(picker.pick(&set, |_| false, SCAN_LIMIT), Pick::Excluded);
        assert_eq!(fakes[0].in_flight(), 0);
    }

    #[test]
    fn a_pick_from_an_empty_set_fails() {
        let (_, set) = set([]);
        assert_eq!(
            Picker::new(LbPolicy::Latency, None).pick(&set, |_| true, SCAN_LIMIT),
            Pick::Empty
        );
    }

    #[test]
    fn a_seed_makes_the_picks_reproducible() {
        let picks = || {
            let (_, set) = set((0..10).map(|_| (100.0, 1, u32::MAX)));
            let picker = Picker::new(LbPolicy::LeastRequest, Some(42));
            let pick = || match picker.pick(&set, |_| true, SCAN_LIMIT) {
                Pick::Taken(fake) => fake.name,
                other => panic!("all connections are free, but the pick returned {other:?}"),
            };
            (0..100).map(|_| pick()).collect::<Vec<_>>()
        };
        assert_eq!(picks(), picks());
    }
}
