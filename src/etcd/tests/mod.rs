//! Tests of the resolver and the registration with the real client. Most of them use a scripted etcd and paused time.
#![allow(
    clippy::print_stdout,
    reason = "the tests print their seeds and the measured costs of failing members"
)]

mod cache;
mod concurrency_limit;
mod fake;
mod fleet;
#[cfg(feature = "testing")]
mod key_watch;
mod members;
mod reconcile_batch;
mod refusals;
mod rules;
mod store;
mod users;
mod watcher;

use std::cell::RefCell;
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use self::fake::Fake;
use self::store::Store;
use crate::error::EtcdErrorKind;
use crate::format::Format;
use crate::keyspace::{Key, Keyspace, LeaseId, Range};
use crate::registration::{Registration, RegistrationBuilder};
use crate::resolver::{Resolver, ResolverBuilder, ResolverState};
use tonic_balance::AddressPolicy;

const PREFIX: &str = "/gRPC/greeter/";
const TTL: Duration = Duration::from_secs(6);
const RECONCILE: Duration = Duration::from_secs(20);

/// Returns the seeds. Each seed determines one history: a random sequence of events and faults, which [`play`] runs. By default, these are
/// 150 consecutive numbers from a random start. `TEST_SEEDS` sets another count, and `TEST_SEED` a single seed.
fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| {
        let value = std::env::var(name).ok()?;
        let number = value.parse();
        Some(number.unwrap_or_else(|_| panic!("{name}={value:?} is not a number")))
    };
    if let Some(seed) = number("TEST_SEED") {
        return seed..seed + 1;
    }
    let first = fastrand::u64(..1 << 40);
    first..first + number("TEST_SEEDS").unwrap_or(150)
}

/// A scripted etcd, with a resolver and a registration that use it.
struct World {
    fake: Fake,
    resolver: Resolver,
    registration: Registration,
    lossy: bool,
    /// An earlier state of the store. It is restored at most once: the client detects a restore by the lower raft term, and after a second
    /// restore the term would be the same as after the first.
    backup: RefCell<Backup>,
}

#[derive(Default)]
enum Backup {
    #[default]
    None,
    Made(Store),
    Restored,
}

impl World {
    /// Creates a registration and a resolver with a scripted etcd. In a lossy world, watches lose deletions, and the resolver reconciles
    /// periodically.
    async fn new(seed: u64, lossy: bool) -> Self {
        let fake = Fake::new(seed, 0);
        let etcd = fake.etcd(2);
        let keyspace = Keyspace::new("/gRPC/");
        let policy = AddressPolicy::default();
        let resolver = ResolverBuilder::service(etcd.clone(), &keyspace, "greeter", policy.clone())
            .reconcile_interval(lossy.then_some(RECONCILE));
        let registration = RegistrationBuilder::service(etcd, policy, keyspace, "greeter")
            .additional_service("second")
            .address("127.0.0.1:1")
            .format(Format::Plain)
            .ttl(TTL);
        let registration = registration.register().await.expect("no error");
        let resolver = resolver.start();
        resolver.ready().await;
        Self {
            fake,
            resolver,
            registration,
            lossy,
            backup: RefCell::default(),
        }
    }

    /// Plays one random event that operators, other servers or etcd itself can cause.
    fn happen(&self) {
        let change = |rng: &mut fastrand::Rng| {
            let key = format!("{PREFIX}{}", rng.u8(..12)).into_bytes();
            let value = format!("127.0.0.1:{}", 100 + rng.u16(..20)).into_bytes();
            (key, (rng.u8(..3) > 0).then_some((value, 0)))
        };
        let mut script = self.fake.script();
        let rng = &mut script.rng;
        let kind = rng.u8(..60);
        // One change, one transaction with 20 changes, or 20 transactions with one change each.
        let (transactions, size) = match rng.u8(..4) {
            0 => (1, 20),
            1 => (20, 1),
            _ => (1, 1),
        };
        let changes: Vec<Vec<_>> = (0..transactions)
            .map(|_| (0..size).map(|_| change(rng)).collect())
            .collect();
        drop(script);
        let mut store = self.fake.store();
        match kind {
            0 => store.wipe(),
            1 => {
                // The store is wiped, and other writes then raise its revision above the old one before any client reconnects.
                let revision = store.revision;
                store.wipe();
                store.revision = revision + 50;
            }
            2..5 => {
                // Compacts the changes before a watch has received them.
                for changes in changes {
                    store.apply(changes);
                }
                store.compact();
            }
            5 => {
                if let backup @ Backup::None = &mut *self.backup.borrow_mut() {
                    *backup = Backup::Made(store.clone());
                }
            }
            6 => {
                let mut kept = self.backup.borrow_mut();
                if let Backup::Made(backup) = &*kept {
                    store.restore(backup, Instant::now());
                    *kept = Backup::Restored;
                }
            }
            7 => store.term += 1,
            8..11 => store.leases.clear(),
            11..14 => store.apply(vec![(self.registration.key().into(), None)]),
            _ => changes.into_iter().for_each(|changes| store.apply(changes)),
        }
        if kind == 59 && self.lossy {
            self.fake.script().lost_deletes = 1;
        }
        drop(store);
        self.fake.tell();
    }

