//! The choice of the endpoints of a subset, without I/O.

mod simulation;

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use twox_hash::XxHash64;

use super::EndpointSubset;
use super::endpoint_subset::{OVERDUE, RECONNECT};
use crate::address::Address;
use crate::attributes::Attributes;
use crate::balance::driver::subchannel_table::Class;
use crate::balance::peer_index::{PeerIndex, ring_place};

const SEED: u64 = 7;

fn address(index: usize) -> Address {
    let address = format!("10.0.{}.{}:50051", index / 200, index % 200 + 1);
    address.parse().expect("an address")
}

fn addresses(count: usize) -> Vec<Address> {
    (0..count).map(address).collect()
}

/// Returns the addresses in the order of gRFC A68.
fn ordered(addresses: &[Address]) -> Vec<Address> {
    let mut ordered = addresses.to_vec();
    ordered.sort_by_key(|address| XxHash64::oneshot(SEED, address.as_str().as_bytes()));
    ordered
}

fn set(addresses: &[Address]) -> BTreeSet<Address> {
    addresses.iter().cloned().collect()
}

fn subset(size: usize) -> EndpointSubset {
    EndpointSubset::new(size, SEED, None, [], Instant::now())
}

/// A driver that dials nothing: the test sets the class of each endpoint.
struct Driver {
    subset: EndpointSubset,
    used: BTreeSet<Address>,
    now: Instant,
}

impl Driver {
    fn new(subset: EndpointSubset, listed: &[Address]) -> Self {
        let mut driver = Self {
            subset,
            used: BTreeSet::new(),
            now: Instant::now(),
        };
        for address in listed {
            driver.subset.insert(address, Attributes::new());
        }
        driver
    }

    /// Applies the changes once. Returns the endpoints that were inserted.
    fn update(&mut self) -> Vec<(Address, Attributes)> {
        let changes = self.subset.update(self.now);
        for address in &changes.removed {
            assert!(self.used.remove(address), "{address} was not in use");
        }
        for (address, _) in &changes.inserted {
            self.used.insert(address.clone());
        }
        changes.inserted
    }

    /// Applies all changes, and makes each new endpoint ready. Returns the number of endpoints that were added.
    fn settle(&mut self) -> usize {
        let mut added = 0;
        loop {
            let before = self.used.clone();
            for (address, _) in self.update() {
                added += usize::from(!before.contains(&address));
                self.set(&address, Class::Ready);
            }
            if self.subset.next().is_none_or(|next| next > self.now) {
                return added;
            }
        }
    }

    fn set(&mut self, address: &Address, class: Class) {
        self.subset.on_class(address, class, false, self.now);
    }

    fn after(&mut self, time: Duration) {
        self.now += time;
    }
}

/// A driver with a subset of 5 of 20 endpoints, all ready, and the order of the endpoints.
fn five_of_twenty() -> (Driver, Vec<Address>) {
    let listed = addresses(20);
    let mut driver = Driver::new(subset(5), &listed);
    driver.settle();
    (driver, ordered(&listed))
}

#[test]
fn the_subset_has_the_endpoints_with_the_smallest_hashes() {
    let (driver, order) = five_of_twenty();
    assert_eq!(driver.used, set(&order[..5]));
}

#[test]
fn all_endpoints_are_used_if_there_are_fewer_than_the_size() {
    let listed = addresses(4);
    let mut driver = Driver::new(subset(5), &listed);
    assert_eq!(driver.settle(), 4);
    assert_eq!(driver.used, set(&listed));
    driver.subset.remove(&listed[0]);
    driver.settle();
    assert_eq!(driver.used, set(&listed[1..]));
}

#[test]
fn an_added_or_removed_endpoint_changes_at_most_one_endpoint_of_the_subset() {
    let (mut driver, _) = five_of_twenty();
    let mut changed = 0;
    for index in 20..120 {
        driver.subset.insert(&address(index), Attributes::new());
        let added = driver.settle();
        assert!(added <= 1 && driver.used.len() == 5);
        changed += added;
    }
    for index in 20..120 {
        driver.subset.remove(&address(index));
        let added = driver.settle();
        assert!(added <= 1 && driver.used.len() == 5);
        changed += added;
    }
    // With n endpoints, one of them is in a subset of 5 with the probability 5/n: in both directions, 5/21 + 5/22 + ... + 5/120 = 9.
    assert!((5..30).contains(&changed), "{changed}");
}

#[test]
fn an_endpoint_leaves_only_when_its_successor_is_ready() {
    let listed = addresses(20);
    let order = ordered(&listed);
    let mut driver = Driver::new(subset(5), &order[1..]);
    driver.settle();
    driver.subset.insert(&order[0], Attributes::new());
    driver.update();
    assert_eq!(driver.used, set(&order[..6]));
    driver.set(&order[0], Class::Failing);
    driver.update();
    assert_eq!(driver.used, set(&order[..6]));
    driver.set(&order[0], Class::Ready);
    driver.update();
    assert_eq!(driver.used, set(&order[..5]));
    // An endpoint that the source removes leaves at once.
    driver.subset.remove(&order[2]);
    driver.update();
    assert!(!driver.used.contains(&order[2]));
}

#[test]
fn an_endpoint_that_stays_failing_is_replaced_until_it_is_ready_again() {
    let (mut driver, order) = five_of_twenty();
    driver.set(&order[1], Class::Failing);
    driver.settle();
    assert_eq!(driver.used, set(&order[..5]));
    assert_eq!(driver.subset.next(), Some(driver.now + OVERDUE));
    driver.after(OVERDUE);
    driver.update();
    assert_eq!(driver.used, set(&order[..6]));
    // The next endpoint stays failing as well.
    driver.set(&order[5], Class::Failing);
    driver.update();
    assert_eq!(driver.used, set(&order[..6]));
    driver.after(OVERDUE);
    driver.settle();
    // The endpoint after it is ready, so the one that fails is not needed.
    let ready = [&order[..5], &order[6..7]].concat();
    assert_eq!(driver.used, set(&ready));
    driver.set(&order[1], Class::Ready);
    driver.update();
    assert_eq!(driver.used, set(&order[..5]));
}

