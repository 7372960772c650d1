//! The limits on the requests of a channel and of its endpoints.

use std::sync::atomic::{AtomicI64, Ordering};

use h2::Reason;
use tokio::task::JoinHandle;
use tonic::Status;

use super::support::{Accepted, Cut, spawn_routed};
use super::*;
use crate::RetryPolicy;
use crate::channel::{
    ChannelBuilder, HedgingPolicy, PickInfo, PickPolicy, ReadyEndpoints, Routing, Select,
};
use crate::metrics::tests::memory::Memory;

fn limited(
    configure: impl FnOnce(ChannelBuilder) -> ChannelBuilder,
    servers: &[&Raw],
) -> BalancedChannel {
    let builder = BalancedChannel::builder().service("greeter").seed(7);
    configure(builder)
        .addresses(servers.iter().map(|server| server.address()))
        .connect_lazy()
}

fn one_request(builder: ChannelBuilder) -> ChannelBuilder {
    builder.max_requests(1).max_requests_per_endpoint(1)
}

type Call = JoinHandle<Result<String, Status>>;

fn spawn(channel: &BalancedChannel, waits: bool) -> Call {
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(hello("world"));
    request.extensions_mut().insert(WaitForReady::new(waits));
    tokio::spawn(async move {
        let reply = in_time("a call", client.say_hello(request)).await?;
        Ok(reply.into_inner().message)
    })
}

async fn ended(call: Call) -> Result<String, Status> {
    call.await.expect("no panic")
}

/// Makes a call that must fail because of a limit.
async fn dropped(channel: &BalancedChannel) -> Status {
    let status = ended(spawn(channel, false)).await.expect_err("the limit");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("its limit"), "{status}");
    assert!(!status.message().contains("sent again"), "{status}");
    status
}

fn waiting(channel: &BalancedChannel) -> usize {
    channel.0.shared().waiters().all_waiting()
}

fn in_flight(channel: &BalancedChannel) -> usize {
    channel.0.shared().request_limit().expect("a limit").taken()
}

/// Fails a call without a message.
fn fail((request, mut respond): Accepted, code: Code) {
    drop(request);
    let mut head = grpc_head();
    let code = (code as i32).to_string();
    let headers = head.headers_mut();
    headers.insert("grpc-status", code.parse().expect("a value"));
    respond.send_response(head, true).expect("a live call");
}

#[tokio::test]
async fn a_call_over_the_limit_of_the_channel_fails_at_once_and_is_not_sent() {
    let mut server = Raw::start(|_| ());
    let channel = limited(|builder| builder.max_requests(2), &[&server]);
    ready(&channel, 1).await;
    let calls = [spawn(&channel, false), spawn(&channel, false)];
    let (first, second) = (server.accept().await, server.accept().await);
    let status = dropped(&channel).await;
    let expected = "greeter: the channel has 2 requests in flight, which is its limit; the call was not sent (1 of 1 endpoints ready)";
    assert_eq!(status.message(), expected);
    assert!(server.try_accept().is_none(), "the call was sent");
    reply(first).await;
    reply(second).await;
    for call in calls {
        ended(call).await.expect("an answer");
    }
    let next = spawn(&channel, false);
    reply(server.accept().await).await;
    ended(next).await.expect("an answer");
    assert_eq!(in_flight(&channel), 0);
}

