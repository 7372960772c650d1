//! Calls, keys and watches during failures of a real etcd. Where callers run, they call real servers without a pause, and no call may fail.
//!
//! With `SOAK=1` (`make soak`), an outage of etcd and a freeze of its leader last for 60 s instead of 12 s, and the unrelated writes for
//! 180 s instead of 8 s.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a failed step is a failed test, and figures are printed"
)]

mod support;

use std::time::Duration;

use etcd_client::{EventType, WatchOptions};
use nix::sys::signal::Signal;
use support::callers::Callers;
use support::counting::Counting;
use support::program::{Output, example, line_with, lines, signal};
use support::relay::Relay;
use support::{
    Registered, SOON, addresses, client, etcd, eventually, knows, leader, list, registry, soak,
    within,
};
use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, Registry, Resolver, resolver::ResolverState};

/// Returns `short` seconds, or `long` seconds with `SOAK=1`.
fn span(short: u64, long: u64) -> Duration {
    Duration::from_secs(soak("seconds", short, long))
}

/// Registered servers and a channel that calls them.
struct Fleet {
    counter: Counting,
    _servers: Vec<Registered>,
    resolver: Resolver,
    channel: BalancedChannel,
    /// The keys of the servers in etcd.
    keys: Vec<String>,
}

impl Fleet {
    async fn start(registry: &Registry, size: usize, ttl: Duration) -> Self {
        let counter = Counting::default();
        let servers = (0..size)
            .map(|_| counter.register(registry.registration("greeter").ttl(ttl)))
            .collect();
        let resolver = registry.resolver("greeter").start();
        eventually("all servers are registered", async || {
            resolver.instances().len() == size
        })
        .await;
        let channel = registry.channel("greeter").connect().await.unwrap();
        eventually("the channel knows all servers", async || {
            channel.endpoints().len() == size
        })
        .await;
        let keys = resolver.instances();
        let keys = keys
            .iter()
            .map(|instance| instance.location().unwrap().key().to_owned());
        Self {
            counter,
            _servers: servers,
            keys: keys.collect(),
            resolver,
            channel,
        }
    }

    fn callers(&self) -> Callers {
        Callers::start(&self.channel, 4)
    }

    /// Waits until the servers have served more than a hundred further calls.
    async fn serves(&self) {
        let before = self.counter.count();
        eventually("calls continue", async || {
            self.counter.count() > before + 100
        })
        .await;
    }
}

/// Returns how often `keys` were deleted in the whole history of the store. The history must not have been compacted.
async fn deletions(etcd: &etcd_client::Client, keys: &[String]) -> usize {
    // During an election, etcd does not answer this read.
    let mut end = 0;
    eventually("etcd answers", async || {
        let read = etcd.kv_client().get("/", None).await;
        end = read.map_or(0, |read| read.header().unwrap().revision());
        end > 0
    })
    .await;
    let options = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut watch = etcd.watch_client().watch("/", Some(options)).await.unwrap();
    // The revision of this write is greater than `end`, so its event marks the end of the history.
    eventually("etcd writes", async || {
        etcd.kv_client().put("/end", "", None).await.is_ok()
    })
    .await;
    let mut deleted = 0;
    loop {
        let message = timeout(SOON, watch.message()).await.unwrap().unwrap();
        for event in message.expect("the watch continues").events() {
            let kv = event.kv().unwrap();
            let own = keys.iter().any(|key| key.as_bytes() == kv.key());
            deleted += usize::from(own && event.event_type() == EventType::Delete);
            if kv.mod_revision() > end {
                return deleted;
            }
        }
    }
}

