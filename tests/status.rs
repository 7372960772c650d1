//! What a program can see of a channel and a registration, as data and as text.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

#[cfg(feature = "serde")]
use serde_json::Value;
use support::{SOON, World, all_ready, client, connect, eventually, hello};
use tokio::time::Instant;
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
async fn the_status_of_an_endpoint_that_cannot_be_reached_shows_the_next_attempt() {
    let world = World::new().await;
    let registration = world
        .registry
        .registration("greeter")
        .address("127.0.0.1:1");
    let registration = registration.register().await.unwrap();
    let channel = world.registry.channel("greeter").connect_lazy();
    let failing = || {
        let mut endpoints = channel.status().unwrap().endpoints.into_iter();
        let endpoint = endpoints.next().map(|report| report.endpoint)?;
        (endpoint.state == EndpointState::TransientFailure).then_some(endpoint)
    };
    eventually("two attempts have failed", async || {
        failing().is_some_and(|endpoint| endpoint.failed_attempts >= 2)
    })
    .await;
    let endpoint = failing().unwrap();
    let next = endpoint.next_attempt.unwrap();
    // The second backoff is 1.6 s, and the third 2.56 s, each with a jitter of 20 %.
    let wait = next.saturating_duration_since(Instant::now());
    assert!(wait < Duration::from_secs(4), "{wait:?}");
    let text = endpoint.to_string();
    assert!(
        text.contains("failed attempts to connect, next attempt in "),
        "{text}"
    );
    assert!(
        !endpoint.ejected && endpoint.ejection_reason.is_none(),
        "{text}"
    );
    eventually("the endpoint is dialled at that time", async || {
        failing().is_some_and(|later| later.failed_attempts > endpoint.failed_attempts)
    })
    .await;
    let late = Instant::now().saturating_duration_since(next);
    assert!(Instant::now() >= next && late < SOON, "{late:?}");
    registration.deregister().await.unwrap();
}

#[cfg(feature = "serde")]
#[tokio::test]
async fn the_status_as_json_has_documented_fields() {
    let world = World::new().await;
    let registration = world.registration().zone("eu-1a").metadata("a", "b");
    let (_server, address) = world.start(registration).await;
    let dead = world
        .registry
        .registration("greeter")
        .address("127.0.0.1:1");
    let _dead = dead.register().await.unwrap();
    let mut kv = client(&world.etcd).await.kv_client();
    kv.put("/gRPC/greeter/broken", "{", None).await.unwrap();
    let config = "/gRPC.control/greeter/config";
    kv.put(config, r#"{"methodConfig":[]}"#, None)
        .await
        .unwrap();
    let channel = world.registry.channel("greeter");
    let channel = channel.map_source(|resolver| resolver.watch_service_config("/gRPC.control/"));
    let channel = channel.connect_lazy();
    let status = || serde_json::to_value(channel.status().unwrap()).unwrap();
    eventually("everything is known", async || {
        let json = status();
        let endpoints = json["endpoints"].as_array().unwrap().iter();
        let known: Vec<_> = endpoints
            .map(|endpoint| endpoint["state"].clone())
            .collect();
        known.contains(&"READY".into())
            && known.contains(&"TRANSIENT_FAILURE".into())
            && json["rejected"].as_array().unwrap().len() == 1
            && json["service_config"]["revision"].is_i64()
    })
    .await;
    let status = status();
    let names = |value: &Value| {
        let mut names: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        names.sort();
        names.join(" ")
    };
    assert_eq!(
        names(&status),
        "endpoints rejected resolver service service_config"
    );
    assert_eq!(status["service"], "greeter");
    assert_eq!(
        names(&status["resolver"]),
        "cached held last_error lists mass_removals reads reconciliations rejected_values repaired revision state state_seconds watches"
    );
    assert_eq!(status["resolver"]["state"], "fresh");
    assert!(status["resolver"]["revision"].is_i64(), "{status}");
    assert_eq!(names(&status["rejected"][0]), "key reason revision");
    assert_eq!(status["rejected"][0]["key"], "/gRPC/greeter/broken");
    // The service config itself is in etcd.
    assert_eq!(
        names(&status["service_config"]),
        "key last_error rejected revision stale"
    );
    assert_eq!(status["service_config"]["key"], config);
    let endpoints = status["endpoints"].as_array().unwrap();
    let at = |address: &str| {
        let mut endpoints = endpoints.iter();
        let found = endpoints.find(|endpoint| endpoint["address"] == address);
        found.unwrap()
    };
    let ready = at(&address);
    assert_eq!(
        names(ready),
        "address calls connections ejected ejection_reason failed_attempts failures in_flight instance last_error last_resort \
         latency_seconds load_report next_attempt_seconds pushback_seconds round_trip_seconds state state_seconds weight"
    );
    assert_eq!(ready["next_attempt_seconds"], Value::Null);
    assert!(ready["round_trip_seconds"].as_f64().unwrap() > 0.0);
    let instance = &ready["instance"];
    assert_eq!(
        names(instance),
        "address create_revision id key last_resort lease leaving metadata mod_revision tls version weight zone"
    );
    assert_eq!(instance["zone"], "eu-1a");
    assert_eq!(instance["metadata"]["a"], "b");
    let lease = instance["lease"].as_str().unwrap();
    assert!(i64::from_str_radix(lease, 16).is_ok(), "{lease}");
    let failing = at("127.0.0.1:1");
    assert!(failing["next_attempt_seconds"].is_f64(), "{failing}");
    assert!(failing["last_error"].is_string(), "{failing}");
}

#[tokio::test]
async fn a_channel_without_a_registry_has_no_status() {
    let channel = BalancedChannel::builder()
        .addresses(["127.0.0.1:1"])
        .connect_lazy();
    assert!(channel.status().is_none());
}
