//! Calls over the balanced channel while real servers and a real etcd start and stop.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use support::callers::Callers;
use support::counting::Counting;
use support::greeter::greeter_client::GreeterClient;
use support::{SOON, etcd, eventually, hello, registry};
use tokio::time::{Instant, timeout};
use tonic::{Code, Status};
use tonic_etcd::{BalancedChannel, Registry};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_graceful_restart_under_load_fails_no_call_and_runs_none_twice() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter").start();
    let counter = Counting::default();
    let start = || {
        let registration = registry.registration("greeter");
        counter.register(registration.grace_period(Duration::from_millis(100)))
    };
    let mut servers: Vec<_> = (0..4).map(|_| start()).collect();
    let all_registered = async || {
        eventually("four servers are registered", async || {
            resolver.instances().len() == 4
        })
        .await;
    };
    all_registered().await;
    let channel = registry.channel("greeter").connect().await.unwrap();
    let callers = Callers::start(&channel, 32);
    for _ in 0..12 {
        servers.remove(0).stopped().await.unwrap();
        servers.push(start());
        all_registered().await;
    }
    let calls = callers.none_failed().await;
    assert_eq!(counter.count(), calls, "each call must run once");
    assert!(calls > 1_000, "{calls}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_that_refuse_connections_or_do_not_respond_fail_no_call() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let counter = Counting::default();
    let _servers: Vec<_> = (0..3)
        .map(|_| counter.register(registry.registration("greeter")))
        .collect();
    let refusing = registry
        .registration("greeter")
        .address("127.0.0.1:1")
        .register()
        .await
        .unwrap();
    // Like a frozen process, this listener accepts connections and never sends a byte.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent
        .local_addr()
        .map(|address| (silent, address.to_string()))
        .unwrap();
    let swallowing = registry
        .registration("greeter")
        .address(silent.1)
        .register()
        .await
        .unwrap();
    let resolver = registry.resolver("greeter").start();
    eventually("five servers are registered", async || {
        resolver.instances().len() == 5
    })
    .await;
    let channel = registry.channel("greeter").connect().await.unwrap();
    let callers = Callers::start(&channel, 8);
    eventually("2000 calls are served", async || counter.count() > 2_000).await;
    callers.none_failed().await;
    refusing.deregister().await.unwrap();
    swallowing.deregister().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_continue_while_etcd_is_down() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    let counter = Counting::default();
    let ttl = Duration::from_secs(4);
    let _servers: Vec<_> = (0..3)
        .map(|_| counter.register(registry.registration("greeter").ttl(ttl)))
        .collect();
    let resolver = registry.resolver("greeter").start();
    eventually("three servers are registered", async || {
        resolver.instances().len() == 3
    })
    .await;
    let channel = registry.channel("greeter").connect().await.unwrap();
    let callers = Callers::start(&channel, 8);
    etcd.kill(0).await.unwrap();
    // The instances must stay for longer than their TTL.
    tokio::time::sleep(ttl * 2).await;
    assert_eq!(resolver.instances().len(), 3);
    etcd.restart(0).await.unwrap();
    eventually("the resolver is `Fresh` again", async || {
        resolver.status().state == tonic_etcd::resolver::ResolverState::Fresh
    })
    .await;
    callers.none_failed().await;
}

/// Sends one call, which must fail within [`SOON`], and returns its status.
async fn refused(channel: &BalancedChannel) -> Status {
    let mut client = GreeterClient::new(channel.clone());
    let call = timeout(SOON, client.say_hello(hello()));
    call.await
        .expect("an answer in time")
        .expect_err("the call must fail")
}

#[tokio::test]
async fn without_a_server_the_error_states_the_cause() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    // While no instance is registered, a call fails at once.
    let empty = registry.channel("greeter").connect_lazy();
    registry.resolver("greeter").start().ready().await;
    eventually("the set is known and empty", async || {
        let start = Instant::now();
        let status = refused(&empty).await;
        let took = Instant::now().saturating_duration_since(start);
        status.code() == Code::Unavailable
            && status.message().contains("greeter")
            && took < Duration::from_millis(100)
    })
    .await;
    assert!(
        registry.channel("greeter").connect().await.is_err(),
        "`connect` must fail too"
    );
    // While every endpoint is down, the error names an endpoint and the cause of its failure.
    let dead = registry
        .registration("greeter")
        .address("127.0.0.1:1")
        .register()
        .await
        .unwrap();
    eventually("the connection was refused", async || {
        let status = refused(&empty).await;
        status.code() == Code::Unavailable
            && status.message().contains("127.0.0.1:1")
            && status.message().contains("refused")
    })
    .await;
    dead.deregister().await.unwrap();
    // If etcd is down when the channel starts, the call fails at the startup timeout.
    etcd.kill(0).await.unwrap();
    let unknown = registry
        .channel("other")
        .startup_timeout(Duration::from_millis(300))
        .connect_lazy();
    let status = refused(&unknown).await;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains("other"), "{status:?}");
}

#[tokio::test]
async fn a_channel_for_an_etcd_target_follows_the_registered_server() {
    let etcd = etcd().await;
    let registry: Registry = registry(&etcd).await;
    let counter = Counting::default();
    let server = counter.register(registry.registration("helloworld.Greeter"));
    let resolver = registry.resolver("helloworld.Greeter").start();
    eventually("the server is registered", async || {
        resolver.instances().len() == 1
    })
    .await;
    let target = format!("etcd://{}/helloworld.Greeter", etcd.endpoint(0).unwrap());
    let channel = tonic_etcd::connect(&target).await.unwrap();
    GreeterClient::new(channel.clone())
        .say_hello(hello())
        .await
        .unwrap();
    let known = channel.endpoints();
    assert_eq!(known.len(), 1);
    server.stopped().await.unwrap();
    eventually("the endpoint is removed", async || {
        channel.endpoints().is_empty()
    })
    .await;
    let nowhere = tonic_etcd::connect("etcd://127.0.0.1:1/helloworld.Greeter").await;
    assert!(nowhere.is_err());
}
