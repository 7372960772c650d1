//! Many services in one process, and many clients of one etcd.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use support::greeter::greeter_client::GreeterClient;
use support::roles::{protect, user_at};
use support::{all_ready, client, registry, within};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic_etcd::resolver::{ResolverHandle, ResolverState};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, Instance, Registry, Resolver};

/// Returns the time since `start`.
fn since(start: Instant) -> Duration {
    Instant::now().saturating_duration_since(start)
}

/// Returns the number of resolvers that are `Fresh` and have exactly one instance.
fn fresh(resolvers: &[Resolver]) -> usize {
    let is_fresh = |resolver: &&Resolver| {
        resolver.status().state == ResolverState::Fresh && resolver.instances().len() == 1
    };
    resolvers.iter().filter(is_fresh).count()
}

/// A server or a proxy may limit the number of streams of a connection. If each service had a watch stream of its own, no stream would be
/// free, and a registration on the same registry would wait for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_services_are_watched_within_a_limit_of_a_hundred_streams() {
    const SERVICES: usize = 1_000;
    let builder = Etcd::builder().arg("--max-concurrent-streams=100");
    let etcd = builder.start().await.unwrap();
    let mut kv = client(&etcd).await.kv_client();
    for service in 0..SERVICES {
        let key = format!("/gRPC/service{service}/a");
        kv.put(key, "10.0.0.5:80", None).await.unwrap();
    }
    let registry = registry(&etcd).await;
    let start = Instant::now();
    let watch = |service| registry.resolver(format!("service{service}")).start();
    let resolvers: Vec<_> = (0..SERVICES).map(watch).collect();
    within(Duration::from_secs(10), "all are `Fresh`", async || {
        fresh(&resolvers) == SERVICES
    })
    .await;
    println!("{SERVICES} resolvers are `Fresh` after {:?}", since(start));
    let start = Instant::now();
    let registration = registry.registration("greeter").address("127.0.0.1:80");
    let registration = registration.register().await.unwrap();
    println!("registered in {:?}", since(start));
    assert!(since(start) < Duration::from_secs(5));
    // Each resolver receives the events of its own service, and no other events.
    for service in [0, 1, SERVICES - 1] {
        let key = format!("/gRPC/service{service}/b");
        kv.put(key, "10.0.0.6:80", None).await.unwrap();
    }
    within(
        Duration::from_secs(5),
        "the three events are received",
        async || fresh(&resolvers) == SERVICES - 3,
    )
    .await;
    drop(registration);
}

/// The watches of a registry share few streams. Many events of one watch must not delay the events of another watch, and the end of one
/// watch must not end the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flooded_prefix_does_not_delay_others() {
    let etcd = support::etcd().await;
    let registry = registry(&etcd).await;
    let flooded = registry.resolver("flooded").start();
    let quiet = registry.resolver("quiet").start();
    let dropped = registry.resolver("dropped").start();
    for resolver in [&flooded, &quiet, &dropped] {
        resolver.ready().await;
    }
    drop(dropped);
    let mut kv = client(&etcd).await.kv_client();
    let mut writers = JoinSet::new();
    for writer in 0..8 {
        let mut kv = client(&etcd).await.kv_client();
        writers.spawn(async move {
            for number in 0.. {
                let key = format!("/gRPC/flooded/{writer}-{}", number % 100);
                let value = format!("10.0.{writer}.{}:80", number % 100);
                kv.put(key, value, None).await.unwrap();
            }
        });
    }
    let mut slowest = Duration::ZERO;
    for round in 1..=20 {
        let start = Instant::now();
        let address = format!("10.0.0.5:{round}");
        kv.put("/gRPC/quiet/a", address.as_str(), None)
            .await
            .unwrap();
        within(
            Duration::from_secs(5),
            "the quiet service receives its event",
            async || support::addresses(&quiet) == [address.clone()],
        )
        .await;
        slowest = slowest.max(since(start));
    }
    println!(
        "the slowest event took {slowest:?} with {} instances",
        flooded.instances().len()
    );
    writers.shutdown().await;
    assert_eq!(quiet.status().watches, 1, "the watch was opened again");
}

