//! PINGs to servers that limit them, and PINGs over slow links.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::sleep;
use tonic::Code;
use tonic_etcd::BalancedChannel;

use super::support::callers::Callers;
use super::support::eventually;
use super::support::greeter::greeter_client::GreeterClient;
use super::support::link::{Behaviour, Link};
use super::support::peer::{Answer, Manner, Peer, Police};
use super::{addresses, hello, ms, over, say, send};

fn policed(police: Police, answer: Answer) -> Manner {
    Manner {
        police: Some(police),
        answer,
        ..Manner::default()
    }
}

/// Sends calls that exceed their deadline, one after the other, with or without an open stream. Checks that the server ends no connection
/// because of PINGs.
async fn overruns(police: Police, beside_a_stream: bool, deadline: u64) {
    let what = format!("{police:?}, {deadline} ms, stream {beside_a_stream}");
    let peer = Peer::start(policed(police, Answer::Quiet)).await;
    let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
    let mut replies = None;
    if beside_a_stream {
        let mut client = GreeterClient::new(channel.clone());
        let mut open = client.say_hellos(hello()).await.unwrap().into_inner();
        open.message()
            .await
            .unwrap()
            .expect("the stream must yield a reply");
        replies = Some(open);
    }
    peer.set(policed(police, Answer::Hang));
    for _ in 0..10 {
        let error = say(&channel, ms(deadline))
            .await
            .expect_err("the call must time out");
        assert_eq!(error.code(), Code::DeadlineExceeded, "{what}: {error:?}");
    }
    println!(
        "{what}: {} PINGs, {} connections, {} ended because of PINGs",
        peer.pings(),
        peer.connections(),
        peer.scolded().len()
    );
    assert_eq!(
        peer.scolded().len(),
        0,
        "{what}: no connection may be closed because of PINGs"
    );
    if let Some(replies) = &mut replies {
        let quiet = tokio::time::timeout(ms(100), replies.message()).await;
        assert!(
            quiet.is_err(),
            "{what}: the stream must be open, not {quiet:?}"
        );
    }
    peer.set(policed(police, Answer::Reply));
    say(&channel, ms(2_000))
        .await
        .expect("the server must respond again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overruns_do_not_trip_the_ping_policy_of_grpc_java() {
    overruns(Police::Java, false, 200).await;
    overruns(Police::Java, true, 50).await;
    overruns(Police::Java, true, 300).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overruns_do_not_trip_the_ping_policy_of_grpc_go() {
    overruns(Police::Go, false, 200).await;
    overruns(Police::Go, true, 50).await;
    overruns(Police::Go, true, 300).await;
}

/// Servers reset their count of PINGs when they send HEADERS or DATA, but not when they send other frames.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn window_updates_allow_no_further_pings() {
    for police in [Police::Java, Police::Go] {
        let peer = Peer::start(policed(police, Answer::Hang)).await;
        let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
        for _ in 0..8 {
            // When this call is cancelled, the server sends a WINDOW_UPDATE for the window that the message has used.
            let mut large = hello();
            large.get_mut().name = "x".repeat(40_000);
            large.set_timeout(ms(50));
            send(&channel, large)
                .await
                .expect_err("the call must time out");
            for _ in 0..2 {
                say(&channel, ms(50))
                    .await
                    .expect_err("the call must time out");
            }
        }
        println!("{police:?}: {} pings", peer.pings());
        assert_eq!(
            peer.scolded().len(),
            0,
            "{police:?}: no connection may be closed because of PINGs"
        );
    }
}

/// By default, the keep-alive sends no more PINGs than grpc-java and grpc-go permit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keep_alive_loses_no_connection_by_default() {
    for police in [Police::Java, Police::Go] {
        let peer = Peer::start(policed(police, Answer::Quiet)).await;
        let builder = BalancedChannel::builder()
            .http2_keep_alive_interval(ms(100))
            .keep_alive_timeout(ms(1_000));
        let channel = over(builder, &addresses([&peer])).await;
        let mut client = GreeterClient::new(channel);
        let mut replies = client.say_hellos(hello()).await.unwrap().into_inner();
        replies
            .message()
            .await
            .unwrap()
            .expect("the stream must yield a reply");
        let quiet = tokio::time::timeout(ms(2_000), replies.message()).await;
        assert!(
            quiet.is_err(),
            "{police:?}: the stream must be open, not {quiet:?}"
        );
        assert_eq!(peer.scolded().len(), 0, "{police:?}");
        assert_eq!(peer.connections(), 1, "{police:?}");
    }
}

