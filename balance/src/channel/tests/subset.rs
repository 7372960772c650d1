//! Channels that connect to a subset of their endpoints.

use std::collections::BTreeSet;

use tokio::sync::watch;
use tokio::time::Instant;
use twox_hash::XxHash64;

use super::support::PATIENCE;
use super::*;
use crate::channel::{ChannelBuilder, PeerIndex};
use crate::error::ChannelError;

fn addresses(servers: &[Greeter]) -> Vec<String> {
    servers.iter().map(Greeter::address).collect()
}

/// Returns the addresses of the endpoints of a channel.
fn used(channel: &BalancedChannel) -> BTreeSet<String> {
    let endpoints = channel.endpoints().into_iter();
    endpoints
        .map(|endpoint| endpoint.address.to_string())
        .collect()
}

/// Waits until a channel has exactly this many endpoints, all of them ready.
async fn settled(channel: &BalancedChannel, endpoints: usize) {
    ready(channel, endpoints).await;
    until("the other endpoints are gone", || {
        used(channel).len() == endpoints
    })
    .await;
}

fn builder() -> ChannelBuilder {
    BalancedChannel::builder().service("greeter")
}

#[tokio::test]
async fn a_channel_with_a_subset_connects_to_only_as_many_endpoints() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let servers: Vec<_> = names.into_iter().map(Greeter::start).collect();
    let channel = builder()
        .subset(2)
        .addresses(addresses(&servers))
        .connect()
        .await
        .expect("a channel");
    settled(&channel, 2).await;
    assert_eq!(tally(&channel, 40).await.len(), 2);
    // The seed determines the subset.
    let seeded = || {
        let channel = builder().seed(7).subset(3);
        channel.addresses(addresses(&servers)).connect_lazy()
    };
    let channels = [seeded(), seeded()];
    for channel in &channels {
        settled(channel, 3).await;
    }
    assert_eq!(used(&channels[0]), used(&channels[1]));
}

#[tokio::test]
async fn no_call_fails_while_endpoints_join_and_leave_a_subset() {
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = builder()
        .subset(2)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let mut servers = Vec::new();
    for name in ["a", "b", "c"] {
        let server = Greeter::start(name);
        insert(&changes, &server.address(), Attributes::new());
        servers.push(server);
    }
    settled(&channel, 2).await;
    let caller = channel.clone();
    let (stop, stopped) = watch::channel(false);
    let calls = tokio::spawn(async move {
        let mut calls = 0;
        while !*stopped.borrow() {
            say(&caller).await.expect("no call fails");
            calls += 1;
        }
        calls
    });
    for name in ["d", "e", "f", "g", "h"] {
        let server = Greeter::start(name);
        insert(&changes, &server.address(), Attributes::new());
        servers.push(server);
        settled(&channel, 2).await;
    }
    // Each endpoint of the subset is replaced when the source removes it.
    for _ in 0..4 {
        let removed = used(&channel).pop_first().expect("an endpoint");
        remove(&changes, &removed);
        until("the endpoint is replaced", || {
            !used(&channel).contains(&removed)
        })
        .await;
        settled(&channel, 2).await;
    }
    stop.send_replace(true);
    let calls = tokio::time::timeout(PATIENCE, calls).await;
    let calls = calls.expect("in time").expect("no call fails");
    assert!(calls > 0);
}

/// Returns a seed with which a subset of one endpoint is `first` and not `second`.
fn seed(first: &str, second: &str) -> u64 {
    let hash = |seed, address: &str| XxHash64::oneshot(seed, address.as_bytes());
    let mut seeds = 0..;
    let found = seeds.find(|seed| hash(*seed, first) < hash(*seed, second));
    found.expect("a seed")
}

#[tokio::test]
async fn a_call_does_not_fail_while_an_endpoint_outside_the_subset_can_serve_it() {
    let server = Greeter::start("alpha");
    let refusing = refusing();
    let channel = builder()
        .seed(seed(&refusing, &server.address()))
        .subset(1)
        .addresses([server.address(), refusing.clone()])
        .connect_lazy();
    for _ in 0..3 {
        say(&channel).await.expect("no call fails");
    }
    // The endpoint of the subset is still dialled.
    assert_eq!(used(&channel), BTreeSet::from([server.address(), refusing]));
}