/// etcd loses simple tokens when it restarts. For each exchange of a password for a token, etcd computes a password hash, which takes 50 to
/// 130 ms. Two exchanges per client must be enough for all clients to recover.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_recovers_from_a_restart_within_two_password_hashes_per_client() {
    let clients = support::soak("clients with a password", 150, 500);
    let mut etcd = support::etcd().await;
    protect(&etcd).await;
    let mut resolvers = Vec::new();
    let first = Instant::now();
    for _ in 0..clients {
        let registry = user_at(etcd.endpoints(), "reader").await.unwrap();
        let resolver = registry.resolver("greeter").start();
        resolver.ready().await;
        resolvers.push((registry, resolver));
    }
    // The clients connected one after the other, and etcd computed one hash for each.
    let hash = since(first) / u32::try_from(clients).unwrap();
    etcd.stop(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    let start = Instant::now();
    let bound = hash * u32::try_from(clients).unwrap() * 2 + Duration::from_secs(10);
    let back = within(bound, "all clients have recovered", async || {
        let is_fresh =
            |(_, resolver): &(_, Resolver)| resolver.status().state == ResolverState::Fresh;
        resolvers.iter().all(is_fresh)
    })
    .await;
    println!(
        "{clients} clients recovered after {back:?} ({:?} since the restart); a hash and a read take {hash:?}",
        since(start)
    );
}

/// A client that starts during an outage of etcd uses the servers in the cache file that its last run has written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_without_etcd_serves_calls_from_the_cache_and_the_first_list_replaces_it() {
    let mut etcd = support::etcd().await;
    let (address, _server) = support::greeter("cached").await;
    let mut kv = client(&etcd).await.kv_client();
    let key = "/gRPC/greeter/a";
    kv.put(key, address.to_string(), None).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let members = etcd.endpoints();
    let lazily = || {
        let registry = Registry::builder(members.clone()).connect_lazy().unwrap();
        registry
            .channel("greeter")
            .map_source(|resolver| resolver.cache_dir(folder.path()))
            .connect_lazy()
    };
    let say = async |channel: &BalancedChannel| {
        let mut request = tonic::Request::new(support::hello());
        request.set_timeout(Duration::from_secs(5));
        let mut client = GreeterClient::new(channel.clone());
        client.say_hello(request).await
    };
    let channel = lazily();
    say(&channel).await.unwrap();
    let files = || std::fs::read_dir(folder.path()).unwrap().count();
    within(Duration::from_secs(5), "the cache is written", async || {
        files() == 1
    })
    .await;
    drop(channel);

    etcd.stop(0).await.unwrap();
    let start = Instant::now();
    let channel = lazily();
    say(&channel).await.unwrap();
    println!("the first call without etcd took {:?}", since(start));
    assert!(since(start) < Duration::from_secs(2));
    drop(channel);

    // An invalid cache file is ignored.
    let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap();
    let file = file.unwrap().path();
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, &good[..good.len() / 2]).unwrap();
    let channel = lazily();
    let mut request = tonic::Request::new(support::hello());
    request.set_timeout(Duration::from_millis(500));
    let mut client_of = GreeterClient::new(channel.clone());
    client_of
        .say_hello(request)
        .await
        .expect_err("a call without a known server must fail");

    // The first list of etcd replaces the instances from the cache.
    std::fs::write(&file, &good).unwrap();
    let registry = Registry::builder(etcd.endpoints()).connect_lazy().unwrap();
    let resolver = registry
        .resolver("greeter")
        .cache_dir(folder.path())
        .start();
    within(Duration::from_secs(2), "the cache is used", async || {
        resolver.status().cached == 1
    })
    .await;
    assert_eq!(resolver.status().state, ResolverState::Stale);
    etcd.restart(0).await.unwrap();
    let mut kv = client(&etcd).await.kv_client();
    kv.put(key, "10.0.0.9:80", None).await.unwrap();
    within(
        Duration::from_secs(10),
        "the list replaces the cached instances",
        async || {
            let status = resolver.status();
            status.state == ResolverState::Fresh
                && status.cached == 0
                && support::addresses(&resolver) == ["10.0.0.9:80"]
        },
    )
    .await;
}

