//! The pick by consistent hash, with bounded load.

use super::hash_ring::RingEndpoint;
use super::picker::{Candidate, Pick, Picker};
use super::ready_set::{ReadySet, Slot};

impl Picker {
    /// Picks the endpoint that owns `hash`. If this endpoint cannot take the call, or has more calls in flight than its bound, picks the
    /// next one in the order of the hash. If none of them can take the call, picks as [`pick`](Self::pick) does.
    pub(crate) fn pick_hashed<'a, M: Candidate>(
        &self,
        set: &'a ReadySet<M>,
        hash: u64,
        usable: impl Fn(&M) -> bool,
        scan_limit: usize,
    ) -> Pick<&'a M> {
        let Some(ring) = set.ring() else {
            return self.pick(set, usable, scan_limit);
        };
        let in_flight = |slot: &Slot<M>| slot.connection.in_flight();
        let all = ring.in_flight(|| set.slots().map(in_flight).sum());
        for endpoint in ring.endpoints(hash, scan_limit) {
            let calls = slots(set, endpoint).map(in_flight).sum();
            if !ring.is_below_bound(endpoint, calls, all) {
                continue;
            }
            let usable = slots(set, endpoint).filter(|slot| usable(&slot.connection));
            if let Some(slot) = usable.min_by_key(|slot| in_flight(slot))
                && slot.connection.acquire()
            {
                return Pick::Taken(&slot.connection);
            }
        }
        self.pick(set, usable, scan_limit)
    }
}