#[tokio::test]
async fn another_endpoint_is_used_soon_if_the_packets_of_the_subset_are_lost() {
    let servers = [Greeter::start("alpha"), Greeter::start("beta")];
    let (frozen, freeze) = support::valve(servers[0].address);
    let frozen = frozen.to_string();
    let channel = builder()
        .http2_keep_alive_interval(Duration::from_millis(50))
        .keep_alive_timeout(Duration::from_millis(200))
        .keep_alive_permit_time(Duration::from_millis(50))
        .keep_alive_while_idle(true)
        .seed(seed(&frozen, &servers[1].address()))
        .subset(1)
        .addresses([servers[1].address(), frozen.clone()])
        .connect_lazy();
    settled(&channel, 1).await;
    assert_eq!(used(&channel), BTreeSet::from([frozen]));
    freeze.send_replace(true);
    let frozen_at = Instant::now();
    until("the other endpoint is used", || used(&channel).len() == 2).await;
    // A dial that is not answered times out after 10 s.
    let took = Instant::now().saturating_duration_since(frozen_at);
    assert!(took < Duration::from_secs(7), "{took:?}");
    ready(&channel, 1).await;
    assert!(say(&channel).await.expect("an answer").ends_with("beta"));
}

#[tokio::test]
async fn an_endpoint_whose_answers_are_not_grpc_is_replaced() {
    let answer = |(_, mut respond): support::Accepted| {
        let page = Response::builder().header("content-type", "text/html");
        let _ = respond.send_response(page.body(()).expect("a response"), true);
        async {}
    };
    let page = Raw::answering(|_| (), answer);
    let server = Greeter::start("alpha");
    let channel = builder()
        .seed(seed(&page.address(), &server.address()))
        .subset(1)
        .addresses([server.address(), page.address()])
        .connect_lazy();
    settled(&channel, 1).await;
    // Several answers in a row must be no gRPC before a quarantine begins.
    let failing = async {
        let mut error = None;
        while used(&channel).len() == 1 {
            error = say(&channel).await.err();
        }
        error
    };
    let error = in_time("another endpoint", failing).await;
    assert!(error.is_some(), "the first answer is no gRPC");
    ready(&channel, 2).await;
    // The first endpoint may still get a call on probation.
    let mut answered = 0;
    for _ in 0..20 {
        answered += usize::from(say(&channel).await.is_ok());
    }
    assert!(answered >= 10, "{answered}, {error:?}");
}

#[tokio::test]
async fn an_endpoint_is_not_replaced_before_its_successor_is_ready() {
    let server = Greeter::start("alpha");
    // The successor accepts connections and never answers.
    let (_listener, silent) = black_hole();
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = builder()
        .seed(seed(&silent, &server.address()))
        .subset(1)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    insert(&changes, &server.address(), Attributes::new());
    settled(&channel, 1).await;
    insert(&changes, &silent, Attributes::new());
    until("the successor is dialled", || {
        used(&channel).contains(&silent)
    })
    .await;
    for _ in 0..20 {
        say(&channel).await.expect("no call fails");
    }
    assert!(used(&channel).contains(&server.address()));
}

#[tokio::test]
async fn channels_with_an_aperture_share_the_endpoints_evenly_and_follow_their_index() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let servers: Vec<_> = names.into_iter().map(Greeter::start).collect();
    let peers: Vec<_> = (0..3)
        .map(|index| watch::channel(PeerIndex::new(index, 3)).0)
        .collect();
    let channels: Vec<_> = peers
        .iter()
        .map(|peer| {
            let channel = builder().aperture(2, peer.subscribe());
            channel.addresses(addresses(&servers)).connect_lazy()
        })
        .collect();
    for channel in &channels {
        settled(channel, 2).await;
    }
    let all: BTreeSet<_> = channels.iter().flat_map(used).collect();
    assert_eq!(all.len(), 6, "each server must have one client");
    // The third client has left, so the others take its place.
    let first = used(&channels[0]);
    for (index, peer) in peers.iter().enumerate().take(2) {
        peer.send_replace(PeerIndex::new(index, 2));
    }
    until("the second client has other servers", || {
        let [_, second, third] = &channels[..] else {
            unreachable!("there are three channels");
        };
        used(second).len() == 2 && used(second).intersection(&used(third)).count() == 1
    })
    .await;
    assert_eq!(used(&channels[0]), first);
    // While the index is unknown, the channel has a random subset.
    peers[0].send_replace(None);
    for _ in 0..20 {
        say(&channels[0]).await.expect("no call fails");
    }
    settled(&channels[0], 2).await;
}

#[tokio::test]
async fn a_subset_without_endpoints_is_invalid() {
    let error = builder().subset(0).addresses(["127.0.0.1:1"]).connect();
    let error = error.await.expect_err("the size is 0");
    assert!(
        matches!(&error, ChannelError::InvalidOption { reason, .. } if reason.contains("subset")),
        "{error}"
    );
}