    /// Returns whether the registration has all its keys under a valid lease, and the resolver knows exactly the values in the store.
    fn is_right(&self) -> bool {
        let store = self.fake.store();
        let mut known: Vec<_> = self
            .resolver
            .instances()
            .iter()
            // The resolver keeps instances that vanished together with most others, and marks them as last resorts. They have no key in
            // the store. Other tests check how long they are kept.
            .filter(|i| !i.is_last_resort())
            .map(|i| i.address().to_string())
            .collect();
        known.sort();
        let kept = self.registration.keys().all(|key| {
            let kv = store.keys.get(key.as_bytes());
            kv.is_some_and(|kv| store.leases.contains_key(&kv.lease))
        });
        kept && self.registration.state().is_registered() && known == store.values(PREFIX)
    }

    async fn becomes_right(&self, bound: Duration) -> bool {
        let start = Instant::now();
        while !self.is_right() {
            if Instant::now().saturating_duration_since(start) > bound {
                return false;
            }
            sleep(Duration::from_millis(50)).await;
        }
        true
    }
}

/// Plays one history of random events and faults, and checks the final state.
async fn play(seed: u64) {
    // Jitter, lease ids and the choice of members use the random number generator of this thread.
    fastrand::seed(seed);
    let lossy = seed.is_multiple_of(4);
    let world = World::new(seed, lossy).await;
    world.fake.script().faults = 20;
    for _ in 0..40 {
        let wait = world.fake.script().rng.u64(0..600);
        world.happen();
        sleep(Duration::from_millis(wait)).await;
    }
    world.fake.script().faults = 0;
    world.fake.script().lost_deletes = 0;
    // The bound covers the time until a registration with a silent watch reads its keys (62 s) and the time until the resolver detects a
    // silent watch (41 s), which overlap, a list after a backoff, and a new lease. In a lossy world, it also covers the reconciliations that
    // find the lost deletions.
    let bound = Duration::from_secs(90) + RECONCILE * 2 * u32::from(lossy);
    let right = world.becomes_right(bound).await;
    assert!(
        right,
        "TEST_SEED={seed}: wrong after {bound:?}: {:?} {:?} {:?}; the store has {:?}",
        world.registration.state(),
        world.resolver.status(),
        world.resolver.instances(),
        world.fake.store().values(PREFIX)
    );
    // The correct state must last.
    sleep(TTL * 2).await;
    assert!(
        world.is_right(),
        "TEST_SEED={seed}: the state does not stay correct"
    );
    world.registration.deregister().await.expect("no error");
    let own = world.fake.store().values("/gRPC/second/");
    assert!(own.is_empty(), "TEST_SEED={seed}: keys remain: {own:?}");
}

/// Each history has a runtime and a paused clock of its own. As many histories run in parallel as there are processors.
#[test]
fn the_final_set_is_exact_for_any_order_of_etcd_messages() {
    let seeds = seeds();
    println!("seeds {seeds:?}; TEST_SEED=n repeats one of them, TEST_SEEDS=5000 runs more");
    let next = AtomicU64::new(seeds.start);
    let play_all = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let mut paused = tokio::runtime::Builder::new_current_thread();
            let paused = paused.enable_all().start_paused(true).build();
            paused.expect("a runtime").block_on(play(seed));
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..processors {
            scope.spawn(play_all);
        }
    });
}

