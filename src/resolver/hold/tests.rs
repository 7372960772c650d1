//! Tests of each kind of loss. A property test applies random changes to a [`Hold`] and to a simple model, and compares the held instances.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};
use tokio::time::Instant;
use tonic_balance::Address;

use super::*;
use crate::instance::{Advertisement, Instance};

const LENGTH: Duration = Duration::from_secs(30);

fn address(number: u16) -> Address {
    Address::try_from(std::net::SocketAddr::from(([10, 0, 0, 1], number + 1))).expect("an address")
}

fn instance(number: u16) -> Instance {
    Instance::new(address(number))
}

fn leaving(number: u16) -> Instance {
    let mut advertisement = Advertisement::new(address(number));
    advertisement.leaving = true;
    Instance::from(advertisement)
}

/// A [`Hold`] for a set whose instances were all registered a minute ago.
struct Fleet {
    hold: Hold,
    now: Instant,
}

impl Fleet {
    fn of(size: u16) -> Self {
        let mut fleet = Self {
            hold: Hold::new(Some(LENGTH), fastrand::Rng::with_seed(1)),
            now: Instant::now(),
        };
        fleet.here(0..size);
        fleet.pass(60_000);
        fleet
    }

    fn pass(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
    }

    fn here(&mut self, numbers: impl IntoIterator<Item = u16>) -> Outcome {
        let here: Vec<_> = numbers.into_iter().map(address).collect();
        self.hold.on_changes(here, Vec::new(), self.now)
    }

    /// Removes instances that are not marked as leaving.
    fn gone(&mut self, numbers: impl IntoIterator<Item = u16>) -> Outcome {
        let gone = numbers.into_iter().map(instance).collect();
        self.hold.on_changes([], gone, self.now)
    }

    /// Removes instances that are marked as leaving.
    fn left(&mut self, numbers: impl IntoIterator<Item = u16>) -> Outcome {
        let gone = numbers.into_iter().map(leaving).collect();
        self.hold.on_changes([], gone, self.now)
    }
}

#[test]
fn when_a_whole_set_is_removed_half_of_it_is_held() {
    for (size, held) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (10, 5), (101, 51)] {
        let mut fleet = Fleet::of(size);
        let outcome = fleet.gone(0..size);
        assert_eq!(fleet.hold.len(), held, "held of a set of {size}");
        let began = News::Began {
            registered: 0,
            of: usize::from(size),
            length: LENGTH,
        };
        assert_eq!(outcome.news, (held > 0).then_some(began));
        assert!(fleet.hold.instances().all(Instance::is_last_resort));
    }
}

#[test]
fn the_last_half_of_a_set_whose_leases_expire_one_by_one_is_held() {
    let mut fleet = Fleet::of(4);
    for number in 0..4 {
        fleet.gone([number]);
        fleet.pass(1_500);
    }
    assert!(fleet.hold.get(&address(1)).is_none());
    assert!(fleet.hold.get(&address(2)).is_some());
    assert!(fleet.hold.get(&address(3)).is_some());
}

#[test]
fn instances_removed_slowly_are_not_held() {
    let mut fleet = Fleet::of(4);
    for number in 0..4 {
        fleet.gone([number]);
        fleet.pass(10_001);
    }
    assert_eq!(fleet.hold.len(), 0);
}

#[test]
fn each_instance_is_held_for_the_full_time() {
    let mut fleet = Fleet::of(4);
    fleet.gone([0, 1]);
    fleet.gone([2]);
    fleet.pass(5_000);
    fleet.gone([3]);
    fleet.pass(24_999);
    assert_eq!(fleet.hold.on_time(fleet.now).released, []);
    fleet.pass(1);
    assert_eq!(fleet.hold.deadline(), Some(fleet.now));
    let outcome = fleet.hold.on_time(fleet.now);
    assert_eq!((outcome.released, outcome.news), (vec![address(2)], None));
    fleet.pass(5_000);
    let outcome = fleet.hold.on_time(fleet.now);
    assert_eq!(outcome.released, [address(3)]);
    let over = News::Over {
        registered: 0,
        removed: 2,
    };
    assert_eq!(outcome.news, Some(over));
    assert_eq!((fleet.hold.deadline(), fleet.hold.episodes()), (None, 1));
}

#[test]
fn the_return_of_half_of_the_set_ends_every_hold() {
    let mut fleet = Fleet::of(10);
    fleet.gone(0..10);
    assert_eq!(fleet.hold.len(), 5);
    // The new instances have other addresses: only the number of instances counts.
    assert_eq!(fleet.here(20..24).released, []);
    let outcome = fleet.here(24..25);
    assert_eq!(outcome.released.len(), 5);
    let recovered = News::Recovered {
        registered: 5,
        removed: 5,
    };
    assert_eq!(outcome.news, Some(recovered));
    assert_eq!(fleet.hold.deadline(), None);
}

