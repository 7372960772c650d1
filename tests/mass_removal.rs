//! All instances are removed from a real etcd while their servers still run. The resolver then holds half of the instances: they stay in
//! its set as a last resort, which the channel uses only while no other endpoint is ready. The hold lasts for a limited time.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use etcd_client::{DeleteOptions, PutOptions};
use support::callers::{Callers, Client, Failed, with_deadline};
use support::greeter::greeter_client::GreeterClient;
use support::proxy::Proxy;
use support::{SOON, all_ready, client, etcd, eventually, greeter, hello, knows, registry};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, Instance, Registry, Resolver};

const PREFIX: &str = "/gRPC/greeter/";
/// Duration of the hold. It is short, so that the tests stay quick.
const HOLD: Duration = Duration::from_secs(4);
const SERVERS: usize = 4;

/// Starts callers that pause between calls, so that parallel tests of this file get CPU time.
fn callers(channel: &BalancedChannel) -> Callers {
    Callers::making(channel, 8, async |mut client: Client| {
        client.say_hello(with_deadline(hello())).await?;
        sleep(Duration::from_millis(2)).await;
        Ok(())
    })
}

/// Waits for the first failed call and stops the callers. Asserts that no call failed before `until`, and that the errors name the service.
async fn failed_only_after(mut callers: Callers, until: Instant) {
    let mut failed = Vec::new();
    eventually("calls fail after the hold", async || {
        failed.extend(callers.failed());
        !failed.is_empty()
    })
    .await;
    let (calls, last) = callers.stopped().await;
    failed.extend(last);
    let first = failed.first().expect("a call has failed");
    assert!(
        first.ended >= until,
        "one of {calls} calls failed {:?} before the end of the hold: {:?}",
        until.saturating_duration_since(first.ended),
        first.status
    );
    for Failed { status, .. } in &failed {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains("greeter"), "{status:?}");
    }
    assert!(calls > 500, "{calls}");
}