/// After an outage, etcd extends leases by one TTL. A registration whose backoff lasts for longer than one TTL would lose its key although
/// etcd has recovered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_etcd_deletes_no_key_and_fails_no_call() {
    let mut etcd = etcd().await;
    let ttl = Duration::from_secs(7);
    let fleet = Fleet::start(&registry(&etcd).await, 3, ttl).await;
    let callers = fleet.callers();
    etcd.kill(0).await.unwrap();
    sleep(span(12, 60)).await;
    assert_eq!(fleet.channel.endpoints().len(), 3);
    etcd.restart(0).await.unwrap();
    // After the restart, the leases expire within one TTL unless they are renewed.
    sleep(ttl * 3 / 2).await;
    eventually("the resolver is `Fresh`", async || {
        fleet.resolver.status().state == ResolverState::Fresh
    })
    .await;
    assert_eq!(fleet.resolver.instances().len(), 3);
    let by_hand = client(&etcd).await;
    let lost = deletions(&by_hand, &fleet.keys).await;
    assert_eq!(lost, 0, "keys were deleted");
    callers.none_failed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_etcd_is_filled_again_and_stale_instances_are_removed() {
    for later_writes in [0, 200] {
        let mut etcd = etcd().await;
        let registry = registry(&etcd).await;
        let ttl = Duration::from_secs(10);
        let fleet = Fleet::start(&registry, 3, ttl).await;
        // This key is not written again after the wipe, as if its server had died.
        let by_hand = client(&etcd).await;
        let lease = by_hand.lease_client().grant(600, None).await.unwrap().id();
        let options = etcd_client::PutOptions::new().with_lease(lease);
        let ghost = "127.0.0.1:1";
        by_hand
            .kv_client()
            .put("/gRPC/greeter/ghost", ghost, Some(options))
            .await
            .unwrap();
        eventually("the stale instance is listed", async || {
            addresses(&fleet.resolver).contains(&ghost.to_owned())
        })
        .await;
        let callers = fleet.callers();
        etcd.kill(0).await.unwrap();
        etcd.wipe(0).await.unwrap();
        etcd.restart(0).await.unwrap();
        let by_hand = client(&etcd).await;
        for _ in 0..later_writes {
            by_hand.kv_client().put("/other", "", None).await.unwrap();
        }
        within(ttl, "all servers are registered again", async || {
            list(&by_hand, "/gRPC/greeter/").await.len() == 3
        })
        .await;
        within(ttl * 4, "the set matches the servers", async || {
            let known = addresses(&fleet.resolver);
            known.len() == 3 && !known.contains(&ghost.to_owned())
        })
        .await;
        fleet.serves().await;
        let calls = callers.none_failed().await;
        assert!(calls > 500, "{calls}");
    }
}

/// A restore resets the Raft term, and leases start again with their full TTL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_etcd_keeps_live_servers_and_loses_dead_ones() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    let ttl = Duration::from_secs(5);
    let fleet = Fleet::start(&registry, 3, ttl).await;
    let registering = registry.registration("other").address("127.0.0.1:1");
    let registration = registering.ttl(ttl).register().await.unwrap();
    let callers = fleet.callers();
    etcd.stop(0).await.unwrap();
    etcd.back_up(0).await.unwrap();
    // Each start causes an election, which increases the Raft term.
    for _ in 0..3 {
        etcd.restart(0).await.unwrap();
    }
    within(ttl * 3, "the server is registered again", async || {
        registration.state().is_registered() && fleet.resolver.instances().len() == 3
    })
    .await;
    eventually("the weight is set", async || {
        registration.set_weight(9).await.is_ok()
    })
    .await;
    // This key is written after the backup, so the restored store does not contain it.
    let by_hand = client(&etcd).await;
    let lease = by_hand.lease_client().grant(600, None).await.unwrap().id();
    let leased = etcd_client::PutOptions::new().with_lease(lease);
    let ghost = ("/gRPC/greeter/ghost", "127.0.0.1:1");
    let mut kv = by_hand.kv_client();
    kv.put(ghost.0, ghost.1, Some(leased)).await.unwrap();
    eventually("the stale instance is listed", async || {
        addresses(&fleet.resolver).contains(&ghost.1.to_owned())
    })
    .await;

    etcd.kill(0).await.unwrap();
    etcd.restore(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    within(ttl * 4, "the set matches the servers", async || {
        let known = addresses(&fleet.resolver);
        known.len() == 3 && !known.contains(&ghost.1.to_owned())
    })
    .await;
    within(ttl * 2, "the key contains the weight again", async || {
        let listed = list(&client(&etcd).await, registration.key()).await;
        let value = listed.first().map(|(_, value, _)| value.clone());
        let restored = value.is_some_and(|value| value.contains("\"weight\":9"));
        restored && registration.state().is_registered()
    })
    .await;
    // The registration must stay registered for two more TTLs. For this, its renewals must succeed.
    let end = Instant::now() + ttl * 2;
    while Instant::now() < end {
        let state = registration.state();
        assert!(state.is_registered(), "{state:?}");
        sleep(Duration::from_millis(50)).await;
    }
    fleet.serves().await;
    callers.none_failed().await;
    registration.deregister().await.unwrap();
}