#[test]
fn an_instance_that_is_registered_again_is_no_longer_held() {
    let mut fleet = Fleet::of(6);
    fleet.gone(0..4);
    fleet.gone([4]);
    fleet.gone([5]);
    fleet.here([4]);
    assert!(fleet.hold.get(&address(4)).is_none());
    assert!(fleet.hold.get(&address(5)).is_some());
    // The address is held a second time, with a new deadline.
    fleet.pass(20_000);
    fleet.gone([4]);
    fleet.pass(10_000);
    let released = fleet.hold.on_time(fleet.now).released;
    assert!(released.contains(&address(5)) && !released.contains(&address(4)));
    assert!(fleet.hold.get(&address(4)).is_some());
}

#[test]
fn an_instance_marked_as_leaving_is_not_held() {
    let mut fleet = Fleet::of(10);
    fleet.left(0..10);
    assert_eq!(
        fleet.hold.len(),
        0,
        "instances that are marked as leaving must not be held"
    );

    let mut fleet = Fleet::of(10);
    fleet.left(0..6);
    fleet.gone([6]);
    fleet.gone([7]);
    assert_eq!(
        fleet.hold.len(),
        0,
        "no instance must be held while two of the four instances not marked as leaving are registered"
    );
    fleet.gone([8]);
    assert!(fleet.hold.get(&address(8)).is_some());
    fleet.left([9]);
    assert_eq!(fleet.hold.len(), 1);
}

#[test]
fn a_replaced_fleet_is_not_held() {
    let mut fleet = Fleet::of(10);
    let gone = (0..10).map(instance).collect();
    fleet
        .hold
        .on_changes((10..20).map(address).collect::<Vec<_>>(), gone, fleet.now);
    assert_eq!(
        fleet.hold.len(),
        0,
        "a fleet that is replaced in one transaction must not be held"
    );
    for number in 0..10 {
        fleet.gone([10 + number]);
        fleet.here([20 + number]);
        fleet.pass(500);
    }
    assert_eq!(
        fleet.hold.len(),
        0,
        "a fleet that is replaced one by one must not be held"
    );
}

#[test]
fn a_single_flapping_instance_is_not_held() {
    let mut fleet = Fleet::of(1);
    for _ in 0..5 {
        fleet.gone([0]);
        fleet.here([0]);
    }
    assert_eq!(fleet.hold.episodes(), 0);
}

#[test]
fn nothing_is_held_while_the_hold_is_disabled() {
    for length in [None, Some(Duration::ZERO)] {
        let mut hold = Hold::new(length, fastrand::Rng::with_seed(1));
        let now = Instant::now();
        hold.on_changes((0..9).map(address).collect::<Vec<_>>(), Vec::new(), now);
        let outcome = hold.on_changes([], (0..9).map(instance).collect(), now);
        assert_eq!((outcome.news, hold.len()), (None, 0));
    }
}

#[test]
fn the_longest_hold_duration_causes_no_panic() {
    let mut hold = Hold::new(Some(Duration::MAX), fastrand::Rng::with_seed(1));
    let now = Instant::now();
    hold.on_changes((0..9).map(address).collect::<Vec<_>>(), Vec::new(), now);
    hold.on_changes([], (0..9).map(instance).collect(), now);
    assert_eq!(hold.len(), 5);
}

#[test]
fn held_instances_are_chosen_at_random() {
    let kept = |seed| {
        let mut fleet = Fleet::of(20);
        fleet.hold.rng = fastrand::Rng::with_seed(seed);
        fleet.gone(0..20);
        let mut kept: Vec<_> = fleet
            .hold
            .instances()
            .map(Instance::address)
            .cloned()
            .collect();
        kept.sort();
        kept
    };
    assert_ne!(kept(1), kept(2), "clients must hold different instances");
}

/// A set is compared with its largest size of the last 10 s.
#[test]
fn a_removal_exactly_ten_seconds_ago_counts() {
    for (millis, held) in [(10_000, true), (10_001, false)] {
        let mut fleet = Fleet::of(4);
        fleet.gone([0, 1]);
        fleet.pass(millis);
        fleet.gone([2]);
        assert_eq!(fleet.hold.get(&address(2)).is_some(), held, "{millis}");
    }
}

#[test]
fn an_instance_that_was_not_registered_does_not_count() {
    let mut fleet = Fleet::of(4);
    fleet.gone(0..3);
    assert_eq!(fleet.hold.len(), 1);
    fleet.gone([20]);
    assert_eq!(fleet.hold.len(), 1, "it is not held");
    let mut fleet = Fleet::of(10);
    fleet.gone(0..4);
    fleet.left(20..28);
    fleet.gone(4..6);
    assert_eq!(fleet.hold.len(), 1, "it is no planned departure");
}

