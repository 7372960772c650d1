//! Connections with few concurrent streams, and the calls that wait for a permit, which is one reserved stream on a connection.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::DuplexStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tonic::Code;
use tonic_etcd::BalancedChannel;

use super::support::greeter::greeter_client::GreeterClient;
use super::support::peer::{Answer, Manner, Peer};
use super::support::{eventually, within};
use super::{addresses, ms, over, retrying, say, status, support};

fn one_stream(answer: Answer, delay: u64) -> Manner {
    Manner {
        answer,
        delay: ms(delay),
        max_streams: Some(1),
        ..Manner::default()
    }
}

/// The first call in the wait queue is a retry, which must not use the server of its failed attempt. A permit on this server is given to
/// the calls behind the retry.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_permit_that_a_retry_excludes_is_given_to_the_next_waiter() {
    let failing = Peer::start(one_stream(Answer::Fail(Code::Unavailable), 400)).await;
    let full = Peer::start(one_stream(Answer::Hang, 0)).await;
    let channel = over(retrying(), &addresses([&failing, &full])).await;
    let mut fillers = JoinSet::new();
    let mut occupy = || {
        let channel = channel.clone();
        fillers.spawn(async move { say(&channel, ms(8_000)).await });
    };
    // The channel opens a second connection to each endpoint whose streams are all in use.
    for _ in 0..4 {
        occupy();
        sleep(ms(60)).await;
    }
    eventually("each server has begun a call", async || {
        failing.executed() >= 1 && full.executed() >= 1
    })
    .await;
    sleep(ms(500)).await;
    let (held, failed) = (full.executed(), failing.executed());
    println!(
        "{held} calls occupy one server; {failed} calls have failed on the other server and wait"
    );
    assert!(failed >= 1, "a retry must wait");
    failing.set(one_stream(Answer::Reply, 100));
    let began = Instant::now();
    let mut callers = JoinSet::new();
    for _ in 0..8 {
        let channel = channel.clone();
        callers.spawn(async move {
            let outcome = say(&channel, ms(5_000)).await;
            (outcome, Instant::now().saturating_duration_since(began))
        });
    }
    let outcomes = callers.join_all().await;
    let unserved = outcomes
        .iter()
        .filter(|(outcome, _)| outcome.is_err())
        .count();
    let longest = outcomes.iter().map(|(_, took)| *took).max().unwrap();
    println!("{unserved} of 8 calls were not served in 5 s, the longest took {longest:?}");
    assert_eq!(
        unserved, 0,
        "every call must get a stream in time, because each call on the first server takes 100 ms"
    );
    assert!(
        longest < ms(2_000),
        "eight calls of 100 ms in sequence must end within 2 s, not {longest:?}"
    );
}

/// A call that the first server has refused waits for the second server, and uses no permit on the first server. Such a permit is given to
/// the calls behind the refused call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_permit_on_a_server_that_refused_the_first_waiter_is_given_to_the_next_waiter() {
    let refusing = Peer::start(one_stream(Answer::Refuse, 0)).await;
    let full = Peer::start(one_stream(Answer::Hang, 0)).await;
    let channel = over(BalancedChannel::builder(), &addresses([&refusing, &full])).await;
    let mut fillers = JoinSet::new();
    let mut occupy = || {
        let channel = channel.clone();
        fillers.spawn(async move { say(&channel, ms(15_000)).await });
    };
    // While the stream of the first connection is in use, the channel opens a second connection to the server.
    for held in 1..=2 {
        occupy();
        eventually("the call holds a stream", async || full.executed() == held).await;
    }
    let refused = refusing.requests();
    occupy();
    eventually("a call was refused and waits", async || {
        refusing.requests() > refused && status(&channel, refusing.address).in_flight == 0
    })
    .await;
    refusing.set(one_stream(Answer::Reply, 100));
    let began = Instant::now();
    let mut callers = JoinSet::new();
    for _ in 0..8 {
        let channel = channel.clone();
        callers.spawn(async move { say(&channel, ms(5_000)).await });
    }
    let outcomes = callers.join_all().await;
    let took = Instant::now().saturating_duration_since(began);
    let unserved: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    println!("{} of 8 were not served, after {took:?}", unserved.len());
    assert!(
        unserved.is_empty(),
        "all eight calls must be served: {unserved:?}"
    );
    assert_eq!(
        full.executed(),
        2,
        "the refused call must still wait for the full server"
    );
}

