//! TCP connections (*flows*) that a middlebox has forgotten: sent data is acknowledged, but no response is received. New connections work.

use tokio::time::{Instant, sleep};
use tonic_etcd::BalancedChannel;

use super::support::link::{Behaviour, Link};
use super::support::peer::Peer;
use super::support::within;
use super::{ms, over, say};

/// Starts servers, each behind a link that forgets a flow after one second of silence.
async fn forgetful(servers: usize) -> (Vec<Peer>, Vec<Link>, Vec<String>) {
    let (mut peers, mut links) = (Vec::new(), Vec::new());
    for _ in 0..servers {
        let peer = Peer::good().await;
        links.push(Link::behaving(peer.address, Behaviour::Forget(ms(1_000))).await);
        peers.push(peer);
    }
    let addresses = links.iter().map(|link| link.address.to_string()).collect();
    (peers, links, addresses)
}

/// Sends calls in a row and returns how many of them failed.
async fn failed_of(channel: &BalancedChannel, calls: usize, deadline: u64) -> usize {
    let mut failed = 0;
    for _ in 0..calls {
        failed += usize::from(say(channel, ms(deadline)).await.is_err());
    }
    failed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_call_after_a_silence_gets_a_new_connection_within_its_deadline() {
    let (_peers, links, addresses) = forgetful(1).await;
    let channel = over(BalancedChannel::builder(), &addresses).await;
    assert_eq!(
        failed_of(&channel, 10, 1_000).await,
        0,
        "calls must succeed while the flow is open"
    );
    // In this time, the link forgets the flow.
    sleep(ms(2_000)).await;
    let began = Instant::now();
    let first = say(&channel, ms(5_000)).await;
    let took = Instant::now().saturating_duration_since(began);
    println!(
        "the first call took {took:?}: {first:?}; {} connections",
        links[0].accepted()
    );
    first.expect("the call must be sent on a new flow, not on the forgotten one");
    assert_eq!(
        failed_of(&channel, 50, 1_000).await,
        0,
        "the new flow must serve calls"
    );
    assert!(
        links[0].accepted() <= 4,
        "at most 4 connections are expected, because the channel must not dial once per call"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_forgotten_flows_fail_at_most_one_call_each() {
    let (_peers, links, addresses) = forgetful(4).await;
    let channel = over(BalancedChannel::builder(), &addresses).await;
    assert_eq!(
        failed_of(&channel, 40, 1_000).await,
        0,
        "calls must succeed while the flows are open"
    );
    sleep(ms(2_000)).await;
    let mut lost = Vec::new();
    let healed = within(ms(10_000), "ten calls in a row succeed", async || {
        for _ in 0..10 {
            if let Err(status) = say(&channel, ms(2_000)).await {
                lost.push(status.code());
                return false;
            }
        }
        true
    })
    .await;
    println!("recovered after {healed:?}, {} lost: {lost:?}", lost.len());
    assert!(
        lost.len() <= 4,
        "each forgotten flow may fail at most one call: {lost:?}"
    );
    assert_eq!(
        failed_of(&channel, 100, 2_000).await,
        0,
        "no later call may fail"
    );
    let dials: usize = links.iter().map(Link::accepted).sum();
    assert!(
        dials <= 16,
        "too many dials: {dials} connections to four endpoints"
    );
}

/// After the silence, many callers send calls at once, with a deadline of 1.5 s. No call is sent on a forgotten flow, so no call is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_after_a_silence_are_served_within_one_deadline() {
    let (_peers, _links, addresses) = forgetful(4).await;
    let channel = over(BalancedChannel::builder(), &addresses).await;
    assert_eq!(
        failed_of(&channel, 40, 1_000).await,
        0,
        "calls must succeed while the flows are open"
    );
    sleep(ms(2_000)).await;
    let callers = super::Callers::making(&channel, 16, async |mut client| {
        let mut request = super::hello();
        request.set_timeout(ms(1_500));
        client.say_hello(request).await.map(drop)
    });
    super::all_well(callers, ms(3_000), "after a silence").await;
}

/// Before each call, the link forgets the flow of the previous call. The channel must establish a new connection in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_slower_than_the_flow_timeout_loses_at_most_its_first_call() {
    let (_peers, links, addresses) = forgetful(1).await;
    let channel = over(BalancedChannel::builder(), &addresses).await;
    let mut outcomes = Vec::new();
    for _ in 0..5 {
        sleep(ms(3_000)).await;
        outcomes.push(
            say(&channel, ms(2_000))
                .await
                .map_err(|status| status.code()),
        );
    }
    println!("{outcomes:?}, {} connections", links[0].accepted());
    let failed = outcomes.iter().skip(1).filter(|outcome| outcome.is_err());
    assert_eq!(
        failed.count(),
        0,
        "only the first call may fail: {outcomes:?}"
    );
    assert!(
        links[0].accepted() <= 20,
        "too many dials: {}",
        links[0].accepted()
    );
}

/// The link discards the bytes of old and new flows. After this fault has ended, the endpoint is ready again within one backoff.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_recovers_soon_after_a_black_hole() {
    let (_peers, links, addresses) = forgetful(1).await;
    links[0].set(Behaviour::Pass);
    let builder = BalancedChannel::builder().connect_timeout(ms(500));
    let channel = over(builder, &addresses).await;
    assert_eq!(
        failed_of(&channel, 10, 1_000).await,
        0,
        "calls must succeed while the flow is open"
    );
    links[0].set(Behaviour::BlackHole);
    assert_eq!(
        failed_of(&channel, 4, 300).await,
        4,
        "no call may succeed while the link discards all bytes"
    );
    links[0].set(Behaviour::Pass);
    let back = within(ms(6_000), "the endpoint has recovered", async || {
        say(&channel, ms(500)).await.is_ok()
    })
    .await;
    println!("recovered after {back:?}");
    assert_eq!(
        failed_of(&channel, 50, 1_000).await,
        0,
        "the endpoint must stay available"
    );
}
