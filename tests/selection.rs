//! Calls that select instances in etcd by version and metadata.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use support::greeter::greeter_client::GreeterClient;
use support::{Registered, SOON, World, all_ready, hello};
use tokio::time::timeout;
use tonic::{Code, Request, Status};
use tonic_etcd::{
    BalancedChannel,
    channel::{Select, TrafficSplit},
};

/// Makes a call, and returns the name of the server that has answered.
async fn say(channel: &BalancedChannel, select: Option<&Select>) -> Result<String, Status> {
    let mut request = Request::new(hello());
    if let Some(select) = select {
        request.extensions_mut().insert(select.clone());
    }
    let mut client = GreeterClient::new(channel.clone());
    let message = client.say_hello(request).await?.into_inner().message;
    Ok(message.rsplit(' ').next().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_select_registered_instances_by_version_and_metadata() {
    let world = World::new().await;
    let old = world.registration().version("1.1").zone("a");
    let new = world
        .registration()
        .version("1.2")
        .metadata("model", "large");
    let _servers = [
        Registered::start("old", "127.0.0.1:0", old),
        Registered::start("new", "127.0.0.1:0", new),
    ];
    world.counts(2).await;
    let channel = world.registry.channel("greeter").connect().await.unwrap();
    all_ready(&channel, 2).await;
    for (select, expected) in [
        (Select::version("1.1"), "old"),
        (Select::version("1.2"), "new"),
        (Select::label("model", "large"), "new"),
        (Select::label("zone", "a"), "old"),
    ] {
        for _ in 0..10 {
            let served = say(&channel, Some(&select)).await.unwrap();
            assert_eq!(served, expected, "{select:?}");
        }
    }
    let select = Select::label("model", "small");
    let status = say(&channel, Some(&select)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let there = r#"no endpoint has model "small"; there are model "large", no model"#;
    assert!(status.message().contains(there), "{}", status.message());
    let split = TrafficSplit::new().version("1.2", 0).rest(1);
    channel.set_split(split).unwrap();
    support::eventually("the split applies", async || {
        for _ in 0..20 {
            if say(&channel, None).await.unwrap() == "new" {
                return false;
            }
        }
        true
    })
    .await;
}

/// The filter is evaluated when the set changes. A set of which it accepts nothing is known, so calls do not wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_that_accepts_no_instance_leaves_a_known_and_empty_set() {
    let world = World::new().await;
    let old = Registered::start("old", "127.0.0.1:0", world.registration().version("1.1"));
    world.counts(1).await;
    let builder = world
        .registry
        .channel("greeter")
        .map_source(|resolver| resolver.filter(|instance| instance.version() == Some("1.2")));
    let channel = builder.connect_lazy();
    let status = timeout(SOON, say(&channel, None))
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let new = Registered::start("new", "127.0.0.1:0", world.registration().version("1.2"));
    all_ready(&channel, 1).await;
    for _ in 0..10 {
        assert_eq!(say(&channel, None).await.unwrap(), "new");
    }
    drop((old, new));
}