/// A client starts with two seeds while etcd does not respond. Then etcd answers with an empty list, for example because its data was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_first_list_does_not_drop_the_servers_in_use() {
    let mut etcd = support::etcd().await;
    let (one, _one) = support::greeter("one").await;
    let (other, _other) = support::greeter("other").await;
    let seeds = [one, other].map(|address| Instance::new(address.try_into().unwrap()));
    etcd.freeze(0).await.unwrap();
    let registry = Registry::builder(etcd.endpoints()).connect_lazy().unwrap();
    let channel = registry
        .channel("greeter")
        .map_source(|resolver| resolver.seeds(seeds.clone()))
        .connect_lazy();
    let say = async || {
        let mut request = tonic::Request::new(support::hello());
        request.set_timeout(Duration::from_secs(5));
        let mut client = GreeterClient::new(channel.clone());
        client.say_hello(request).await
    };
    all_ready(&channel, 2).await;
    say().await.unwrap();
    etcd.thaw(0).await.unwrap();
    let handle = channel.source_handle::<ResolverHandle>().unwrap();
    within(
        Duration::from_secs(15),
        "the list is complete",
        async || handle.status().state == ResolverState::Fresh,
    )
    .await;
    // The empty list removes both instances. The resolver then holds half of the set: one instance stays in the set as a last resort.
    assert_eq!((handle.status().cached, handle.status().held), (0, 1));
    for _ in 0..10 {
        say().await.unwrap();
    }
}

/// `etcd grpc-proxy` assigns the watch ids itself, and answers requests for watches in any order. If the resolver confused two watches,
/// calls would be sent to the wrong service.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_through_etcds_own_proxy_receive_their_own_events() {
    const SERVICES: u8 = 40;
    let etcd = support::etcd().await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    let binary = std::env::var_os("ETCD_BIN").unwrap_or_else(|| "etcd".into());
    let _proxy = tokio::process::Command::new(binary)
        .args([
            "grpc-proxy",
            "start",
            "--endpoints",
            &etcd.endpoint(0).unwrap(),
        ])
        .args(["--listen-addr", &address])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut kv = client(&etcd).await.kv_client();
    for service in 0..SERVICES {
        let key = format!("/gRPC/service{service}/a");
        kv.put(key, format!("10.0.{service}.1:80"), None)
            .await
            .unwrap();
    }
    let mut registry = None;
    within(Duration::from_secs(10), "the proxy serves", async || {
        registry = Registry::connect([address.clone()]).await.ok();
        registry.is_some()
    })
    .await;
    let registry = registry.unwrap();
    let watch = |service| registry.resolver(format!("service{service}")).start();
    let resolvers: Vec<_> = (0..SERVICES).map(watch).collect();
    let have = |number: usize| {
        (0..SERVICES).zip(&resolvers).all(|(service, resolver)| {
            let own = format!("10.0.{service}.");
            let addresses = support::addresses(resolver);
            let is_own = |address: &String| address.starts_with(&own);
            assert!(addresses.iter().all(is_own), "{service}: {addresses:?}");
            let is_fresh = resolver.status().state == ResolverState::Fresh;
            is_fresh && addresses.len() == number
        })
    };
    within(Duration::from_secs(10), "all are listed", async || have(1)).await;
    for service in 0..SERVICES {
        let key = format!("/gRPC/service{service}/b");
        kv.put(key, format!("10.0.{service}.2:80"), None)
            .await
            .unwrap();
    }
    within(
        Duration::from_secs(10),
        "each resolver has received its event",
        async || have(2),
    )
    .await;
    let lists: u64 = resolvers
        .iter()
        .map(|resolver| resolver.status().lists)
        .sum();
    assert_eq!(
        lists,
        u64::from(SERVICES),
        "the watches must deliver the events, without a further list"
    );
}