#[tokio::test]
async fn with_wait_for_ready_calls_over_the_limit_of_the_channel_wait_in_order() {
    let mut server = Raw::start(|_| ());
    let configure = |builder: ChannelBuilder| builder.max_requests(1).max_waiters(5);
    let channel = limited(configure, &[&server]);
    ready(&channel, 1).await;
    let first = spawn(&channel, true);
    let mut open = server.accept().await;
    let mut calls = Vec::new();
    for number in 1..=5 {
        let mut client = GreeterClient::new(channel.clone());
        let mut request = Request::new(hello("world"));
        request.extensions_mut().insert(WaitForReady::new(true));
        let value = number.to_string().parse().expect("a value");
        request.metadata_mut().insert("x-number", value);
        calls.push(tokio::spawn(async move {
            client.say_hello(request).await.map(drop)
        }));
        until("the call waits", || waiting(&channel) == number).await;
    }
    let status = ended(spawn(&channel, true))
        .await
        .expect_err("a full queue");
    assert_eq!(status.code(), Code::ResourceExhausted);
    // The third call gives up. The others are sent in the order of their arrival.
    calls.remove(2).abort();
    until("the call has ended", || waiting(&channel) == 4).await;
    for number in ["1", "2", "4", "5"] {
        reply(open).await;
        open = server.accept().await;
        assert_eq!(open.0.headers()["x-number"], number);
        assert!(server.try_accept().is_none(), "the limit is exceeded");
    }
    reply(open).await;
    ended(first).await.expect("an answer");
    for call in calls {
        call.await.expect("no panic").expect("an answer");
    }
    assert_eq!((in_flight(&channel), waiting(&channel)), (0, 0));
}

#[tokio::test]
async fn calls_that_fail_because_of_a_limit_are_counted() {
    let memory = Memory::default();
    let mut server = Raw::start(|_| ());
    let configure = |builder: ChannelBuilder| builder.max_requests(1).metrics(memory.clone());
    let channel = limited(configure, &[&server]);
    ready(&channel, 1).await;
    let call = spawn(&channel, false);
    let accepted = server.accept().await;
    for _ in 0..3 {
        dropped(&channel).await;
    }
    let waits = spawn(&channel, true);
    let waiting_calls = || memory.gauge("tonic_etcd.lb.waiting_calls{grpc.target=greeter}");
    until("the call waits", || waiting_calls() == Some(1.0)).await;
    reply(accepted).await;
    reply(server.accept().await).await;
    ended(call).await.expect("an answer");
    ended(waits).await.expect("an answer");
    let dropped = memory.sum("tonic_etcd.lb.dropped_calls{grpc.target=greeter}");
    assert_eq!(dropped, 3);
}

#[tokio::test]
async fn an_endpoint_at_its_limit_is_skipped() {
    for policy in [
        LbPolicy::Latency,
        LbPolicy::WeightedRoundRobin,
        LbPolicy::RingHash,
    ] {
        let mut servers = [Raw::start(|_| ()), Raw::start(|_| ()), Raw::start(|_| ())];
        let channel = limited(
            |builder| builder.policy(policy).max_requests_per_endpoint(2),
            &servers.each_ref(),
        );
        ready(&channel, 3).await;
        let calls: Vec<_> = (0..6).map(|_| spawn(&channel, false)).collect();
        let mut open = Vec::new();
        for server in &mut servers {
            open.push(server.accept().await);
            open.push(server.accept().await);
        }
        let status = dropped(&channel).await;
        let expected = "each endpoint that the call may use has 2 requests in flight";
        assert!(status.message().contains(expected), "{status}");
        reply(open.swap_remove(2)).await;
        until("a call has ended", || {
            channel
                .endpoints()
                .iter()
                .map(|one| one.in_flight)
                .sum::<usize>()
                == 5
        })
        .await;
        let next = spawn(&channel, false);
        open.push(servers[1].accept().await);
        for call in open {
            reply(call).await;
        }
        for call in calls.into_iter().chain([next]) {
            ended(call).await.expect("an answer");
        }
    }
}

#[tokio::test]
async fn with_wait_for_ready_a_call_waits_until_an_endpoint_is_below_its_limit() {
    let mut servers = [Raw::start(|_| ()), Raw::start(|_| ())];
    let channel = limited(
        |builder| builder.max_requests_per_endpoint(1),
        &servers.each_ref(),
    );
    ready(&channel, 2).await;
    let mut calls = vec![spawn(&channel, true), spawn(&channel, true)];
    let [first, second] = &mut servers;
    let (at_first, at_second) = (first.accept().await, second.accept().await);
    calls.push(spawn(&channel, true));
    until("the call waits", || waiting(&channel) == 1).await;
    assert_eq!(
        first.connections.load(Ordering::SeqCst),
        1,
        "a limit needs no further connection"
    );
    reply(at_second).await;
    reply(second.accept().await).await;
    reply(at_first).await;
    for call in calls {
        ended(call).await.expect("an answer");
    }
}