/// Writes about 55 000 events in 2 650 revisions, in transactions of 100 keys and in single writes, under one lease. Keys that begin with
/// `~` sort after all others and are never deleted. With `compact`, the history is compacted after round 400. Returns the last revision.
async fn backlog(etcd: &etcd_client::Client, lease: i64, compact: bool) -> i64 {
    let mut revision = 0;
    let host = if compact { "127.0.0.2" } else { "127.0.0.1" };
    let leased = || Some(etcd_client::PutOptions::new().with_lease(lease));
    for round in 0..530_u64 {
        for number in 0..4 {
            let key = format!("/gRPC/greeter/~{number}");
            let value = format!("{host}:{}", 1_000 + round);
            etcd.kv_client().put(key, value, leased()).await.unwrap();
        }
        let mut operations: Vec<_> = (0..99)
            .map(|number| {
                let key = format!("/gRPC/greeter/{}", round % 5 * 100 + number);
                if (number + round) % 3 == 0 {
                    etcd_client::TxnOp::delete(key, None)
                } else {
                    let value = format!("{host}:{}", 1_000 + number * 100 + round);
                    etcd_client::TxnOp::put(key, value, leased())
                }
            })
            .collect();
        let last = format!("{host}:{}", 60_000 + round);
        operations.push(etcd_client::TxnOp::put("/gRPC/greeter/~~", last, leased()));
        let transaction = etcd_client::Txn::new().and_then(operations);
        let answer = etcd.kv_client().txn(transaction).await.unwrap();
        revision = answer.header().unwrap().revision();
        if compact && round == 400 {
            etcd.kv_client().compact(revision, None).await.unwrap();
        }
    }
    revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_closed_after_every_message_misses_nothing() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let relay = Relay::start(&etcd.endpoint(0).unwrap()).await;
    let registry = Registry::connect([relay.address.to_string()])
        .await
        .unwrap();
    let lease = by_hand
        .lease_client()
        .grant(3_600, None)
        .await
        .unwrap()
        .id();
    for compact in [false, true] {
        let mut kv = by_hand.kv_client();
        let mut write = async |value: &str| {
            let leased = etcd_client::PutOptions::new().with_lease(lease);
            kv.put("/gRPC/greeter/~~", value, Some(leased))
                .await
                .unwrap();
        };
        write("127.0.0.1:1").await;
        let resolver = registry.resolver("greeter").start();
        resolver.ready().await;
        // If the watch is already open, it delivers the next change, and the relay then ends it. If the resolver is still opening the
        // watch, the relay refuses it. In both cases, no watch is open during the backlog.
        relay.refuse_watches(true);
        write("127.0.0.1:2").await;
        eventually(
            "the change is received or the resolver is `Stale`",
            async || {
                resolver.status().state == ResolverState::Stale
                    || addresses(&resolver) == ["127.0.0.1:2"]
            },
        )
        .await;
        let (cuts, before) = (relay.cuts(), resolver.status());
        let revision = backlog(&by_hand, lease, compact).await;
        relay.refuse_watches(false);
        let listed = list(&by_hand, "/gRPC/greeter/").await;
        let mut expected: Vec<_> = listed.into_iter().map(|(_, value, _)| value).collect();
        expected.sort();
        expected.dedup();
        // The relay ends each watch after one message with events. The resolver opens the watch again after a backoff of up to 5 s.
        within(Duration::from_secs(90), "the set is exact", async || {
            let mut known = addresses(&resolver);
            known.sort();
            known == expected
                && resolver
                    .status()
                    .revision
                    .is_some_and(|known| known.get() >= revision)
        })
        .await;
        let status = resolver.status();
        let (cuts, lists) = (relay.cuts() - cuts, status.lists - before.lists);
        println!("{cuts} watches ended, {lists} lists");
        if compact {
            assert_eq!(lists, 1, "a compaction must cause one list");
        } else {
            // One message contains at most a thousand revisions, so the backlog needs several messages.
            assert!(cuts > 2, "the resolver caught up in only {cuts} messages");
            assert_eq!(lists, 0, "the watch must be resumed without a list");
        }
    }
}

