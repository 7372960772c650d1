//! Connections that a healthy server closes after a number of requests, or at a maximum age. Such a close is not a failure of the server.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tonic_etcd::{BalancedChannel, channel::ChannelBuilder};

use super::support::callers::{Callers, with_deadline};
use super::support::eventually;
use super::support::greeter::HelloRequest;
use super::support::peer::{Close, How, Manner, Peer, When};
use super::{addresses, all_well, ms, over, retrying, say, stream, support};

async fn closing(servers: usize, when: When, how: How) -> Vec<Peer> {
    let mut peers = Vec::new();
    for _ in 0..servers {
        peers.push(Peer::closing(when, how).await);
    }
    peers
}

/// Runs callers over servers that close connections, and asserts that no call fails.
async fn calls_go_well(
    builder: ChannelBuilder,
    (servers, callers): (usize, usize),
    (when, how): (When, How),
    period: Duration,
) {
    let peers = closing(servers, when, how).await;
    let channel = over(builder, &addresses(&peers)).await;
    let callers_at_work = Callers::start(&channel, callers);
    let what = format!("{servers} servers, {callers} callers, {when:?}, {how:?}");
    // On a busy machine, the period may be too short. The calls then continue until the servers have closed enough connections.
    let connections = || peers.iter().map(Peer::connections).sum::<usize>();
    let enough = Instant::now() + ms(15_000);
    sleep(period).await;
    while connections() < servers + 2 && Instant::now() < enough {
        sleep(ms(20)).await;
    }
    let calls = all_well(callers_at_work, Duration::ZERO, &what).await;
    let executed: usize = peers.iter().map(Peer::executed).sum();
    assert_eq!(executed as u64, calls, "{what}: each call must run once");
    let failures: u64 = channel.endpoints().iter().map(|one| one.failures).sum();
    assert_eq!(
        failures, 0,
        "{what}: a close must not count as a failure of the server"
    );
    let connections = connections();
    println!("{what}: {connections} connections");
    // After a graceful GOAWAY, the server serves further calls until the client has read the GOAWAY. Only `How::Goaway` limits the number
    // of requests of a connection.
    match (when, how) {
        (When::Requests(requests), How::Goaway) => assert!(
            connections >= executed / requests as usize,
            "{what}: too few connections, {connections} for {executed} requests"
        ),
        _ => assert!(
            connections > servers,
            "{what}: the servers must have closed connections"
        ),
    }
}