/// A stream counts until its response has ended or is dropped.
#[tokio::test]
async fn an_open_stream_counts_until_its_response_ends_or_is_dropped() {
    let mut server = Raw::start(|_| ());
    let channel = limited(one_request, &[&server]);
    ready(&channel, 1).await;
    let mut client = GreeterClient::new(channel.clone());
    for ends in [true, false] {
        let mut client = client.clone();
        let opening = tokio::spawn(async move { client.say_hellos(hello("world")).await });
        let (_request, mut respond) = server.accept().await;
        let mut sending = respond
            .send_response(grpc_head(), false)
            .expect("a live call");
        let mut stream = opening
            .await
            .expect("no panic")
            .expect("a stream")
            .into_inner();
        dropped(&channel).await;
        if ends {
            sending.send_trailers(support::ok()).expect("a live call");
            assert!(stream.message().await.expect("no error").is_none());
        } else {
            drop(stream);
        }
        assert_eq!(in_flight(&channel), 0);
        let next = spawn(&channel, false);
        reply(server.accept().await).await;
        ended(next).await.expect("an answer");
    }
    let cancelled = tokio::spawn(async move { client.say_hello(hello("world")).await });
    let _accepted = server.accept().await;
    dropped(&channel).await;
    cancelled.abort();
    until("the place is free", || in_flight(&channel) == 0).await;
    let next = spawn(&channel, false);
    reply(server.accept().await).await;
    ended(next).await.expect("an answer");
}

#[tokio::test]
async fn a_call_over_a_limit_is_not_retried_and_a_retry_counts_as_a_request() {
    let mut server = Raw::start(|_| ());
    let policy = |backoff| {
        RetryPolicy::new([Code::Unavailable])
            .initial_backoff(backoff)
            .max_backoff(backoff)
    };
    let minute = policy(Duration::from_secs(60));
    let channel = limited(|builder| builder.max_requests(1).retry(minute), &[&server]);
    ready(&channel, 1).await;
    let first = spawn(&channel, false);
    let accepted = server.accept().await;
    // With a retry, this call would last for a minute.
    dropped(&channel).await;
    reply(accepted).await;
    ended(first).await.expect("an answer");

    let short = policy(Duration::from_millis(5));
    let channel = limited(|builder| builder.max_requests(1).retry(short), &[&server]);
    ready(&channel, 1).await;
    let first = spawn(&channel, false);
    let accepted = server.accept().await;
    let second = spawn(&channel, true);
    until("the second call waits", || waiting(&channel) == 1).await;
    // The second call gets the place while the first one waits for its retry.
    fail(accepted, Code::Unavailable);
    let accepted = server.accept().await;
    let status = ended(first).await.expect_err("the limit");
    assert!(status.message().contains("its limit"), "{status}");
    reply(accepted).await;
    ended(second).await.expect("an answer");
}

#[tokio::test]
async fn a_hedge_over_a_limit_is_not_sent() {
    let mut servers = [Raw::start(|_| ()), Raw::start(|_| ())];
    let hedging = HedgingPolicy::new(2, Duration::from_millis(1));
    for (max, expected) in [(1, 1), (2, 2)] {
        let channel = limited(
            |builder| builder.max_requests(max).hedge(hedging.clone()),
            &servers.each_ref(),
        );
        ready(&channel, 2).await;
        let call = spawn(&channel, false);
        let mut open = Vec::new();
        until("the call is sent", || {
            open.extend(servers.iter_mut().filter_map(Raw::try_accept));
            open.len() == expected
        })
        .await;
        // The hedge of a channel without a limit, which is due later, arrives. So that of the call was due as well.
        let mut others = [Raw::start(|_| ()), Raw::start(|_| ())];
        let unlimited = limited(|builder| builder.hedge(hedging.clone()), &others.each_ref());
        ready(&unlimited, 2).await;
        let hedged = spawn(&unlimited, false);
        let [first, second] = &mut others;
        let _hedges = (first.accept().await, second.accept().await);
        hedged.abort();
        assert!(
            servers
                .iter_mut()
                .all(|server| server.try_accept().is_none())
        );
        assert_eq!(in_flight(&channel), expected);
        reply(open.remove(0)).await;
        ended(call).await.expect("an answer");
        assert_eq!(in_flight(&channel), 0, "the other attempt was cancelled");
    }
}

