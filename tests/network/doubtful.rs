//! Silent connections to a healthy server when no other connection can be established.

use tokio::time::{Instant, sleep, timeout};
use tonic_etcd::BalancedChannel;

use super::support::link::{Behaviour, Link};
use super::support::peer::{Manner, Peer};
use super::{hello, ms, over, say};

/// Starts a server behind a link, and a channel that has called it.
async fn called(manner: Manner) -> (Peer, Link, BalancedChannel) {
    let peer = Peer::start(manner).await;
    let link = Link::start(peer.address).await;
    let channel = over(BalancedChannel::builder(), &[link.address.to_string()]).await;
    say(&channel, ms(2_000))
        .await
        .expect("the server must respond over the link");
    (peer, link, channel)
}

async fn timed(channel: &BalancedChannel) -> u128 {
    let start = Instant::now();
    let outcome = say(channel, ms(10_000)).await;
    let took = Instant::now().saturating_duration_since(start);
    println!("{outcome:?} after {took:?}");
    outcome.expect("the call must succeed");
    took.as_millis()
}

/// The channel checks the silent connection with a PING before the call. The response to the PING arrives after the timeout of the check.
/// The call is sent as soon as this response arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_is_sent_as_soon_as_a_slow_path_answers() {
    let (_peer, link, channel) = called(Manner::default()).await;
    // The link delays both directions of the open connection by 300 ms, and answers no new connection.
    link.set(Behaviour::Established(ms(300)));
    // The channel checks a connection only after more than 1 s of silence.
    sleep(ms(1_200)).await;
    let took = timed(&channel).await;
    assert!(
        (1_200..1_700).contains(&took),
        "the call must take two round trips of 600 ms: {took} ms"
    );
}

/// Servers limit PINGs. If the channel has no PING left for the check, the call waits for another connection for at most one second, and is
/// then sent on the only connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_ping_budget_a_call_is_sent_on_the_only_connection() {
    let delayed = Manner {
        delay: ms(400),
        ..Manner::default()
    };
    let (peer, link, channel) = called(delayed).await;
    link.set(Behaviour::Established(ms(0)));
    let pings = peer.pings();
    // The caller drops these calls. They use up the PINGs that are permitted until the next response.
    let mut client = super::GreeterClient::new(channel.clone());
    for _ in 0..3 {
        let given_up = timeout(ms(200), client.say_hello(hello())).await;
        given_up.expect_err("the caller must drop the call before the response");
        sleep(ms(100)).await;
    }
    sleep(ms(1_300)).await;
    println!("{} PINGs", peer.pings() - pings);
    let took = timed(&channel).await;
    assert!(
        (1_300..2_500).contains(&took),
        "the call must wait 1 s for a connection and 0.4 s for the response: {took} ms"
    );
    // The next call does not wait: the last response has shown that the connection is alive.
    let took = timed(&channel).await;
    assert!(
        took < 1_000,
        "the next call must not wait for another connection: {took} ms"
    );
}