const SIZES: [(usize, usize); 4] = [(1, 1), (1, 16), (3, 1), (3, 16)];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goaway_after_a_thousand_requests_fails_no_call() {
    for sizes in SIZES {
        for how in [How::Goaway, How::Graceful] {
            let close = (When::Requests(1_000), how);
            calls_go_well(BalancedChannel::builder(), sizes, close, ms(1_000)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goaway_after_a_hundred_requests_fails_no_call() {
    for sizes in SIZES {
        for how in [How::Goaway, How::Graceful, How::Strict] {
            let close = (When::Requests(100), how);
            calls_go_well(BalancedChannel::builder(), sizes, close, ms(800)).await;
        }
    }
}

/// `How::Goaway` is tested with one caller only, because each connection then serves exactly one call. Of 16
/// concurrent calls, each GOAWAY would exclude 15. The channel sends an excluded call again at most 64 times, so a call could fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goaway_after_every_request_fails_no_call() {
    for (servers, callers, how) in [
        (1, 1, How::Goaway),
        (3, 1, How::Goaway),
        (1, 16, How::Graceful),
        (3, 16, How::Graceful),
    ] {
        let close = (When::Requests(1), how);
        let builder = BalancedChannel::builder();
        calls_go_well(builder, (servers, callers), close, ms(1_000)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goaway_fails_no_call_under_a_retry_policy() {
    for (requests, sizes) in [(1, (1, 1)), (20, (1, 16)), (100, (3, 16))] {
        let close = (When::Requests(requests), How::Goaway);
        calls_go_well(retrying(), sizes, close, ms(1_000)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_maximum_age_of_connections_fails_no_call() {
    for (servers, callers, age, how) in [
        (1, 16, 300, How::Goaway),
        (1, 1, 300, How::Graceful),
        (3, 16, 300, How::Graceful),
        (1, 16, 300, How::Strict),
        (1, 16, 1_000, How::Graceful),
        (3, 1, 1_000, How::Goaway),
    ] {
        let close = (When::Age(ms(age)), how);
        let builder = BalancedChannel::builder();
        calls_go_well(builder, (servers, callers), close, ms(age * 5 / 2)).await;
    }
}

/// Without a GOAWAY, a call is lost if it is sent while the server closes the connection. The caller therefore pauses between its calls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_without_a_goaway_between_calls_fails_no_call() {
    for servers in [1, 3] {
        for requests in [1, 5] {
            let peers = closing(servers, When::Requests(requests), How::Fin).await;
            let channel = over(BalancedChannel::builder(), &addresses(&peers)).await;
            let callers = Callers::making(&channel, 1, async |mut client| {
                sleep(ms(20)).await;
                client
                    .say_hello(with_deadline(support::hello()))
                    .await
                    .map(drop)
            });
            let what = format!("{servers} servers, FIN after {requests}");
            let calls = all_well(callers, ms(1_500), &what).await;
            assert!(
                calls > 20,
                "{what}: a close must not stop the calls: {calls} calls"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_retries_a_close_without_a_goaway_fails_only_calls_that_lost_two_connections() {
    for sizes in SIZES {
        let close = (When::Requests(100), How::Fin);
        let peers = closing(sizes.0, close.0, close.1).await;
        let channel = over(retrying(), &addresses(&peers)).await;
        let what = format!("{sizes:?} FIN");
        let callers = Callers::start(&channel, sizes.1);
        sleep(ms(1_000)).await;
        let (calls, failed) = callers.stopped().await;
        println!("{what}: {calls} calls, {}", super::shown(&failed));
        // Without a GOAWAY, a close looks like a crash, which the call itself may have caused. Therefore a call that has lost two
        // connections is not sent a third time.
        let unexpected: Vec<_> = failed
            .iter()
            .filter(|call| !call.status.message().contains("2 attempts"))
            .collect();
        assert!(
            unexpected.is_empty(),
            "{what}: only calls that lost two connections may fail: {unexpected:?}"
        );
        // About 5 % of the calls are open on a connection when the server closes it. Of these calls, 5 to 10 % also lose their second
        // connection, which is at most 0.5 % of all calls. The calls that were open on a closed connection are sent again at the same
        // time, so the next close can fail the second attempts of all callers.
        let most = usize::try_from(calls / 50).unwrap_or(usize::MAX) + sizes.1;
        assert!(
            failed.len() <= most,
            "{what}: too many calls failed, {} of {calls}",
            failed.len()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_open_at_a_goaway_are_finished() {
    for builder in [BalancedChannel::builder, retrying] {
        for servers in [1, 3] {
            let peers = closing(servers, When::Requests(20), How::Goaway).await;
            let channel = over(builder(), &addresses(&peers)).await;
            let callers = Callers::making(&channel, 8, async |client| {
                let wanted = HelloRequest {
                    name: "test".to_owned(),
                    replies: 20,
                };
                let replies = stream(client, with_deadline(wanted)).await?;
                assert_eq!(replies, 20, "a finished stream must be complete");
                Ok(())
            });
            all_well(callers, ms(1_000), &format!("streams, {servers} servers")).await;
        }
    }
}

/// Open calls finish on the old connection, and new calls do not wait for the open calls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_call_finishes_on_its_connection_while_a_new_connection_serves() {
    for how in [How::Goaway, How::Graceful] {
        let peer = Peer::start(Manner {
            close: Some(Close {
                when: When::Age(ms(400)),
                how,
            }),
            delay: ms(1_500),
            ..Manner::default()
        })
        .await;
        let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
        let called = channel.clone();
        let long = tokio::spawn(async move { say(&called, ms(5_000)).await });
        eventually("the long call is received", async || peer.executed() == 1).await;
        eventually("a second connection is open", async || {
            peer.connections() >= 2
        })
        .await;
        peer.set(Manner::default());
        assert!(
            !long.is_finished(),
            "{how:?}: the long call must still be running"
        );
        for _ in 0..20 {
            say(&channel, ms(1_000))
                .await
                .expect("the second connection must serve the call");
        }
        assert!(
            !long.is_finished(),
            "{how:?}: no other call may wait for the long call"
        );
        long.await
            .unwrap()
            .expect("a call that is open at the GOAWAY must succeed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_endpoints_that_close_repeatedly_fail_no_call() {
    let peers = closing(50, When::Requests(5), How::Goaway).await;
    let channel = over(BalancedChannel::builder(), &addresses(&peers)).await;
    let calls = all_well(Callers::start(&channel, 16), ms(3_000), "50 servers").await;
    let unused = peers.iter().filter(|peer| peer.executed() == 0).count();
    assert_eq!(
        unused, 0,
        "every server must receive some of the {calls} calls"
    );
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closes_under_tls_fail_no_call() {
    let localhost = support::tls::Localhost::new();
    for (when, how) in [
        (When::Age(ms(300)), How::Graceful),
        (When::Requests(100), How::Goaway),
    ] {
        let manner = Manner {
            close: Some(Close { when, how }),
            ..Manner::default()
        };
        let peer = Peer::with_tls(manner, &localhost).await;
        let builder = BalancedChannel::builder().tls_config(localhost.trusted());
        let channel = over(builder, &addresses([&peer])).await;
        let callers = Callers::start(&channel, 8);
        all_well(callers, ms(1_500), &format!("TLS, {when:?}")).await;
    }
}