/// A server in this process with one stream per connection. Each permit that a test adds to the semaphore lets the server answer one call.
#[derive(Clone)]
struct Gated {
    begun: Arc<AtomicUsize>,
    permits: Arc<Semaphore>,
}

impl Gated {
    fn dial(&self) -> DuplexStream {
        let (near, far) = tokio::io::duplex(16 * 1024);
        let this = self.clone();
        tokio::spawn(async move {
            let mut builder = h2::server::Builder::new();
            let Ok(mut connection) = builder
                .max_concurrent_streams(1)
                .handshake::<_, Bytes>(far)
                .await
            else {
                return;
            };
            let mut calls = JoinSet::new();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                let this = this.clone();
                calls.spawn(async move {
                    this.begun.fetch_add(1, Ordering::SeqCst);
                    let Ok(permit) = this.permits.acquire().await else {
                        return;
                    };
                    permit.forget();
                    let head = http::Response::builder().header("content-type", "application/grpc");
                    let head = head.body(()).unwrap();
                    let Ok(mut stream) = respond.send_response(head, false) else {
                        return;
                    };
                    let _ = stream.send_data(Bytes::from_static(&[0, 0, 0, 0, 0]), false);
                    let mut trailers = http::HeaderMap::new();
                    trailers.insert("grpc-status", 0.into());
                    let _ = stream.send_trailers(trailers);
                });
            }
        });
        near
    }

    fn begun(&self) -> usize {
        self.begun.load(Ordering::SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_stream_freed_among_many_connections_is_used_at_once() {
    let server = Gated {
        begun: Arc::default(),
        permits: Arc::new(Semaphore::new(0)),
    };
    let (dialled, known) = (server.clone(), Mutex::new(HashSet::new()));
    // The channel opens a second connection to an endpoint whose streams are all in use. The connector never completes this connection, so
    // that the number of streams stays fixed.
    let builder = BalancedChannel::builder().connector(move |address| {
        let first = known.lock().unwrap().insert(address);
        let io = first.then(|| dialled.dial());
        async move {
            match io {
                Some(io) => Ok(io),
                None => std::future::pending().await,
            }
        }
    });
    let all: Vec<_> = (0..ENDPOINTS)
        .map(|n| format!("10.0.{}.{}:1", n / 250, n % 250 + 1))
        .collect();
    let channel = over(builder, &all).await;
    let mut callers = JoinSet::new();
    for _ in 0..ENDPOINTS + WAITERS {
        let mut client = GreeterClient::new(channel.clone());
        callers.spawn(async move { client.say_hello(support::hello()).await });
    }
    let mut last = (0, Instant::now());
    eventually("every stream is in use", async || {
        let (begun, now) = (server.begun(), Instant::now());
        if begun != last.0 {
            last = (begun, now);
        }
        begun == ENDPOINTS && now.saturating_duration_since(last.1) > ms(1_000)
    })
    .await;
    for round in 0..5 {
        let before = server.begun();
        server.permits.add_permits(FREED);
        let mut used = 0;
        let began = Instant::now();
        while used < FREED && Instant::now().saturating_duration_since(began) < ms(5_000) {
            sleep(ms(2)).await;
            used = server.begun() - before;
        }
        let took = Instant::now().saturating_duration_since(began);
        println!("round {round}: {used} of {FREED} freed streams used after {took:?}");
        assert_eq!(
            used, FREED,
            "every free stream must be used while calls wait"
        );
    }
    callers.abort_all();
    within(ms(5_000), "all calls have ended", async || {
        while callers.try_join_next().is_some() {}
        callers.is_empty()
    })
    .await;
}

const ENDPOINTS: usize = 600;
const WAITERS: usize = 4_000;
const FREED: usize = 20;