/// Servers that are registered by hand, each under its own lease. They do not detect the deletion of their keys.
struct Fleet {
    addresses: Vec<SocketAddr>,
    leases: Vec<i64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Fleet {
    async fn start(etcd: &Etcd) -> Self {
        let mut by_hand = client(etcd).await;
        let (mut addresses, mut leases, mut tasks) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..SERVERS {
            let (address, task) = greeter(&number.to_string()).await;
            let lease = by_hand.lease_grant(600, None).await.unwrap().id();
            let options = PutOptions::new().with_lease(lease);
            let key = format!("{PREFIX}{number}");
            by_hand
                .put(key, address.to_string(), Some(options))
                .await
                .unwrap();
            addresses.push(address);
            leases.push(lease);
            tasks.push(task);
        }
        Self {
            addresses,
            leases,
            tasks,
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Returns a resolver with a short hold, and a channel over it with all servers ready.
async fn watched(registry: &Registry) -> (Resolver, BalancedChannel) {
    let resolver = registry
        .resolver("greeter")
        .mass_removal_protection(Some(HOLD))
        .start();
    let channel = BalancedChannel::builder()
        .source(resolver.clone())
        .connect_lazy();
    all_ready(&channel, SERVERS).await;
    (resolver, channel)
}

async fn delete_all(etcd: &Etcd) {
    let mut by_hand = client(etcd).await;
    let options = DeleteOptions::new().with_prefix();
    let response = by_hand.delete(PREFIX, Some(options)).await.unwrap();
    assert_eq!(response.deleted(), i64::try_from(SERVERS).unwrap());
}

/// Waits until half of the instances are held and the others are removed.
async fn half_is_held(resolver: &Resolver) {
    eventually("half of the instances are held", async || {
        let (instances, status) = (resolver.instances(), resolver.status());
        let held = instances.len() == SERVERS / 2 && instances.iter().all(Instance::is_last_resort);
        // The status is updated after the set.
        held && (status.held, status.mass_removals) == (SERVERS / 2, 1)
    })
    .await;
}

async fn none_is_left(resolver: &Resolver) {
    eventually("the hold has ended", async || {
        resolver.instances().is_empty() && resolver.status().held == 0
    })
    .await;
    assert_eq!(resolver.status().mass_removals, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_of_the_whole_prefix_fails_no_call_during_the_hold() {
    let etcd = etcd().await;
    let _fleet = Fleet::start(&etcd).await;
    let (resolver, channel) = watched(&registry(&etcd).await).await;
    let callers = callers(&channel);
    let lost = Instant::now();
    delete_all(&etcd).await;
    half_is_held(&resolver).await;
    eventually("the endpoints are a last resort", async || {
        let endpoints = channel.endpoints();
        endpoints.len() == SERVERS / 2 && endpoints.iter().all(|endpoint| endpoint.last_resort)
    })
    .await;
    none_is_left(&resolver).await;
    failed_only_after(callers, lost + HOLD).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_during_the_hold_after_leases_are_revoked_one_by_one() {
    let etcd = etcd().await;
    let fleet = Fleet::start(&etcd).await;
    let (resolver, channel) = watched(&registry(&etcd).await).await;
    let callers = callers(&channel);
    let mut by_hand = client(&etcd).await;
    let mut lost = Instant::now();
    for lease in &fleet.leases {
        // The pause is short, so that the first held instance is still held when the last lease is revoked.
        sleep(Duration::from_millis(300)).await;
        lost = Instant::now();
        by_hand.lease_revoke(*lease).await.unwrap();
    }
    half_is_held(&resolver).await;
    none_is_left(&resolver).await;
    failed_only_after(callers, lost + HOLD).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_during_the_hold_if_the_removal_is_found_after_a_partition() {
    let etcd = etcd().await;
    let _fleet = Fleet::start(&etcd).await;
    let proxy = Proxy::start("127.0.0.1:0", etcd.endpoint(0).unwrap()).await;
    let registry = Registry::connect([proxy.address.to_string()])
        .await
        .unwrap();
    let (resolver, channel) = watched(&registry).await;
    let callers = callers(&channel);
    proxy.cut();
    delete_all(&etcd).await;
    // The history is compacted too. So the watch cannot deliver the removal, and only a list can detect it.
    let mut by_hand = client(&etcd).await;
    let revision = by_hand.put("/other", "", None).await.unwrap();
    let revision = revision.header().unwrap().revision();
    by_hand.compact(revision, None).await.unwrap();
    let found = Instant::now();
    proxy.heal();
    half_is_held(&resolver).await;
    assert_eq!(
        resolver.status().lists,
        2,
        "a second list must find the removal"
    );
    none_is_left(&resolver).await;
    failed_only_after(callers, found + HOLD).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_default_the_hold_lasts_thirty_seconds() {
    const DEFAULT: Duration = Duration::from_secs(30);
    let etcd = etcd().await;
    let _fleet = Fleet::start(&etcd).await;
    let channel = registry(&etcd).await.channel("greeter").connect().await;
    let channel = channel.unwrap();
    all_ready(&channel, SERVERS).await;
    let mut client = GreeterClient::new(channel.clone());
    let lost = Instant::now();
    delete_all(&etcd).await;
    let failed = loop {
        if let Err(status) = client.say_hello(hello()).await {
            break status;
        }
        assert!(
            Instant::now() < lost + DEFAULT + Duration::from_secs(5),
            "the hold has not ended"
        );
        sleep(Duration::from_millis(50)).await;
    };
    let lasted = Instant::now().saturating_duration_since(lost);
    assert!(lasted >= DEFAULT, "{lasted:?}: {failed:?}");
    assert_eq!(failed.code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_that_are_paused_or_deregistered_are_not_held() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let mut registrations = Vec::new();
    let mut servers = Vec::new();
    for number in 0..SERVERS {
        let (address, task) = greeter(&number.to_string()).await;
        let registration = registry
            .registration("greeter")
            .address(address.to_string());
        registrations.push(registration.register().await.unwrap());
        servers.push(task);
    }
    let (resolver, channel) = watched(&registry).await;
    for registration in &registrations {
        registration.pause().await.unwrap();
    }
    let start = Instant::now();
    knows(&resolver, &[]).await;
    assert!(Instant::now().saturating_duration_since(start) < HOLD);
    assert_eq!(resolver.status().mass_removals, 0);
    let mut client = GreeterClient::new(channel);
    eventually("calls fail at once", async || {
        let refused = client.say_hello(hello()).await;
        refused.is_err_and(|status| status.code() == Code::Unavailable)
    })
    .await;
    // Resumed instances get calls again. A deregistration is a planned removal like a pause, so they are not held after it either.
    for registration in &registrations {
        registration.resume().await.unwrap();
    }
    eventually("all servers are registered again", async || {
        resolver.instances().len() == SERVERS
    })
    .await;
    client.say_hello(hello()).await.unwrap();
    for registration in registrations {
        registration.deregister().await.unwrap();
    }
    knows(&resolver, &[]).await;
    assert_eq!(resolver.status().mass_removals, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_after_etcd_is_wiped() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    let mut registrations = Vec::new();
    let mut addresses = Vec::new();
    for number in 0..SERVERS {
        let (address, _server) = greeter(&number.to_string()).await;
        let registration = registry
            .registration("greeter")
            .address(address.to_string())
            .ttl(Duration::from_secs(5));
        registrations.push(registration.register().await.unwrap());
        addresses.push(address.to_string());
    }
    let resolver = registry.resolver("greeter").start();
    let channel = BalancedChannel::builder()
        .source(resolver.clone())
        .connect_lazy();
    all_ready(&channel, SERVERS).await;
    let callers = callers(&channel);
    etcd.kill(0).await.unwrap();
    etcd.wipe(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    eventually("every server is registered again", async || {
        let instances = resolver.instances();
        let fresh = |instance: &Instance| !instance.is_last_resort();
        resolver.status().lists > 1 && instances.len() == SERVERS && instances.iter().all(fresh)
    })
    .await;
    knows(
        &resolver,
        &addresses.iter().map(String::as_str).collect::<Vec<_>>(),
    )
    .await;
    let (calls, failed) = callers.stopped().await;
    assert!(
        failed.is_empty(),
        "calls failed ({calls} in total): {:?}",
        failed.first()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_return_of_half_of_the_set_ends_the_hold() {
    let etcd = etcd().await;
    let fleet = Fleet::start(&etcd).await;
    let registry = registry(&etcd).await;
    // The default hold is too long to expire within the test.
    let resolver = registry.resolver("greeter").start();
    let channel = BalancedChannel::builder()
        .source(resolver.clone())
        .connect_lazy();
    all_ready(&channel, SERVERS).await;
    let callers = callers(&channel);
    delete_all(&etcd).await;
    half_is_held(&resolver).await;
    let mut by_hand = client(&etcd).await;
    let mut back = Vec::new();
    for address in &fleet.addresses[..SERVERS / 2] {
        let address = address.to_string();
        let key = format!("{PREFIX}again-{address}");
        by_hand.put(key, address.clone(), None).await.unwrap();
        back.push(address);
    }
    // The servers return under other keys. The resolver identifies instances by address, so the keys do not matter.
    knows(
        &resolver,
        &back.iter().map(String::as_str).collect::<Vec<_>>(),
    )
    .await;
    // If the held instances have the same addresses as the new keys, the wait above may end while they are still held.
    eventually("no instance is held", async || resolver.status().held == 0).await;
    assert!(!resolver.instances().iter().any(Instance::is_last_resort));
    let (calls, failed) = callers.stopped().await;
    assert!(
        failed.is_empty(),
        "calls failed ({calls} in total): {:?}",
        failed.first()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_hold_an_instance_is_removed_with_its_key() {
    let etcd = etcd().await;
    let _fleet = Fleet::start(&etcd).await;
    let registry = registry(&etcd).await;
    let channel = registry
        .channel("greeter")
        .map_source(|resolver| resolver.mass_removal_protection(None))
        .connect()
        .await
        .unwrap();
    all_ready(&channel, SERVERS).await;
    delete_all(&etcd).await;
    eventually("no endpoint is left", async || {
        channel.endpoints().is_empty()
    })
    .await;
    let refused = GreeterClient::new(channel).say_hello(hello()).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tonic_channel_keeps_held_instances_while_no_other_is_registered() {
    let etcd = etcd().await;
    let _fleet = Fleet::start(&etcd).await;
    let resolver = registry(&etcd)
        .await
        .resolver("greeter")
        .mass_removal_protection(Some(HOLD))
        .start();
    let mut client = GreeterClient::new(resolver.clone().into_tonic_channel());
    let mut served = std::collections::HashSet::new();
    eventually("every server is connected", async || {
        let reply = client.say_hello(hello()).await.unwrap();
        served.insert(reply.into_inner().message);
        served.len() == SERVERS
    })
    .await;
    let lost = Instant::now();
    delete_all(&etcd).await;
    half_is_held(&resolver).await;
    while Instant::now() < lost + HOLD - Duration::from_secs(1) {
        let call = timeout(SOON, client.say_hello(hello())).await;
        call.expect("the call ends in time").unwrap();
    }
    none_is_left(&resolver).await;
    eventually("no endpoint receives calls", async || {
        timeout(Duration::from_millis(200), client.say_hello(hello()))
            .await
            .is_err()
    })
    .await;
}
