//! Failures of etcd under one process that serves and calls 300 services. No call fails, and afterwards each resolver has exactly the
//! registered servers again.
//!
//! `tests/faults.rs` has similar failures with one service. With many services, the watches share streams, the registrations share
//! connections, and all interrupted watches and renewals start again at the same time.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a failed step is a failed test, and figures are printed"
)]

mod support;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use etcd_client::{DeleteOptions, PutOptions, Txn, TxnOp};
use support::callers::with_deadline;
use support::greeter::greeter_client::GreeterClient;
use support::roles::{protect, user};
use support::{client, eventually, hello, leader, registry, within};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tonic::Status;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, Registration, Registry, Resolver, resolver::ResolverState};

const SERVICES: usize = 300;
const TTL: Duration = Duration::from_secs(10);

/// The prefix of all services. The roles that `protect` creates permit only keys under this prefix.
const PREFIX: &str = "/gRPC/greeter/";

fn name(service: usize) -> String {
    format!("service{service:03}")
}

/// Two servers in this process, which both serve all services, and a resolver and a channel for each service.
struct Process {
    servers: [SocketAddr; 2],
    _tasks: [JoinHandle<()>; 2],
    registrations: Vec<Registration>,
    resolvers: Vec<Resolver>,
    channels: Vec<BalancedChannel>,
}

impl Process {
    /// The first server registers all services under one lease. For the second server, each service has a registration and a lease of its
    /// own.
    async fn start(server: Registry, client: Registry) -> Self {
        let (server, client) = (server.with_prefix(PREFIX), client.with_prefix(PREFIX));
        let (first, one) = support::greeter("one").await;
        let (second, other) = support::greeter("other").await;
        let all = server.registration(name(0)).address(first.to_string());
        let all = (1..SERVICES).fold(all, |builder, service| {
            builder.additional_service(name(service))
        });
        let mut registrations = vec![all.ttl(TTL).register().await.unwrap()];
        let mut registering = tokio::task::JoinSet::new();
        for service in 0..SERVICES {
            let builder = server.registration(name(service));
            let builder = builder.address(second.to_string()).ttl(TTL);
            registering.spawn(async move { builder.register().await.unwrap() });
        }
        registrations.extend(registering.join_all().await);
        let resolver = |service| client.resolver(name(service)).start();
        let channel = |service| client.channel(name(service)).connect_lazy();
        let process = Self {
            servers: [first, second],
            _tasks: [one, other],
            registrations,
            resolvers: (0..SERVICES).map(resolver).collect(),
            channels: (0..SERVICES).map(channel).collect(),
        };
        process.is_exact_within(Duration::from_secs(20)).await;
        process
    }

    /// Returns the number of services whose resolver is `Fresh` and has exactly the two servers. Held instances, which are a last resort,
    /// are not counted.
    fn exact(&self) -> usize {
        let servers: BTreeSet<_> = self.servers.iter().map(ToString::to_string).collect();
        let is_exact = |resolver: &&Resolver| {
            let instances = resolver.instances();
            let known: BTreeSet<_> = instances
                .iter()
                .filter(|instance| !instance.is_last_resort())
                .map(|instance| instance.address().to_string())
                .collect();
            resolver.status().state == ResolverState::Fresh && known == servers
        };
        self.resolvers.iter().filter(is_exact).count()
    }