#[tokio::test]
async fn a_call_that_waits_for_an_endpoint_takes_no_place_of_other_calls() {
    let mut server = Raw::start(|_| ());
    let channel = limited(|builder| builder.max_requests(1), &[&server]);
    ready(&channel, 1).await;
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(hello("world"));
    request.extensions_mut().insert(WaitForReady::new(true));
    request.extensions_mut().insert(Select::version("2"));
    let selected = tokio::spawn(async move { client.say_hello(request).await });
    until("the call waits", || {
        waiting(&channel) == 1 && in_flight(&channel) == 0
    })
    .await;
    let call = spawn(&channel, false);
    reply(server.accept().await).await;
    ended(call).await.expect("an answer");
    selected.abort();
    until("no call waits", || waiting(&channel) == 0).await;
}

/// Other requests may hold all places, for example those on a connection that is closing.
#[tokio::test]
async fn a_call_needs_no_place_while_no_endpoint_is_ready() {
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .max_requests(1)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let held = channel.0.shared().place().expect("a free place");
    let call = spawn(&channel, false);
    until("the call waits", || waiting(&channel) == 1).await;
    drop(held);
    let mut server = Raw::start(|_| ());
    insert(&changes, &server.address(), Attributes::new());
    reply(server.accept().await).await;
    ended(call).await.expect("an answer");
    assert_eq!((in_flight(&channel), waiting(&channel)), (0, 0));
}

#[tokio::test]
async fn a_call_that_waits_for_a_place_fails_when_the_channel_ends() {
    let mut server = Raw::start(|_| ());
    let channel = limited(|builder| builder.max_requests(1), &[&server]);
    ready(&channel, 1).await;
    let _first = spawn(&channel, true);
    let _open = server.accept().await;
    let waits = spawn(&channel, true);
    until("the call waits", || waiting(&channel) == 1).await;
    channel.0.balancer.end("the test has ended it");
    let status = ended(waits).await.expect_err("the end of the channel");
    assert!(
        status.message().contains("the test has ended it"),
        "{status}"
    );
}

struct Panics;

impl PickPolicy for Panics {
    fn pick(&self, call: &PickInfo, _: &ReadyEndpoints<'_>) -> Option<usize> {
        assert!(
            call.headers().contains_key("x-valid"),
            "a fault of the policy"
        );
        None
    }
}

#[tokio::test]
async fn a_pick_that_panics_takes_no_place() {
    let mut server = Raw::start(|_| ());
    let channel = limited(
        |builder| builder.max_requests(1).pick_policy(Panics),
        &[&server],
    );
    ready(&channel, 1).await;
    let error = spawn(&channel, false).await.expect_err("a panic");
    assert!(error.is_panic());
    assert_eq!(in_flight(&channel), 0);
    let call = |channel: &BalancedChannel| {
        let mut client = GreeterClient::new(channel.clone());
        let mut request = Request::new(hello("world"));
        request.extensions_mut().insert(WaitForReady::new(true));
        let valid = "1".parse().expect("a value");
        request.metadata_mut().insert("x-valid", valid);
        tokio::spawn(async move { client.say_hello(request).await })
    };
    let first = call(&channel);
    let open = server.accept().await;
    // This call panics after it has waited for its place.
    let panics = spawn(&channel, true);
    until("the call waits", || waiting(&channel) == 1).await;
    reply(open).await;
    first.await.expect("no panic").expect("an answer");
    assert!(panics.await.expect_err("a panic").is_panic());
    let next = call(&channel);
    reply(server.accept().await).await;
    next.await.expect("no panic").expect("an answer");
    assert_eq!(in_flight(&channel), 0);
}