#[test]
fn the_news_tell_whether_the_set_has_recovered() {
    // Half is back after some holds have ended.
    let mut fleet = Fleet::of(10);
    fleet.gone(0..9);
    fleet.pass(1_000);
    fleet.gone([9]);
    fleet.pass(29_000);
    let removed = fleet.hold.on_time(fleet.now).released.len();
    assert!(removed > 0 && fleet.hold.len() > 0);
    let all = removed + fleet.hold.len();
    let recovered = News::Recovered {
        registered: 5,
        removed: all,
    };
    assert_eq!(fleet.here(20..25).news, Some(recovered));
    // The only held instance is back, but after planned departures that is less than half.
    let mut fleet = Fleet::of(10);
    fleet.gone(0..6);
    let held: Vec<_> = (0..6)
        .filter(|number| fleet.hold.get(&address(*number)).is_some())
        .collect();
    assert_eq!(held.len(), 1);
    fleet.left([6, 7]);
    let recovered = News::Recovered {
        registered: 3,
        removed: 0,
    };
    assert_eq!(fleet.here(held).news, Some(recovered));
}

/// A direct implementation of the rule that decides which instances are held. It keeps the whole history.
#[derive(Debug, Default)]
struct Model {
    /// For each batch of changes: its time, the size of the set after it, and the number of planned departures up to then.
    history: Vec<(Instant, usize, usize)>,
    registered: BTreeSet<Address>,
    held: BTreeMap<Address, Instant>,
    /// Number of planned departures since the start.
    left: usize,
    /// The strength of the set before the loss: its size plus the number of planned departures up to then. `None` while no instance is
    /// held.
    before: Option<usize>,
}

impl Model {
    /// Returns the largest strength (size plus planned departures) of the last 10 s, or the strength before the loss if that is larger.
    fn largest(&self, now: Instant) -> usize {
        let ends = self.history.iter().skip(1).map(|(at, ..)| *at).chain([now]);
        let strengths = self
            .history
            .iter()
            .zip(ends)
            .filter(|(_, end)| *end + Duration::from_secs(10) >= now)
            .map(|((_, size, left), _)| size + left);
        strengths.chain(self.before).max().unwrap_or_default()
    }

    /// Applies a batch of changes. Returns the number of instances of this batch that must be held.
    fn step(&mut self, here: &[u16], gone: &[(u16, bool)], now: Instant) -> usize {
        let largest = self.largest(now);
        for number in here {
            self.registered.insert(address(*number));
            self.held.remove(&address(*number));
        }
        let mut vanished = 0;
        for (number, planned) in gone {
            if self.registered.remove(&address(*number)) {
                self.left += usize::from(*planned);
                vanished += usize::from(!planned);
            }
        }
        let size = largest.saturating_sub(self.left);
        // An instance that vanishes is held if its removal leaves fewer than half of the set. `later` is the number of instances of the
        // batch that are removed after it.
        let held = (0..vanished)
            .filter(|later| size >= 2 && (self.registered.len() + later) * 2 < size)
            .count();
        if held > 0 {
            self.before = Some(largest);
        }
        self.history.push((now, self.registered.len(), self.left));
        held
    }

    /// Ends all holds if half of the set is registered again. The test itself adds the instances to `held`, because they are chosen at
    /// random.
    fn conclude(&mut self) {
        let back = self
            .before
            .is_some_and(|before| self.registered.len() * 2 >= before.saturating_sub(self.left));
        if back {
            self.held.clear();
        }
        if self.held.is_empty() {
            self.before = None;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_hold_matches_the_model_for_any_changes(seed in any::<u64>()) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut hold = Hold::new(Some(LENGTH), rng.fork());
        let mut model = Model::default();
        let mut now = Instant::now();
        let universe = rng.u16(1..30);
        for _ in 0..120 {
            now += Duration::from_millis(rng.u64(..4_000));
            let over = hold.on_time(now);
            model.held.retain(|_, until| *until > now);
            model.conclude();
            for address in &over.released {
                prop_assert!(!model.held.contains_key(address));
            }
            let (mut here, mut gone) = (Vec::new(), Vec::new());
            let (joins, leaves) = (rng.u8(..4), rng.u8(..4));
            for number in 0..universe {
                let there = model.registered.contains(&address(number));
                if rng.u8(..10) < if there { leaves } else { joins } {
                    if there { gone.push((number, rng.u8(..8) == 0)) } else { here.push(number) }
                }
            }
            let outcome = hold.on_changes(
                here.iter().copied().map(address).collect::<Vec<_>>(),
                gone.iter().map(|(number, planned)| if *planned { leaving(*number) } else { instance(*number) }).collect(),
                now,
            );
            let expected = model.step(&here, &gone, now);
            let fresh: Vec<_> = gone
                .iter()
                .filter(|(number, _)| hold.get(&address(*number)).is_some())
                .collect();
            prop_assert!(fresh.iter().all(|(_, planned)| !planned), "an instance marked as leaving must not be held");
            prop_assert_eq!(fresh.len(), expected);
            model.held.extend(fresh.iter().map(|(number, _)| (address(*number), now + LENGTH)));
            model.conclude();
            let mut known: Vec<_> = hold.instances().map(Instance::address).cloned().collect();
            known.sort();
            prop_assert_eq!(&known, &model.held.keys().cloned().collect::<Vec<_>>());
            prop_assert!(known.iter().all(|address| !model.registered.contains(address)));
            prop_assert_eq!(hold.deadline().is_some(), !known.is_empty());
            prop_assert!(outcome.released.iter().all(|address| hold.get(address).is_none()));
        }
    }
}