    async fn is_exact_within(&self, bound: Duration) {
        let end = Instant::now() + bound;
        while Instant::now() < end {
            let registered = |one: &Registration| one.state().is_registered();
            if self.exact() == SERVICES && self.registrations.iter().all(registered) {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
        let exact = self.exact();
        let states = self.registrations.iter().map(Registration::state);
        let unregistered: Vec<_> = states.filter(|state| !state.is_registered()).collect();
        let wrong = self.resolvers.iter().find(|resolver| {
            resolver.status().state != ResolverState::Fresh || resolver.instances().len() != 2
        });
        panic!(
            "{exact} of {SERVICES} sets are exact after {bound:?}, {} registrations are not registered; for example {:?} {:?}",
            unregistered.len(),
            unregistered.first(),
            wrong.map(|resolver| (resolver.status(), resolver.instances()))
        );
    }

    fn callers(&self) -> Callers {
        Callers::start(&self.channels)
    }

    /// Adds an instance to every service, waits until every resolver knows it, and removes it again.
    async fn change_arrives(&self, by_hand: &etcd_client::Client, what: &str) {
        let lease = by_hand.lease_client().grant(600, None).await.unwrap().id();
        let keys: Vec<_> = (0..SERVICES)
            .map(|service| format!("{PREFIX}{}/additional", name(service)))
            .collect();
        for keys in keys.chunks(100) {
            let put = |key: &String| {
                let leased = PutOptions::new().with_lease(lease);
                // An address that refuses connections, like a server that has not started yet.
                TxnOp::put(key.as_str(), "127.0.0.1:1", Some(leased))
            };
            let puts: Vec<_> = keys.iter().map(put).collect();
            let mut kv = by_hand.kv_client();
            kv.txn(Txn::new().and_then(puts)).await.unwrap();
        }
        let knows = |count: usize| {
            let all = self.resolvers.iter();
            all.filter(|resolver| resolver.instances().len() == count)
                .count()
        };
        let took = within(
            Duration::from_secs(15),
            "every resolver knows the change",
            async || knows(3) == SERVICES,
        )
        .await;
        println!("{what}: a change of all {SERVICES} services arrived after {took:?}");
        by_hand.lease_client().revoke(lease).await.unwrap();
        self.is_exact_within(Duration::from_secs(15)).await;
    }
}

/// The number of calls of one caller, and its failed calls with their services.
type Called = (usize, Vec<(usize, Status)>);

/// Callers that call all services in turn. They pause only after a failed call, for 1 ms.
struct Callers {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Called>>,
}

impl Callers {
    fn start(channels: &[BalancedChannel]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let caller = |first: usize| {
            let (channels, stop) = (channels.to_vec(), Arc::clone(&stop));
            tokio::spawn(async move {
                let (mut calls, mut failed) = (0, Vec::new());
                // Together, the two callers call each service at least once.
                while !stop.load(Ordering::Relaxed) || calls < SERVICES / 2 {
                    let service = (first * SERVICES / 2 + calls) % channels.len();
                    let mut client = GreeterClient::new(channels[service].clone());
                    calls += 1;
                    if let Err(status) = client.say_hello(with_deadline(hello())).await {
                        failed.push((service, status));
                        sleep(Duration::from_millis(1)).await;
                    }
                }
                (calls, failed)
            })
        };
        Self {
            tasks: (0..2).map(caller).collect(),
            stop,
        }
    }

    /// Stops the callers. Panics if a call has failed.
    async fn none_failed(self, what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            let (calls, failed) = task.await.unwrap();
            assert!(
                failed.is_empty(),
                "{what}: {} of {calls} calls failed: {:?}",
                failed.len(),
                &failed[..failed.len().min(3)]
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_etcd_is_down_wiped_or_changed_by_hand() {
    let mut etcd = support::etcd().await;
    let process = Process::start(registry(&etcd).await, registry(&etcd).await).await;

    let callers = process.callers();
    etcd.kill(0).await.unwrap();
    sleep(Duration::from_secs(support::soak("seconds", 5, 60))).await;
    etcd.restart(0).await.unwrap();
    process.is_exact_within(TTL * 2).await;
    callers.none_failed("an outage").await;

    // The history is compacted directly after the restart. Watches that have not resumed by then cannot resume, so their services are
    // listed again.
    let callers = process.callers();
    let by_hand = client(&etcd).await;
    etcd.kill(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    let revision = by_hand.kv_client().put("/other", "", None).await.unwrap();
    let revision = revision.header().unwrap().revision();
    by_hand.kv_client().compact(revision, None).await.unwrap();
    process.is_exact_within(TTL * 2).await;
    process.change_arrives(&by_hand, "a compaction").await;
    callers.none_failed("a compaction").await;

    let callers = process.callers();
    etcd.kill(0).await.unwrap();
    etcd.wipe(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    process.is_exact_within(TTL * 4).await;
    let by_hand = client(&etcd).await;
    process
        .change_arrives(&by_hand, "the loss of all data")
        .await;
    callers.none_failed("the loss of all data").await;

    let callers = process.callers();
    let mass_removals = || -> Vec<_> {
        let resolvers = process.resolvers.iter();
        resolvers
            .map(|resolver| resolver.status().mass_removals)
            .collect()
    };
    let before = mass_removals();
    let all = DeleteOptions::new().with_prefix();
    by_hand
        .kv_client()
        .delete("/gRPC/", Some(all))
        .await
        .unwrap();
    within(TTL, "every resolver sees the deletion", async || {
        mass_removals()
            .into_iter()
            .zip(&before)
            .all(|(now, before)| now > *before)
    })
    .await;
    process.is_exact_within(TTL * 2).await;
    callers.none_failed("the deletion of all keys").await;

    // One service gets 5 000 values that cannot be used. The changes of the other services must not be delayed.
    let callers = process.callers();
    let flooded = format!("{PREFIX}{}/", name(7));
    for number in 0..50 {
        let put = |index: usize| {
            let value = "not an address ".repeat(1 + index);
            TxnOp::put(format!("{flooded}x{number}-{index}"), value, None)
        };
        let puts: Vec<_> = (0..100).map(put).collect();
        let written = by_hand.kv_client().txn(Txn::new().and_then(puts)).await;
        written.unwrap();
    }
    process
        .change_arrives(&by_hand, "5 000 unusable values")
        .await;
    assert!(process.resolvers[7].status().rejected_values >= 5_000);
    callers.none_failed("5 000 unusable values").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_a_member_is_dead_frozen_or_isolated() {
    let starting = Etcd::builder().members(3).partitionable().start();
    let mut etcd = starting.await.unwrap();
    let connect = async || Registry::connect(etcd.endpoints()).await.unwrap();
    let process = Process::start(connect().await, connect().await).await;
    let callers = process.callers();
    let other = async |etcd: &Etcd, bad: usize| {
        let endpoint = etcd.endpoint((bad + 1) % 3).unwrap();
        let mut connected = None;
        eventually("a leader is elected", async || {
            connected = etcd_client::Client::connect([&endpoint], None).await.ok();
            match &connected {
                Some(client) => client.kv_client().put("/other", "", None).await.is_ok(),
                None => false,
            }
        })
        .await;
        connected.unwrap()
    };

    let killed = leader(&etcd).await;
    etcd.kill(killed).await.unwrap();
    let by_hand = other(&etcd, killed).await;
    process.change_arrives(&by_hand, "the leader is dead").await;
    etcd.restart(killed).await.unwrap();

    let frozen = leader(&etcd).await;
    etcd.freeze(frozen).await.unwrap();
    let by_hand = other(&etcd, frozen).await;
    process
        .change_arrives(&by_hand, "the leader is frozen")
        .await;
    etcd.thaw(frozen).await.unwrap();

    let isolated = (leader(&etcd).await + 1) % 3;
    etcd.isolate(isolated).await.unwrap();
    let by_hand = other(&etcd, isolated).await;
    process
        .change_arrives(&by_hand, "a member is isolated")
        .await;
    etcd.rejoin(isolated).unwrap();
    process.is_exact_within(TTL * 2).await;
    callers.none_failed("failures of members").await;
}

/// Tokens become invalid when they expire, when a role is added, and when a restart loses them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_tokens_become_invalid() {
    let starting = Etcd::builder().arg("--auth-token-ttl=2").start();
    let mut etcd = starting.await.unwrap();
    protect(&etcd).await;
    let server = user(&etcd, "writer").await.unwrap();
    let reader = user(&etcd, "reader").await.unwrap();
    let process = Process::start(server, reader).await;
    let callers = process.callers();
    // Longer than a token is valid.
    sleep(Duration::from_secs(4)).await;
    let by_hand = support::roles::root(&etcd).await;
    process.change_arrives(&by_hand, "expired tokens").await;
    let mut users = support::roles::root(&etcd).await;
    users.role_add("another").await.unwrap();
    process
        .change_arrives(&by_hand, "the addition of a role")
        .await;
    etcd.kill(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    process.is_exact_within(TTL * 2).await;
    let by_hand = support::roles::root(&etcd).await;
    process
        .change_arrives(&by_hand, "a restart that loses the tokens")
        .await;
    callers.none_failed("invalid tokens").await;
}