/// Returns the slots of an endpoint: one for each of its connections.
fn slots<'a, M>(
    set: &'a ReadySet<M>,
    endpoint: &'a RingEndpoint,
) -> impl Iterator<Item = &'a Slot<M>> {
    endpoint.indexes().filter_map(|index| set.get(index))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::hash_key::hash;
    use super::super::hash_ring::{Name, RingBudget};
    use super::super::picker::LbPolicy;
    use super::super::ready_set::ReadySetBuilder;
    use super::*;

    /// A connection that only counts its calls.
    #[derive(Debug)]
    struct Fake {
        name: Name,
        in_flight: AtomicU32,
        calls: AtomicU32,
    }

    impl Candidate for Arc<Fake> {
        fn latency(&self) -> f32 {
            0.0
        }

        fn in_flight(&self) -> u32 {
            self.in_flight.load(Ordering::Relaxed)
        }

        fn acquire(&self) -> bool {
            self.in_flight.fetch_add(1, Ordering::Relaxed);
            self.calls.fetch_add(1, Ordering::Relaxed);
            true
        }
    }

    fn set(endpoints: u32) -> (Vec<Arc<Fake>>, ReadySet<Arc<Fake>>) {
        let mut builder = ReadySetBuilder::new(false);
        builder.set_ring(Some(|fake: &Arc<Fake>| fake.name));
        let fakes: Vec<_> = (0..endpoints)
            .map(|index| {
                Arc::new(Fake {
                    name: (hash(&index.to_be_bytes()), 1),
                    in_flight: AtomicU32::new(0),
                    calls: AtomicU32::new(0),
                })
            })
            .collect();
        for (index, fake) in (0..).zip(&fakes) {
            builder.insert(index, Arc::clone(fake), 1);
        }
        let set = builder.freeze_with_ring(&mut RingBudget::new(1));
        (fakes, set)
    }

    fn pick(picker: &Picker, set: &ReadySet<Arc<Fake>>, key: u32) -> Arc<Fake> {
        match picker.pick_hashed(set, hash(&key.to_be_bytes()), |_| true, 128) {
            Pick::Taken(fake) => Arc::clone(fake),
            other => unreachable!("{other:?}"),
        }
    }

    /// Draws keys by Zipf's law: the key `k` of `keys` is drawn with a probability in proportion to `1 / k`.
    struct Zipf(Vec<f64>);

    impl Zipf {
        fn new(keys: u32) -> Self {
            let mut sum = 0.0;
            let sums = (1..=keys).map(|key| {
                sum += 1.0 / f64::from(key);
                sum
            });
            Self(sums.collect())
        }

        fn draw(&self, rng: &mut fastrand::Rng) -> u32 {
            let point = rng.f64() * self.0.last().copied().unwrap_or_default();
            let key = self.0.partition_point(|end| *end < point);
            u32::try_from(key).expect("few keys")
        }
    }

    #[test]
    fn no_endpoint_exceeds_its_bound_under_a_zipf_distribution_of_keys() {
        const ENDPOINTS: u32 = 20;
        const CALLS: u32 = 400;
        let picker = Picker::new(LbPolicy::RingHash, Some(7));
        let (fakes, set) = set(ENDPOINTS);
        let mut random = fastrand::Rng::with_seed(7);
        let zipf = Zipf::new(1_000);
        let (mut open, mut by_owner) = (Vec::new(), 0);
        for _ in 0..100_000 {
            if open.len() >= CALLS as usize {
                let ended: Arc<Fake> = open.swap_remove(random.usize(..open.len()));
                ended.in_flight.fetch_sub(1, Ordering::Relaxed);
            }
            let key = zipf.draw(&mut random);
            let taken = pick(&picker, &set, key);
            let calls = u32::try_from(open.len()).expect("few calls") + 1;
            let bound = (calls * 5).div_ceil(ENDPOINTS * 4);
            assert!(taken.in_flight() <= bound, "{taken:?}: {bound}");
            let ring = set.ring().expect("a ring");
            let owner = ring
                .endpoints(hash(&key.to_be_bytes()), 0)
                .next()
                .expect("an owner");
            let is_owner = owner
                .indexes()
                .any(|index| Arc::ptr_eq(&fakes[index], &taken));
            by_owner += u32::from(is_owner);
            open.push(taken);
        }
        let calls = |fake: &Arc<Fake>| fake.calls.load(Ordering::Relaxed);
        let most = fakes.iter().map(calls).max().expect("endpoints");
        // 1.25 times the fair share is 6 250 calls. The durations of calls are random, so the number of calls varies a little.
        assert!(most < 6_450, "{most} calls");
        // The hottest of the keys alone has 13 % of the calls, and one endpoint takes at most 6.25 %.
        assert!(by_owner > 70_000, "only {by_owner} calls at their owner");
    }

    #[test]
    fn an_idle_channel_sends_each_key_to_its_owner() {
        let picker = Picker::new(LbPolicy::RingHash, Some(7));
        let (_, set) = set(10);
        for key in 0..1_000 {
            let first = pick(&picker, &set, key);
            first.in_flight.fetch_sub(1, Ordering::Relaxed);
            let second = pick(&picker, &set, key);
            second.in_flight.fetch_sub(1, Ordering::Relaxed);
            assert!(Arc::ptr_eq(&first, &second));
        }
    }

    #[test]
    fn an_unusable_endpoint_passes_its_keys_to_others() {
        let picker = Picker::new(LbPolicy::RingHash, Some(7));
        let (fakes, set) = set(10);
        let mut heirs = std::collections::BTreeSet::new();
        for key in 0..1_000_u32 {
            let usable = |fake: &Arc<Fake>| !Arc::ptr_eq(fake, &fakes[3]);
            let key = hash(&key.to_be_bytes());
            let Pick::Taken(taken) = picker.pick_hashed(&set, key, usable, 128) else {
                unreachable!("other endpoints are usable");
            };
            assert!(!Arc::ptr_eq(taken, &fakes[3]));
            taken.in_flight.fetch_sub(1, Ordering::Relaxed);
            let owner = set.ring().and_then(|ring| ring.endpoints(key, 0).next());
            if owner.is_some_and(|owner| owner.indexes().any(|index| index == 3)) {
                heirs.insert(taken.name);
            }
        }
        assert_eq!(heirs.len(), 9, "all others share the keys");
        let none = picker.pick_hashed(&set, 7, |_| false, 128);
        assert!(matches!(none, Pick::Excluded));
    }
}