/// Registers one more instance through the healthy members, waits until the resolver contains it, and deregisters it.
async fn change_arrives(fleet: &Fleet, etcd: &Etcd, bad: usize, port: u16) {
    let well = (0..etcd.members()).filter(|member| *member != bad);
    let well: Vec<_> = well.map(|member| etcd.endpoint(member).unwrap()).collect();
    let address = format!("127.0.0.1:{port}");
    let start = Instant::now();
    let mut registry = None;
    eventually("a leader is elected", async || {
        registry = Registry::connect(well.clone()).await.ok();
        registry.is_some()
    })
    .await;
    let registering = registry.unwrap().registration_at("/gRPC/greeter/change");
    // Another election may delay the deregistration.
    let registering = registering.address(&address).deregister_timeout(SOON);
    let registration = registering.register().await.unwrap();
    let took = within(
        Duration::from_secs(15),
        "the change is applied",
        async || addresses(&fleet.resolver).contains(&address),
    )
    .await;
    let since = Instant::now().saturating_duration_since(start);
    println!(
        "member {bad} has failed: the change arrived {took:?} after its write, {since:?} after the fault"
    );
    registration.deregister().await.unwrap();
}

/// Returns how often keys of a fleet were deleted, according to a healthy member.
async fn lost(fleet: &Fleet, etcd: &Etcd, bad: usize) -> usize {
    let well = (bad + 1) % etcd.members();
    let by_hand = etcd_client::Client::connect([etcd.endpoint(well).unwrap()], None).await;
    deletions(&by_hand.unwrap(), &fleet.keys).await
}

/// The leader is killed. Then each member in turn is frozen, and then each member in turn is isolated. So each kind of fault also affects
/// the leader. The freezes and the isolations also affect the members to which the resolver and the registrations are connected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_frozen_or_isolated_member_loses_no_key_and_fails_no_call() {
    let starting = Etcd::builder().members(3).partitionable().start();
    let mut etcd = starting.await.unwrap();
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    // The TTL is longer than each freeze. Otherwise, a thawed leader could revoke leases that were renewed during the freeze, as in the
    // next test.
    let fleet = Fleet::start(&registry, 3, Duration::from_secs(30)).await;
    let callers = fleet.callers();

    let killed = leader(&etcd).await;
    etcd.kill(killed).await.unwrap();
    change_arrives(&fleet, &etcd, killed, 1).await;
    etcd.restart(killed).await.unwrap();

    for member in 0..3 {
        etcd.freeze(member).await.unwrap();
        change_arrives(&fleet, &etcd, member, 2).await;
        etcd.thaw(member).await.unwrap();
    }
    for member in 0..3 {
        leader(&etcd).await;
        eventually("the member is isolated", async || {
            etcd.isolate(member).await.is_ok()
        })
        .await;
        change_arrives(&fleet, &etcd, member, 3).await;
        etcd.rejoin(member).unwrap();
    }
    callers.none_failed().await;
    eventually("the last additional instance is removed", async || {
        fleet.resolver.instances().len() == 3
    })
    .await;
    // Reads the history of member 0, because member 2 was cut off last and may still be catching up.
    assert_eq!(lost(&fleet, &etcd, 2).await, 0, "keys were deleted");
}

/// The leader is frozen for longer than the TTL, and no key is lost in this time. After the thaw, etcd may revoke leases: for a moment, the
/// old leader still acts as the leader, and revokes the leases whose renewals it has not received. The registrations then put their keys
/// back. Measured with `etcdctl` alone on etcd 3.7.3: a lease of 5 s was revoked 30 ms after the thaw, 0.3 s after its last renewal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_key_is_lost_while_a_leader_is_frozen_for_longer_than_the_ttl() {
    let mut etcd = Etcd::start_cluster(3).await.unwrap();
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let ttl = Duration::from_secs(8);
    let fleet = Fleet::start(&registry, 3, ttl).await;
    let callers = fleet.callers();
    let frozen = leader(&etcd).await;
    etcd.freeze(frozen).await.unwrap();
    change_arrives(&fleet, &etcd, frozen, 1).await;
    sleep(span(12, 60)).await;
    let lost_while_frozen = lost(&fleet, &etcd, frozen).await;
    assert_eq!(lost_while_frozen, 0, "keys were deleted");
    etcd.thaw(frozen).await.unwrap();
    sleep(Duration::from_secs(5)).await;
    let lost = lost(&fleet, &etcd, frozen).await;
    println!("{lost} keys were revoked by the thawed leader");
    eventually("all servers are registered", async || {
        fleet.resolver.instances().len() == 3 && fleet.resolver.status().held == 0
    })
    .await;
    callers.none_failed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_removed_by_hand_are_restored_and_fail_no_call() {
    let etcd = etcd().await;
    let ttl = Duration::from_secs(10);
    let fleet = Fleet::start(&registry(&etcd).await, 4, ttl).await;
    let by_hand = client(&etcd).await;
    let callers = fleet.callers();
    for (round, instance) in fleet.resolver.instances().iter().enumerate() {
        let key = instance.location().unwrap().key();
        if round % 2 == 0 {
            by_hand.kv_client().delete(key, None).await.unwrap();
        } else {
            let lease = list(&by_hand, key).await[0].2;
            by_hand.lease_client().revoke(lease).await.unwrap();
        }
        within(ttl, "the key is restored", async || {
            list(&by_hand, "/gRPC/greeter/").await.len() == 4
        })
        .await;
    }
    callers.none_failed().await;
}