/// gRFC A8: after `too_many_pings`, the keep-alive interval is doubled. The channel is configured to send PINGs more often than the server
/// permits.
async fn keep_alive(police: Police) {
    let peer = Peer::start(policed(police, Answer::Quiet)).await;
    let builder = BalancedChannel::builder()
        .http2_keep_alive_interval(ms(200))
        .keep_alive_timeout(ms(1_000))
        .keep_alive_permit_time(ms(200));
    let channel = over(builder, &addresses([&peer])).await;
    let opened = Arc::new(AtomicUsize::new(0));
    let (counter, called) = (Arc::clone(&opened), channel.clone());
    // A stream is open all the time.
    let streams = tokio::spawn(async move {
        loop {
            let mut client = GreeterClient::new(called.clone());
            if let Ok(replies) = client.say_hellos(hello()).await {
                let mut replies = replies.into_inner();
                counter.fetch_add(1, Ordering::SeqCst);
                while let Ok(Some(_)) = replies.message().await {}
            }
            sleep(ms(20)).await;
        }
    });
    sleep(ms(10_000)).await;
    streams.abort();
    let (connections, lived) = (peer.connections(), peer.scolded());
    println!(
        "{police:?}: {connections} connections, closed for PINGs after {lived:?}, {} streams, {} PINGs",
        opened.load(Ordering::SeqCst),
        peer.pings()
    );
    assert!(
        lived.len() >= 2,
        "the server must close at least two connections because of PINGs: {lived:?}"
    );
    assert!(
        lived.len() <= 5 && connections <= 7,
        "{police:?}: only a handful of connections may be closed: {lived:?} of {connections}"
    );
    // The lifetimes do not double exactly, because the interval has jitter, and the first PING of a connection is not a keep-alive PING.
    for pair in lived.windows(2) {
        assert!(
            pair[1] > pair[0].mul_f64(1.5),
            "{police:?}: the interval must double with each closed connection: {lived:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keep_alive_that_is_too_fast_for_grpc_java_slows_down() {
    keep_alive(Police::Java).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keep_alive_that_is_too_fast_for_grpc_go_slows_down() {
    keep_alive(Police::Go).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_connection_is_not_pinged_by_default() {
    let peer = Peer::start(policed(Police::Java, Answer::Reply)).await;
    let builder = BalancedChannel::builder()
        .http2_keep_alive_interval(ms(100))
        .keep_alive_timeout(ms(1_000));
    let channel = over(builder, &addresses([&peer])).await;
    sleep(ms(1_500)).await;
    println!("{} pings on an idle connection", peer.pings());
    assert!(
        peer.pings() <= 1,
        "only one PING may be sent, to check the new connection: {}",
        peer.pings()
    );
    assert_eq!(peer.scolded().len(), 0, "the connection must not be closed");
    say(&channel, ms(1_000))
        .await
        .expect("the server must respond");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_connection_is_not_pinged() {
    for police in [Police::Java, Police::Go] {
        let peer = Peer::start(policed(police, Answer::Reply)).await;
        let builder = BalancedChannel::builder()
            .http2_keep_alive_interval(ms(150))
            .keep_alive_timeout(ms(1_000));
        let channel = over(builder, &addresses([&peer])).await;
        let callers = Callers::start(&channel, 2);
        super::all_well(callers, ms(2_000), &format!("busy, {police:?}")).await;
        println!("{police:?}: {} pings on a busy connection", peer.pings());
        assert_eq!(
            peer.scolded().len(),
            0,
            "{police:?}: no connection may be closed"
        );
        // On a busy machine, the connection may occasionally be silent for one interval.
        assert!(
            peer.pings() <= 4,
            "{police:?}: received bytes must postpone the PING: {} pings",
            peer.pings()
        );
    }
}

/// The response to the PING arrives after the downloaded data, later than the keep-alive timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_link_full_of_downloads_is_not_closed_by_the_keep_alive() {
    let peer = Peer::start(Manner {
        reply: 200_000,
        ..Manner::default()
    })
    .await;
    let link = Link::start(peer.address).await;
    let builder = BalancedChannel::builder()
        .http2_keep_alive_interval(ms(300))
        .keep_alive_timeout(ms(500));
    let channel = over(builder, &[link.address.to_string()]).await;
    link.set(Behaviour::Rate(200_000));
    let mut downloads = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let channel = channel.clone();
        downloads.spawn(async move { say(&channel, ms(18_000)).await });
    }
    let outcomes = downloads.join_all().await;
    let failed: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    println!(
        "{} of 8 downloads failed, {} connections",
        failed.len(),
        link.accepted()
    );
    assert!(
        failed.is_empty(),
        "received bytes must postpone the keep-alive timeout: {failed:?}"
    );
    assert_eq!(link.accepted(), 1, "the connection must not be replaced");
}

/// A dead connection with open calls is still detected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keep_alive_finds_a_dead_connection() {
    let peer = Peer::answering(Answer::Quiet).await;
    let link = Link::start(peer.address).await;
    let builder = BalancedChannel::builder()
        .http2_keep_alive_interval(ms(300))
        .keep_alive_timeout(ms(500));
    let builder = builder.connect_timeout(ms(500));
    let channel = over(builder, &[link.address.to_string()]).await;
    let mut client = GreeterClient::new(channel.clone());
    let mut replies = client.say_hellos(hello()).await.unwrap().into_inner();
    replies
        .message()
        .await
        .unwrap()
        .expect("the stream must yield a reply");
    link.set(Behaviour::BlackHole);
    let ended = tokio::time::timeout(ms(3_000), replies.message()).await;
    let error = ended.expect("a PING without a response must end the connection");
    assert_eq!(
        error.expect_err("the stream must fail").code(),
        Code::Unavailable
    );
    link.set(Behaviour::Pass);
    peer.set(Manner::default());
    eventually("the endpoint is dialled again", async || {
        say(&channel, ms(500)).await.is_ok()
    })
    .await;
}