/// The wait can be long: the server chooses it.
#[tokio::test]
async fn a_failed_hedge_holds_no_place_while_the_call_waits_for_the_next() {
    let mut server = Raw::start(|_| ());
    let hedging = HedgingPolicy::new(2, Duration::from_millis(1));
    let channel = limited(|builder| builder.max_requests(1).hedge(hedging), &[&server]);
    ready(&channel, 1).await;
    let waits = spawn(&channel, false);
    let (request, mut respond) = server.accept().await;
    drop(request);
    let mut head = grpc_head();
    for (name, value) in [("grpc-status", "14"), ("grpc-retry-pushback-ms", "3600000")] {
        let value = value.parse().expect("a value");
        head.headers_mut().insert(name, value);
    }
    respond.send_response(head, true).expect("a live call");
    until("the place is free", || in_flight(&channel) == 0).await;
    let next = spawn(&channel, false);
    reply(server.accept().await).await;
    ended(next).await.expect("an answer");
    assert!(!waits.is_finished());
    waits.abort();
}

/// Calls that wait get their places when an endpoint becomes ready.
#[tokio::test]
async fn calls_that_wait_for_the_first_endpoint_are_sent_up_to_the_limit() {
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .max_requests(2)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let calls: Vec<_> = (0..5).map(|_| spawn(&channel, true)).collect();
    until("the calls wait", || waiting(&channel) == 5).await;
    let mut server = Raw::start(|_| ());
    insert(&changes, &server.address(), Attributes::new());
    for _ in 0..5 {
        let accepted = server.accept().await;
        assert!(in_flight(&channel) <= 2);
        reply(accepted).await;
    }
    for call in calls {
        ended(call).await.expect("an answer");
    }
}

/// The requests on an old connection count. When they end, waiting calls are sent on the new one.
#[tokio::test]
async fn requests_on_a_closing_connection_count_and_pass_their_places_to_the_next_connection() {
    let mut server = Raw::start(|_| ());
    let channel = limited(|builder| builder.max_requests_per_endpoint(2), &[&server]);
    ready(&channel, 1).await;
    let routing = Routing::avoiding([]);
    let routed = spawn_routed(&channel, &routing);
    let first = server.accept().await;
    let call = spawn(&channel, true);
    let open = [first, server.accept().await];
    channel.reconnect(&routing);
    until("the connection is replaced", || {
        server.connections.load(Ordering::SeqCst) == 2
    })
    .await;
    ready(&channel, 1).await;
    dropped(&channel).await;
    let waiters: Vec<_> = (0..2).map(|_| spawn(&channel, true)).collect();
    until("the calls wait", || waiting(&channel) == 2).await;
    for call in open {
        reply(call).await;
        reply(server.accept().await).await;
    }
    routed.await.expect("no panic").expect("a response");
    for call in [call].into_iter().chain(waiters) {
        ended(call).await.expect("an answer");
    }
}

#[tokio::test]
async fn a_call_with_large_metadata_on_a_connection_of_its_own_counts() {
    let mut server = Raw::start(|_| ());
    let channel = limited(one_request, &[&server]);
    ready(&channel, 1).await;
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(hello("world"));
    let large = "x".repeat(9_000).parse().expect("a value");
    request.metadata_mut().insert("x-large", large);
    let large = tokio::spawn(async move { client.say_hello(request).await });
    let accepted = server.accept().await;
    assert_eq!(server.connections.load(Ordering::SeqCst), 2);
    assert_eq!(channel.endpoints()[0].in_flight, 1, "it counts once");
    dropped(&channel).await;
    reply(accepted).await;
    large.await.expect("no panic").expect("an answer");
    until("the place is free", || in_flight(&channel) == 0).await;
    let next = spawn(&channel, false);
    reply(server.accept().await).await;
    ended(next).await.expect("an answer");
}

#[tokio::test]
async fn a_limit_of_zero_makes_the_channel_invalid() {
    let builders = [
        BalancedChannel::builder().max_requests(0),
        BalancedChannel::builder().max_requests_per_endpoint(0),
    ];
    for builder in builders {
        let channel = builder.addresses([refusing()]).connect_lazy();
        let status = say(&channel).await.expect_err("an invalid channel");
        assert!(
            status.message().contains("is 0, so every call would fail"),
            "{status}"
        );
    }
}

