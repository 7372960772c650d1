//! Server processes that are killed one after the other under load. This is the only test of the file, because Cargo runs the tests of one
//! file in parallel.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use support::callers::{Callers, Failed};
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::program::greeter_server;
use support::{SOON, all_ready, etcd, eventually, registry, soak};
use tokio::time::{Instant, timeout};
use tonic::Code;
use tonic_etcd::{
    BalancedChannel,
    channel::{EndpointState, ServedBy},
};

const SERVERS: usize = 4;
const CALLERS: usize = 32;

/// Returns the address of each server by its process ID. A reply contains the process ID, and its extension `ServedBy` contains the
/// address.
async fn locate(channel: &BalancedChannel) -> BTreeMap<u32, String> {
    let mut located = BTreeMap::new();
    let mut client = GreeterClient::new(channel.clone());
    let locating = async {
        while located.len() < SERVERS {
            let response = client.say_hello(HelloRequest::default()).await.unwrap();
            let address = response.extensions().get::<ServedBy>().unwrap();
            let address = address.address().to_string();
            let message = response.into_inner().message;
            let pid = message.rsplit(' ').next().unwrap().parse().unwrap();
            located.insert(pid, address);
        }
    };
    timeout(SOON, locating).await.expect("every server replies");
    located
}

/// Waits until four endpoints are ready, one for each running server. There may be more endpoints, because the keys of killed servers
/// remain for one TTL.
async fn serving(channel: &BalancedChannel) {
    eventually("four endpoints are ready", async || {
        let endpoints = channel.endpoints();
        let ready = endpoints.iter().map(|status| status.state);
        ready.filter(|state| *state == EndpointState::Ready).count() == SERVERS
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_fails_only_the_calls_in_flight_on_the_killed_server() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let mut servers: Vec<_> = (0..SERVERS).map(|_| greeter_server(&etcd)).collect();
    let resolver = registry.resolver(support::SERVICE).start();
    eventually("four servers are registered", async || {
        resolver.instances().len() == SERVERS
    })
    .await;
    let channel = registry.channel(support::SERVICE).connect().await.unwrap();
    all_ready(&channel, SERVERS).await;
    let mut callers = Callers::start(&channel, CALLERS);
    for kill in 0..soak("kills", SERVERS, 400) {
        serving(&channel).await;
        let located = locate(&channel).await;
        let mut victim = servers.remove(0);
        let address = located[&victim.id().unwrap()].clone();
        let failures = callers.failed();
        assert!(
            failures.is_empty(),
            "calls failed before the kill, for example while the new server joined: {failures:?}"
        );
        victim.kill().await.unwrap();
        let of_victim = || {
            let mut statuses = channel.endpoints().into_iter();
            statuses.find(|status| status.address.to_string() == address)
        };
        eventually("the channel detects the kill", async || {
            of_victim().is_none_or(|status| status.state != EndpointState::Ready)
        })
        .await;
        let seen = Instant::now();
        eventually("no call is in flight on the killed server", async || {
            of_victim().is_none_or(|status| status.in_flight == 0)
        })
        .await;
        // The server stays down for one second.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let failures = callers.failed();
        println!("kill {kill}: {} calls failed", failures.len());
        assert!(
            failures.len() <= CALLERS,
            "more calls failed than were in flight"
        );
        for Failed { began, status, .. } in &failures {
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            assert!(
                status.message().contains(&address),
                "the error does not name the killed server {address}: {status}"
            );
            assert!(
                *began <= seen,
                "a call was sent to {address} after its kill was detected"
            );
        }
        servers.push(greeter_server(&etcd));
        serving(&channel).await;
    }
    // The callers continue for one second after the last kill.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let calls = callers.none_failed().await;
    assert!(calls > 1_000, "{calls}");
    for mut server in servers {
        server.kill().await.unwrap();
    }
}
