//! What a program can see of a channel and a registration, as data and as text.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use support::{World, all_ready, client, connect, eventually, hello};
use tonic_etcd::BalancedChannel;
use tonic_etcd::channel::{BalancedChannelExt, EndpointState};
use tonic_etcd::resolver::ResolverState;

#[tokio::test]
async fn the_status_of_a_channel_shows_registry_endpoints_and_rejected_keys() {
    let world = World::new().await;
    let registration = world.registration().zone("eu-1a").version("1.2\n");
    let registered = registration.watch_state();
    let (server, address) = world.start(registration).await;
    let text = registered.borrow().to_string();
    assert!(text.starts_with("registered under lease "), "{text}");
    let mut kv = client(&world.etcd).await.kv_client();
    kv.put("/gRPC/greeter/broken\x1b[31m", "{", None)
        .await
        .unwrap();
    let channel = world.registry.channel("greeter").connect_lazy();
    all_ready(&channel, 1).await;
    connect(&address).await.say_hello(hello()).await.unwrap();
    eventually("the rejected key is known", async || {
        channel
            .status()
            .is_some_and(|status| status.rejected.len() == 1)
    })
    .await;
    let status = channel.status().unwrap();
    assert_eq!(status.service, "greeter");
    assert_eq!(status.resolver.state, ResolverState::Fresh);
    let [report] = status.endpoints.as_slice() else {
        panic!("{status}")
    };
    assert_eq!(report.endpoint.state, EndpointState::Ready);
    let instance = report.instance.as_ref().unwrap();
    assert_eq!(instance.zone(), Some("eu-1a"));
    let text = status.to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(
        lines[0].starts_with("greeter: 1 endpoints, registry fresh at revision "),
        "{text}"
    );
    let ready = format!("  {address} READY for ");
    assert!(lines[1].starts_with(&ready), "{text}");
    let key = format!("zone eu-1a, version 1.2\\n, key /gRPC/greeter/{address}");
    assert!(lines[1].contains(&key), "{text}");
    assert!(
        lines[2].contains("rejected: /gRPC/greeter/broken\\u{1b}[31m at revision "),
        "{text}"
    );

    // While etcd is down, the status shows the state and the reason.
    server.stopped().await.unwrap();
    assert_eq!(registered.borrow().to_string(), "deregistered");
    drop(world.etcd);
    eventually("the registry is stale", async || {
        let text = channel.status().unwrap().to_string();
        text.contains("registry stale at revision ") && text.contains(", last error: ")
    })
    .await;
}

#[tokio::test]
async fn a_channel_without_a_registry_has_no_status() {
    let channel = BalancedChannel::builder()
        .addresses(["127.0.0.1:1"])
        .connect_lazy();
    assert!(channel.status().is_none());
}