#[tokio::test(start_paused = true)]
async fn a_deletion_missing_from_the_watch_is_found_by_reconciliation() {
    let fake = Fake::new(1, 0);
    let keyspace = Keyspace::new("/gRPC/");
    let policy = AddressPolicy::default();
    let resolver = ResolverBuilder::service(fake.etcd(2), &keyspace, "greeter", policy)
        .reconcile_interval(Some(Duration::from_secs(60)))
        .start();
    let change = |key: &str, value: Option<&str>| {
        let value = value.map(|value| (value.as_bytes().to_vec(), 0));
        let key = format!("{PREFIX}{key}").into_bytes();
        fake.store().apply(vec![(key, value)]);
        fake.tell();
    };
    for key in ["1", "2", "3"] {
        change(key, Some(&format!("127.0.0.1:{key}")));
    }
    let knows = async |count: usize, within: u64| {
        let known = async {
            while resolver.instances().len() != count {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let within = Duration::from_secs(within);
        tokio::time::timeout(within, known).await.is_ok()
    };
    assert!(knows(3, 5).await);
    fake.script().lost_deletes = 1;
    change("2", None);
    // A later event does not repair the lost deletion.
    change("4", Some("127.0.0.1:4"));
    assert!(knows(4, 5).await);
    assert_eq!(
        fake.script().lost_deletes,
        0,
        "the scripted etcd has not dropped the deletion"
    );
    assert!(knows(3, 70).await, "{:?}", resolver.status());
    assert_eq!(resolver.status().repaired, 1);
}

#[tokio::test(start_paused = true)]
async fn leases_use_a_separate_connection() {
    let fake = Fake::new(1, 0);
    let etcd = fake.etcd(1);
    let key = Key::from("/a");
    let deadline = Duration::from_secs(1);
    etcd.read(&key).await.expect("no error");
    assert_eq!(
        fake.script().connections,
        1,
        "a read must not open the connection for leases"
    );
    let lease = LeaseId::new(42);
    etcd.grant(lease, TTL, deadline).await.expect("a lease");
    etcd.keep_alive(lease, 0, deadline)
        .await
        .expect("a renewal");
    assert_eq!(
        fake.script().connections,
        2,
        "lease requests must share one more connection"
    );
    etcd.revoke(lease, deadline).await.expect("a revocation");
    etcd.read(&key).await.expect("no error");
    assert_eq!(
        fake.script().connections,
        2,
        "further requests must use the same connections"
    );
    let script = fake.script();
    assert!(
        script.keys_over.is_disjoint(&script.leases_over),
        "{:?} {:?}",
        script.keys_over,
        script.leases_over
    );
}

#[tokio::test(start_paused = true)]
async fn one_wrong_endpoint_among_good_ones_causes_no_failure() {
    let fake = Fake::new(1, 0);
    let addresses = ["stranger:1", "member0:1", "member1:1"];
    let etcd = fake.etcd_at(addresses.map(str::to_owned));
    let key = Key::from("/a");
    let deadline = Duration::from_secs(1);
    for id in 1..100 {
        let lease = LeaseId::new(id);
        etcd.grant(lease, TTL, deadline).await.expect("a lease");
        etcd.keep_alive(lease, 0, deadline)
            .await
            .expect("a renewal");
        etcd.read_once(&key, deadline).await.expect("a read");
        let range = Range::prefix(PREFIX);
        let mut watch = etcd.watch(&range, None).await.expect("a watch");
        assert!(watch.message().await.expect("a message").created);
        // The wait is long enough that, from time to time, the client no longer avoids the wrong endpoint and tries it again.
        sleep(Duration::from_secs(20)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_without_a_first_message_times_out_after_two_seconds() {
    let fake = Fake::new(1, 0);
    let etcd = fake.etcd(2);
    let range = Range::prefix(PREFIX);
    fake.script().mute_watches = 1;
    let start = Instant::now();
    let mut watch = etcd.watch(&range, None).await.expect("a watch");
    let error = watch.message().await.expect_err("a timeout");
    let took = Instant::now().saturating_duration_since(start);
    assert_eq!(error.kind(), EtcdErrorKind::DeadlineExceeded);
    let bounds = Duration::from_secs(2)..Duration::from_millis(2_500);
    assert!(bounds.contains(&took), "{took:?}");
    // The failure counts against the member: the next watch uses another member.
    etcd.record_watch_end(&watch, &error);
    for _ in 0..20 {
        let mut next = etcd.watch(&range, None).await.expect("a watch");
        assert!(next.message().await.expect("a message").created);
        assert_ne!(&*next.endpoint(), error.endpoint().expect("a member"));
    }
}
