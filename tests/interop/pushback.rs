//! The pushback of a grpc-go server keeps new calls of our channel away from it.

use std::time::Duration;

use tokio::time::Instant;
use tonic::Code;
use tonic_etcd::channel::{EjectionReason, EndpointStatus, ServedBy};
use tonic_etcd::{BalancedChannel, LbPolicy};

use crate::hello;
use crate::peer::{Peer, go};
use crate::support::eventually;
use crate::support::greeter::greeter_client::GreeterClient;

/// The servers request a wait of this length.
const PUSHBACK: Duration = Duration::from_millis(700);

fn pushed_back(channel: &BalancedChannel) -> Option<EndpointStatus> {
    let statuses = channel.endpoints();
    let mut statuses = statuses.into_iter();
    statuses.find(|one| one.ejection_reason == Some(EjectionReason::Pushback))
}

#[tokio::test]
async fn the_pushback_of_a_go_server_keeps_new_calls_away_from_it() {
    let Some(go) = go().await else { return };
    let servers = [go.limited_server().await, go.limited_server().await];
    let channel = BalancedChannel::builder()
        .policy(LbPolicy::WeightedRoundRobin)
        .max_pushback(Duration::from_secs(10))
        .addresses(servers.iter().map(Peer::address))
        .connect_lazy();
    eventually("both servers are ready", async || {
        let statuses = channel.endpoints();
        statuses
            .iter()
            .filter(|one| one.state.to_string() == "READY")
            .count()
            == 2
    })
    .await;
    let mut client = GreeterClient::new(channel.clone());
    for is_stream in [false, true] {
        let start = Instant::now();
        if is_stream {
            let replies = client.say_hellos(hello("refuse")).await.unwrap();
            let mut replies = replies.into_inner();
            replies.message().await.unwrap().unwrap();
            let status = replies.message().await.unwrap_err();
            assert_eq!(status.code(), Code::ResourceExhausted);
        } else {
            let status = client.say_hello(hello("refuse")).await.unwrap_err();
            assert_eq!(status.code(), Code::ResourceExhausted);
            let pushback = status.metadata().get("grpc-retry-pushback-ms").unwrap();
            assert_eq!(pushback, "700");
        }
        eventually("the server is excluded", async || {
            pushed_back(&channel).is_some()
        })
        .await;
        let busy = pushed_back(&channel).unwrap();
        let until = busy.pushback_until.unwrap();
        assert!(until >= start + PUSHBACK && until <= Instant::now() + PUSHBACK);
        let mut calls = 0;
        // The server may be used again shortly after `until`, and the call then needs some time.
        while Instant::now() + Duration::from_millis(50) < until {
            let reply = client.say_hello(hello("world")).await.unwrap();
            let served_by = reply.extensions().get::<ServedBy>().unwrap();
            assert_ne!(served_by.address(), &busy.address);
            calls += 1;
        }
        assert!(calls > 0, "the machine is too slow for this test");
        eventually("the server is used again", async || {
            let reply = client.say_hello(hello("world")).await.unwrap();
            let served_by = reply.extensions().get::<ServedBy>().unwrap();
            *served_by.address() == busy.address
        })
        .await;
        assert!(Instant::now() >= until);
    }
}