/// Starts the `register` example as a separate process and returns it with its output.
async fn register(etcd: &Etcd, key: &str, address: &str) -> (Child, Output) {
    let mut child = example("register")
        .args([key, address])
        .env("ETCD_ENDPOINTS", etcd.endpoint(0).unwrap())
        .spawn()
        .unwrap();
    let mut printed = lines(&mut child);
    line_with(&mut printed, "is registered as").await;
    (child, printed)
}

#[tokio::test]
async fn a_server_frozen_past_its_ttl_does_not_take_its_key_back() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let (key, address) = ("/gRPC/greeter/a", "127.0.0.1:80");
    let (old, mut old_says) = register(&etcd, key, address).await;
    line_with(&mut old_says, "registered under lease").await;
    signal(&old, Signal::SIGSTOP);
    eventually("the lease has expired", async || {
        list(&by_hand, key).await.is_empty()
    })
    .await;
    let (new, mut new_says) = register(&etcd, key, address).await;
    let lease = list(&by_hand, key).await[0].2;
    signal(&old, Signal::SIGCONT);
    line_with(&mut old_says, "another server has the key").await;
    // The first line is the current state. The other five are renewals, which together take longer than the TTL of 5 s.
    for _ in 0..6 {
        line_with(&mut new_says, "registered under lease").await;
        let listed = list(&by_hand, key).await;
        assert!(
            matches!(&listed[..], [(_, _, now)] if *now == lease),
            "{listed:?}"
        );
    }
    for mut server in [old, new] {
        signal(&server, Signal::SIGINT);
        timeout(SOON, server.wait()).await.unwrap().unwrap();
    }
    assert!(list(&by_hand, key).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unrelated_writes_cause_no_list_and_no_new_watch() {
    // The long timeouts prevent an election, which would end the watches.
    let etcd = Etcd::builder().members(3).arg("--heartbeat-interval=500");
    let etcd = etcd.arg("--election-timeout=5000").start().await.unwrap();
    let by_hand = client(&etcd).await;
    // Resolvers of one registry would share a watch.
    let mut resolvers = Vec::new();
    for _ in 0..4 {
        let registry = Registry::connect(etcd.endpoints()).await.unwrap();
        resolvers.push(registry.resolver("greeter").start());
    }
    for resolver in &resolvers {
        resolver.ready().await;
    }
    let end = Instant::now() + span(8, 180);
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..8 {
        let mut kv = by_hand.kv_client();
        tasks.spawn(async move {
            let mut writes = 0_u32;
            while Instant::now() < end {
                let put = kv.put(format!("/other/{writer}"), "", None).await;
                writes += u32::from(put.is_ok());
            }
            writes
        });
    }
    let writes: u32 = tasks.join_all().await.into_iter().sum();
    println!("{writes} unrelated writes");
    by_hand
        .kv_client()
        .put("/gRPC/greeter/1", "127.0.0.1:1", None)
        .await
        .unwrap();
    for resolver in &resolvers {
        knows(resolver, &["127.0.0.1:1"]).await;
        let status = resolver.status();
        assert_eq!(
            (status.lists, status.watches, status.state),
            (1, 1, ResolverState::Fresh)
        );
    }
}