/// A server that records how many of its calls are in flight at once. Each call takes a random time.
fn measured(most: &Arc<AtomicI64>, streams: u32, seed: u64) -> Cut {
    let (now, most) = (Arc::new(AtomicI64::new(0)), Arc::clone(most));
    let rng = Arc::new(std::sync::Mutex::new(fastrand::Rng::with_seed(seed)));
    Raw::answering(
        move |builder| {
            builder.max_concurrent_streams(streams);
        },
        move |(request, mut respond): Accepted| {
            let (now, most, rng) = (Arc::clone(&now), Arc::clone(&most), Arc::clone(&rng));
            async move {
                let (micros, fails) = {
                    let mut rng = rng.lock().expect("no panic");
                    (rng.u64(..2_000), rng.u8(..10) == 0)
                };
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                let reset = std::future::poll_fn(|cx| respond.poll_reset(cx));
                let is_reset = timeout_micros(micros, reset).await;
                now.fetch_sub(1, Ordering::SeqCst);
                match (is_reset, fails) {
                    (true, _) => {}
                    (false, true) => respond.send_reset(Reason::INTERNAL_ERROR),
                    (false, false) => reply((request, respond)).await,
                }
            }
        },
    )
}

async fn timeout_micros(micros: u64, future: impl Future) -> bool {
    tokio::time::timeout(Duration::from_micros(micros), future)
        .await
        .is_ok()
}

/// Makes calls from many tasks. They end in all ways: by success, failure and, if `cancels`, cancellation and overrun. Returns the largest
/// number of calls that were in flight at each server.
async fn stress(
    seeds: &mut fastrand::Rng,
    (max, per_endpoint, streams): (usize, u32, u32),
    cancels: bool,
) -> [i64; 3] {
    let most: [Arc<AtomicI64>; 3] = Default::default();
    let servers = most
        .each_ref()
        .map(|most| measured(most, streams, seeds.u64(..)));
    let channel = BalancedChannel::builder()
        .max_requests(max)
        .max_requests_per_endpoint(per_endpoint)
        .connections_per_endpoint(2)
        .addresses(servers.iter().map(Cut::address))
        .connect_lazy();
    ready(&channel, 3).await;
    let calls = soak("calls of each task", 60, 1_000);
    let mut tasks = JoinSet::new();
    for _ in 0..24 {
        let (channel, mut rng) = (channel.clone(), seeds.fork());
        tasks.spawn(async move {
            let mut client = GreeterClient::new(channel.clone());
            for _ in 0..calls {
                let mut request = Request::new(hello("world"));
                let waits = rng.u8(..8) > 0;
                request.extensions_mut().insert(WaitForReady::new(waits));
                if cancels && rng.u8(..8) == 0 {
                    request.set_timeout(Duration::from_micros(rng.u64(..3_000)));
                }
                assert!(in_flight(&channel) <= max, "the limit of the channel");
                let call = client.say_hello(request);
                if cancels && rng.u8(..8) == 0 {
                    timeout_micros(rng.u64(..2_000), call).await;
                } else {
                    let _ = in_time("a call", call).await;
                }
            }
        });
    }
    while let Some(task) = in_time("all calls", tasks.join_next()).await {
        task.expect("no panic");
    }
    assert_eq!((in_flight(&channel), waiting(&channel)), (0, 0));
    idle(&channel).await;
    most.map(|most| most.load(Ordering::SeqCst))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn limits_are_never_exceeded_and_no_waiting_call_is_lost() {
    let seed = std::env::var("SEED").map_or_else(
        |_| fastrand::u64(..),
        |seed| seed.parse().expect("a number"),
    );
    println!("SEED={seed}");
    let mut seeds = fastrand::Rng::with_seed(seed);
    for limits in [(5, 100, 100), (100, 2, 100), (6, 3, 2), (7, 2, 1)] {
        stress(&mut seeds, limits, true).await;
        // The client counts a call that is not cancelled for longer than the server does.
        let most = stress(&mut seeds, limits, false).await;
        let (max, per_endpoint, _) = limits;
        let bound = i64::from(per_endpoint).min(i64::try_from(max).expect("a small limit"));
        assert!(
            most.iter().all(|most| *most <= bound),
            "{most:?}, {limits:?}"
        );
    }
}
