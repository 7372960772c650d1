//! Zone preference, over real servers.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::collections::BTreeMap;
use std::convert::Infallible;

use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::{eventually, greeter};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic_etcd::{
    BalancedChannel, Instance, LbPolicy,
    channel::{EndpointState, ServedBy},
};
use tower::discover::Change;

/// Returns how many of a thousand calls each server has served.
async fn tally(channel: &BalancedChannel) -> BTreeMap<String, usize> {
    let mut tally = BTreeMap::new();
    let mut client = GreeterClient::new(channel.clone());
    for _ in 0..1_000 {
        let request = HelloRequest {
            name: "zone".to_owned(),
            replies: 1,
        };
        let reply = client.say_hello(request).await.expect("no call fails");
        let served_by = reply.extensions().get::<ServedBy>().unwrap();
        *tally.entry(served_by.address().to_string()).or_default() += 1;
    }
    tally
}

#[tokio::test]
async fn calls_stay_in_the_zone_up_to_its_capacity() {
    let (changes, stream) = mpsc::unbounded_channel::<Result<_, Infallible>>();
    let channel = BalancedChannel::builder()
        .zone("near")
        // This policy ignores latencies. On a busy machine, latencies differ, and a policy that uses them would prefer the faster servers.
        .policy(LbPolicy::LeastRequest)
        .seed(7)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let insert = async |zone: &str| {
        let (address, _) = greeter(zone).await;
        let instance = Instance::new(address.to_string().parse().unwrap()).with_zone(zone);
        let address = instance.address().clone();
        let change = Change::Insert(address.clone(), instance);
        changes.send(Ok(change)).unwrap();
        address
    };
    let ready = async |endpoints: usize| {
        eventually("the endpoints are ready", async || {
            let known = channel.endpoints();
            known.len() == endpoints && known.iter().all(|one| one.state == EndpointState::Ready)
        })
        .await;
    };
    let mut near = Vec::new();
    for _ in 0..3 {
        near.push(insert("near").await);
        insert("far").await;
    }
    ready(6).await;
    let calls = tally(&channel).await;
    let each = |calls: &BTreeMap<String, usize>| -> Vec<usize> {
        let calls = |address: &tonic_etcd::Address| calls.get(&address.to_string()).copied();
        near.iter()
            .map(|near| calls(near).unwrap_or_default())
            .collect()
    };
    assert!(each(&calls).iter().sum::<usize>() > 980, "{calls:?}");
    assert!(each(&calls).iter().all(|calls| *calls > 200), "{calls:?}");

    // Only one of four endpoints is in the zone of the client. It serves about half of the calls, and the other zone serves the rest.
    for gone in &near[1..] {
        changes.send(Ok(Change::Remove(gone.clone()))).unwrap();
    }
    ready(4).await;
    let calls = tally(&channel).await;
    let left = each(&calls)[0];
    assert!((400..600).contains(&left), "{calls:?}");
    assert!(calls.values().all(|calls| *calls > 80), "{calls:?}");

    // No endpoint is in the zone of the client: all endpoints serve equal shares, and no call fails.
    changes.send(Ok(Change::Remove(near[0].clone()))).unwrap();
    ready(3).await;
    let calls = tally(&channel).await;
    assert_eq!(calls.len(), 3);
    assert!(calls.values().all(|calls| *calls > 200), "{calls:?}");
}