#[test]
fn if_all_endpoints_fail_others_are_used_at_once_up_to_the_size() {
    let (mut driver, order) = five_of_twenty();
    for address in &order[..5] {
        driver.set(address, Class::Failing);
    }
    driver.update();
    assert_eq!(driver.used, set(&order[..10]));
    for address in &order[5..10] {
        driver.set(address, Class::Failing);
    }
    driver.after(OVERDUE);
    driver.update();
    assert_eq!(driver.used, set(&order[..10]), "there must be a limit");
    driver.set(&order[7], Class::Ready);
    driver.update();
    assert!(driver.used.contains(&order[7]));
    for address in &order[..5] {
        driver.set(address, Class::Ready);
    }
    driver.update();
    assert_eq!(driver.used, set(&order[..5]));
}

#[test]
fn if_all_endpoints_are_lost_others_are_used_soon_unless_no_call_needs_a_connection() {
    let (mut driver, order) = five_of_twenty();
    let now = driver.now;
    for address in &order[..5] {
        driver.subset.on_class(address, Class::Pending, true, now);
    }
    driver.update();
    driver.after(RECONNECT * 60);
    driver.update();
    assert_eq!(driver.used, set(&order[..5]), "they are not needed");
    for address in &order[..5] {
        driver.set(address, Class::Pending);
    }
    driver.update();
    assert_eq!(driver.used, set(&order[..5]));
    assert_eq!(driver.subset.next(), Some(driver.now + RECONNECT));
    driver.after(RECONNECT);
    driver.update();
    assert_eq!(driver.used, set(&order[..10]));
    // An endpoint that has failed stays hopeless while it is dialled again.
    driver.set(&order[0], Class::Failing);
    driver.set(&order[0], Class::Pending);
    driver.update();
    assert_eq!(driver.used, set(&order[..10]));
    for address in &order[..5] {
        driver.set(address, Class::Ready);
    }
    driver.update();
    assert_eq!(driver.used, set(&order[..5]));
}

#[test]
fn the_first_dials_of_the_endpoints_may_take_longer() {
    let listed = addresses(20);
    let mut driver = Driver::new(subset(5), &listed);
    driver.update();
    driver.after(RECONNECT);
    driver.update();
    assert_eq!(driver.used.len(), 5);
}

#[test]
fn a_last_resort_stays_if_it_is_used_and_does_not_count() {
    let (mut driver, order) = five_of_twenty();
    let last_resort = Attributes::new().with_last_resort(true);
    for address in [&order[0], &order[10]] {
        driver.subset.insert(address, last_resort.clone());
    }
    driver.settle();
    assert_eq!(driver.used, set(&order[..6]), "the first one must stay");
    driver.subset.insert(&order[0], Attributes::new());
    driver.settle();
    assert_eq!(driver.used, set(&order[..5]));
    // A set that contains only last resorts.
    let mut driver = Driver::new(subset(5), &[]);
    for address in &order {
        driver.subset.insert(address, last_resort.clone());
    }
    driver.settle();
    assert_eq!(driver.used, set(&order[..5]));
}

#[test]
fn changed_attributes_of_an_endpoint_in_use_are_passed_on() {
    let (mut driver, order) = five_of_twenty();
    let heavy = Attributes::new().with_weight(3);
    driver.subset.insert(&order[0], heavy.clone());
    driver.subset.insert(&order[9], heavy.clone());
    assert_eq!(driver.update(), [(order[0].clone(), heavy)]);
    assert!(driver.update().is_empty());
}

#[test]
fn an_aperture_has_neighbours_of_the_ring_while_the_index_is_known() {
    let (mut driver, order) = five_of_twenty();
    let mut ring = addresses(20);
    ring.sort_by(|a, b| ring_place(a).cmp(&ring_place(b)));
    driver.subset.set_peer(PeerIndex::new(2, 4));
    driver.settle();
    assert_eq!(driver.used, set(&ring[10..15]));
    // While a server of the aperture is a last resort, the first server in the order of the gRFC is used in its place.
    let last_resort = Attributes::new().with_last_resort(true);
    driver.subset.insert(&ring[12], last_resort);
    driver.settle();
    let others = order.iter().find(|address| !ring[10..15].contains(address));
    let mut expected = set(&ring[10..15]);
    expected.extend(others.cloned());
    assert_eq!(driver.used, expected);
    driver.subset.insert(&ring[12], Attributes::new());
    driver.subset.set_peer(None);
    driver.settle();
    assert_eq!(driver.used, set(&order[..5]));
}

#[test]
fn the_size_changes_while_the_channel_runs() {
    let listed = addresses(20);
    let order = ordered(&listed);
    let all = listed
        .iter()
        .map(|address| (address.clone(), Attributes::new(), Class::Ready));
    let now = Instant::now();
    let mut driver = Driver {
        subset: EndpointSubset::new(5, SEED, None, all, now),
        used: set(&listed),
        now,
    };
    driver.settle();
    assert_eq!(driver.used, set(&order[..5]));
    driver.subset.set_size(8);
    driver.settle();
    assert_eq!(driver.used, set(&order[..8]));
    let unused = driver.subset.into_unused();
    let unused: BTreeSet<_> = unused.into_iter().map(|(address, _)| address).collect();
    assert_eq!(unused, set(&order[8..]));
}
