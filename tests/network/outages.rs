//! The backoff between dials. It is tested with graceful closes after an outage, with servers that close each connection before it has
//! served a call, and with proxies that close idle connections.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tonic_etcd::BalancedChannel;

use super::support::callers::Callers;
use super::support::link::{Behaviour, Link};
use super::support::peer::{How, Peer, When};
use super::support::{all_ready, eventually};
use super::{addresses, all_well, lazily, ms, over, say, shown};

/// Waits until the backoff has grown to some seconds. The link must refuse connections in this time.
async fn outage(link: &Link) {
    let before = link.accepted();
    // The channel dials at about 0, 1, 2.6 and 5.2 s. The wait after the fourth dial is about 4 s.
    eventually("the backoff has grown", async || {
        link.accepted() >= before + 4
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_when_idle_connections_are_closed_after_an_outage() {
    let peer = Peer::good().await;
    let link = Link::behaving(peer.address, Behaviour::Refuse).await;
    let channel = lazily(BalancedChannel::builder(), &[link.address.to_string()]);
    outage(&link).await;
    link.set(Behaviour::CloseIdle(ms(1_000)));
    all_ready(&channel, 1).await;
    let mut failed = Vec::new();
    // Between two calls, the link closes the idle connection.
    for call in 0..5 {
        if let Err(status) = say(&channel, ms(5_000)).await {
            failed.push((call, status));
        }
        sleep(ms(1_500)).await;
    }
    println!(
        "{} of 5 calls failed, {} connections",
        failed.len(),
        link.accepted()
    );
    assert!(
        failed.is_empty(),
        "an idle close must not count as a failure: {failed:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_when_connections_reach_their_maximum_age_after_an_outage() {
    let peer = Peer::closing(When::Age(ms(500)), How::Graceful).await;
    let link = Link::behaving(peer.address, Behaviour::Refuse).await;
    let channel = lazily(BalancedChannel::builder(), &[link.address.to_string()]);
    outage(&link).await;
    link.set(Behaviour::Pass);
    all_ready(&channel, 1).await;
    all_well(Callers::start(&channel, 4), ms(3_000), "after an outage").await;
}

/// If a server accepts connections and never serves a call, the channel must not dial it every millisecond.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_closes_before_it_serves_is_not_dialled_in_a_loop() {
    for (when, how) in [
        (When::Pong, How::Goaway),
        (When::Pong, How::Fin),
        (When::Unserved, How::Goaway),
        (When::Unserved, How::Fin),
    ] {
        let broken = Peer::closing(when, how).await;
        let good = [Peer::good().await, Peer::good().await];
        let all = addresses([&broken, &good[0], &good[1]]);
        let channel = lazily(BalancedChannel::builder(), &all);
        eventually("the good servers are ready", async || {
            let known = channel.endpoints();
            let has_served = known.iter().filter(|one| one.latency.is_some()).count() >= 2;
            if !has_served {
                // A call may be sent to the broken server, and fails if that server closes the connection without a GOAWAY.
                let _ = say(&channel, ms(1_000)).await;
            }
            has_served
        })
        .await;
        let before = broken.connections();
        let callers = Callers::start(&channel, CALLERS);
        sleep(ms(3_000)).await;
        let connections = broken.connections() - before;
        let (calls, failed) = callers.stopped().await;
        println!(
            "{when:?}, {how:?}: {connections} connections to the closing server, {calls} calls, {}",
            shown(&failed)
        );
        // Without a GOAWAY, the channel cannot know whether a call on the closed connection was executed. It does not repeat such a call,
        // so the call may fail.
        let lost = if how == How::Fin {
            CALLERS * connections
        } else {
            0
        };
        assert!(
            failed.len() <= lost,
            "{when:?}, {how:?}: too many calls failed: {}",
            shown(&failed)
        );
        assert!(
            connections <= 10,
            "{when:?}, {how:?}: at most 10 dials in 3 s are expected, not {connections}"
        );
        assert!(
            broken.connections() > 0,
            "{when:?}, {how:?}: the server must be dialled"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_server_that_closes_before_it_serves_is_not_dialled_in_a_loop() {
    for when in [When::Pong, When::Unserved] {
        let broken = Peer::closing(when, How::Goaway).await;
        let channel = lazily(BalancedChannel::builder(), &addresses([&broken]));
        let callers = Callers::start(&channel, 2);
        sleep(Duration::from_secs(3)).await;
        let connections = broken.connections();
        let (calls, failed) = callers.stopped().await;
        println!(
            "{when:?}: {connections} connections; {} of {calls} calls failed",
            failed.len()
        );
        assert!(
            (2..=10).contains(&connections),
            "{when:?}: 2 to 10 dials in 3 s are expected, not {connections}"
        );
    }
}

/// Behind a proxy that closes idle connections, a channel without calls redials at growing intervals.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_channel_redials_with_growing_waits() {
    let peer = Peer::good().await;
    let link = Link::behaving(peer.address, Behaviour::CloseIdle(ms(250))).await;
    let channel = over(BalancedChannel::builder(), &[link.address.to_string()]).await;
    let first = link.accepted();
    // Only a few dials are expected in this time.
    sleep(ms(8_000)).await;
    let dialled = link.accepted() - first;
    println!("{dialled} connections in 8 s without calls");
    assert!(
        (1..=4).contains(&dialled),
        "{dialled} connections in 8 s without a call; with waits of 1 s, 1.6 s, 2.6 s and so on, one to four are expected"
    );
    let before = Instant::now();
    say(&channel, ms(5_000))
        .await
        .expect("a call must dial at once");
    let took = Instant::now().saturating_duration_since(before);
    assert!(
        took < ms(1_000),
        "a call must redial an idle endpoint at once: {took:?}"
    );
}

const CALLERS: usize = 4;
