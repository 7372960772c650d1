//! Tests of the channel against real servers on loopback sockets.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http::Response;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request};
use tower::discover::Change;

use crate::{
    Address, BalancedChannel, LbPolicy,
    channel::{
        Attributes, EndpointState, FailurePercentageEjection, OutlierDetection, ServedBy,
        WaitForReady,
    },
};

mod faults;
mod greeter;
mod hashing;
mod limits;
mod load_reports;
mod messages;
mod metrics;
mod pick_policy;
mod pushback;
mod routes;
mod selection;
#[cfg(feature = "service-config")]
mod service_config;
mod streams;
mod subset;
mod support;
#[cfg(feature = "tls")]
mod tls;

use greeter::HelloRequest;
use greeter::greeter_client::GreeterClient;
use support::{
    Greeter, Raw, black_hole, grpc_head, idle, in_time, ready, refusing, reply, soak, timed, until,
};

type Changes = mpsc::UnboundedSender<Result<Change<Address, Attributes>, std::convert::Infallible>>;

fn hello(name: &str) -> HelloRequest {
    HelloRequest {
        name: name.to_owned(),
        replies: 1,
    }
}

fn over<I: Into<String>>(addresses: impl IntoIterator<Item = I>) -> BalancedChannel {
    BalancedChannel::builder()
        .service("greeter")
        .seed(7)
        .addresses(addresses)
        .connect_lazy()
}

/// Returns a channel, and the sender of its endpoint changes.
fn fed() -> (Changes, BalancedChannel) {
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .service("greeter")
        .seed(7)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    (changes, channel)
}

fn insert(changes: &Changes, address: &str, attributes: Attributes) {
    let address = address.parse().expect("an address");
    let change = Change::Insert(address, attributes);
    changes.send(Ok(change)).expect("a live channel");
}

fn remove(changes: &Changes, address: &str) {
    let address = address.parse().expect("an address");
    changes
        .send(Ok(Change::Remove(address)))
        .expect("a live channel");
}

async fn say(channel: &BalancedChannel) -> Result<String, tonic::Status> {
    let mut client = GreeterClient::new(channel.clone());
    let reply = in_time("a call", client.say_hello(hello("world"))).await?;
    Ok(reply.into_inner().message)
}

/// Makes this many calls, and returns how many of them each server has served. Panics if a call fails.
async fn tally(channel: &BalancedChannel, calls: usize) -> BTreeMap<String, usize> {
    let mut tally = BTreeMap::new();
    for _ in 0..calls {
        let message = say(channel).await.expect("no call fails");
        let name = message.rsplit(' ').next().unwrap_or_default().to_owned();
        *tally.entry(name).or_default() += 1;
    }
    tally
}

#[tokio::test]
async fn every_kind_of_call_works_and_leaves_no_call_in_flight() {
    let servers = [Greeter::start("alpha"), Greeter::start("beta")];
    let channel = over(servers.iter().map(Greeter::address));
    let mut client = GreeterClient::new(channel.clone());

    let unary = client.say_hello(hello("unary")).await.expect("an answer");
    let served_by = unary.extensions().get::<ServedBy>().expect("the endpoint");
    let addresses: Vec<_> = servers.iter().map(Greeter::address).collect();
    assert!(addresses.contains(&served_by.address().to_string()));
    assert!(unary.into_inner().message.starts_with("Hello unary"));

    let request = HelloRequest {
        replies: 100,
        ..hello("stream")
    };
    let replies = client.say_hellos(request).await.expect("a stream");
    assert_eq!(replies.into_inner().collect::<Vec<_>>().await.len(), 100);

    let requests = tokio_stream::iter((0..3).map(|number| hello(&number.to_string())));
    let reply = client.greet_all(requests).await.expect("an answer");
    assert!(reply.into_inner().message.contains("0, 1, 2"));

    let (feed, requests) = mpsc::unbounded_channel();
    let chat = client.chat(UnboundedReceiverStream::new(requests));
    let mut replies = in_time("a head before any message", chat)
        .await
        .expect("a stream")
        .into_inner();
    for turn in ["one", "two"] {
        feed.send(hello(turn)).expect("an open stream");
        let reply = in_time("a reply", replies.message())
            .await
            .expect("a reply");
        assert!(reply.expect("a message").message.contains(turn));
    }
    drop(feed);
    assert!(
        in_time("the end", replies.message())
            .await
            .expect("an end")
            .is_none()
    );
    drop(replies);
    idle(&channel).await;
    let calls: u64 = channel.endpoints().iter().map(|status| status.calls).sum();
    assert_eq!(calls, 4);
}

#[tokio::test]
async fn every_policy_distributes_calls_over_all_servers() {
    let servers = ["alpha", "beta", "gamma"].map(Greeter::start);
    for policy in [
        LbPolicy::Latency,
        LbPolicy::LeastRequest,
        LbPolicy::WeightedRoundRobin,
    ] {
        let channel = BalancedChannel::builder()
            .policy(policy)
            .addresses(servers.iter().map(Greeter::address))
            .connect_lazy();
        ready(&channel, 3).await;
        let tally = tally(&channel, 90).await;
        assert_eq!(tally.len(), 3, "{policy:?} skips a server: {tally:?}");
    }
}

#[tokio::test]
async fn a_large_message_passes_through_an_interceptor() {
    let server = Greeter::start("alpha");
    let channel = over([server.address()]);
    let mut client = GreeterClient::with_interceptor(channel, |mut request: Request<()>| {
        let value = "yes"
            .parse()
            .map_err(|_| tonic::Status::internal("a value"))?;
        request.metadata_mut().insert("intercepted", value);
        Ok(request)
    })
    .max_decoding_message_size(32 << 20)
    .max_encoding_message_size(32 << 20);
    let name = "x".repeat(16 << 20);
    let reply = in_time("a large message", client.say_hello(hello(&name)));
    let message = reply.await.expect("an answer").into_inner().message;
    assert!(message.len() > 16 << 20);
}

#[tokio::test]
async fn the_authority_is_the_address_of_the_endpoint_and_the_user_agent_names_the_library() {
    let mut raw = Raw::start(|_| ());
    let channel = BalancedChannel::builder()
        .user_agent("greeter/1.0")
        .addresses([raw.address()])
        .connect_lazy();
    let call = tokio::spawn({
        let channel = channel.clone();
        async move { say(&channel).await }
    });
    let (request, respond) = raw.accept().await;
    assert_eq!(
        request.uri().authority().expect("an authority").as_str(),
        raw.address()
    );
    assert_eq!(request.uri().scheme_str(), Some("http"));
    assert_eq!(request.uri().path(), "/helloworld.Greeter/SayHello");
    let user_agent = request.headers()["user-agent"].to_str().expect("text");
    assert!(
        user_agent.starts_with("greeter/1.0 tonic-balance/"),
        "{user_agent}"
    );
    assert_eq!(request.headers()["te"], "trailers");
    assert!(request.headers().get("grpc-timeout").is_none());
    reply((request, respond)).await;
    call.await.expect("no panic").expect("an answer");
}

#[tokio::test]
async fn no_call_fails_while_one_endpoint_is_down_and_another_never_responds() {
    let servers = [Greeter::start("alpha"), Greeter::start("beta")];
    let (_silent, hole) = black_hole();
    let mut addresses: Vec<_> = servers.iter().map(Greeter::address).collect();
    addresses.extend([refusing(), hole]);
    let channel = over(&addresses);
    let tally = tally(&channel, 1_000).await;
    assert_eq!(tally.values().sum::<usize>(), 1_000);
    let statuses = channel.endpoints();
    // The endpoint that refuses connections may be connecting again at this moment, so the test only checks that it is not ready.
    let failing = statuses.iter().find(|status| status.last_error.is_some());
    let failing = failing.expect("one endpoint refuses connections");
    assert_ne!(failing.state, EndpointState::Ready);
    let error = failing.last_error.as_deref().expect("a reason");
    assert!(error.contains("refused"), "{error}");
}

#[tokio::test]
async fn a_call_without_a_registered_endpoint_fails_at_once_with_the_reason() {
    let channel = over([""; 0]);
    let (outcome, took) = timed(say(&channel)).await;
    let status = outcome.expect_err("no endpoint");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("greeter: nothing is registered"),
        "{status}"
    );
    assert!(
        status.message().contains("0 of 0 endpoints ready"),
        "{status}"
    );
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn a_call_with_all_endpoints_down_fails_at_once_with_counts_and_the_last_cause() {
    let (one, two) = (refusing(), refusing());
    let channel = over([&one, &two]);
    let (outcome, took) = timed(say(&channel)).await;
    let status = outcome.expect_err("all endpoints refuse connections");
    assert_eq!(status.code(), Code::Unavailable);
    let message = status.message();
    assert!(message.contains("0 of 2 endpoints ready"), "{message}");
    assert!(
        message.contains(&one) || message.contains(&two),
        "{message}"
    );
    assert!(message.contains("refused"), "{message}");
    assert!(
        std::error::Error::source(&status).is_some(),
        "the status must have a source"
    );
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn calls_fail_after_the_startup_timeout_if_the_set_of_endpoints_is_unknown() {
    let stream =
        tokio_stream::pending::<Result<Change<Address, Attributes>, std::convert::Infallible>>();
    let (outcome, took) = timed(async {
        let channel = BalancedChannel::builder()
            .startup_timeout(Duration::from_secs(1))
            .discover(stream)
            .connect_lazy();
        (say(&channel).await, channel)
    })
    .await;
    let (outcome, channel) = outcome;
    let status = outcome.expect_err("the set is unknown");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("startup timeout"), "{status}");
    assert!(took >= Duration::from_millis(990), "{took:?}");
    let (outcome, took) = timed(say(&channel)).await;
    assert!(
        outcome.is_err() && took < Duration::from_millis(900),
        "the second call must not wait for the startup timeout again"
    );
}

#[tokio::test]
async fn an_invalid_value_of_an_option_makes_the_channel_invalid() {
    let builder = || BalancedChannel::builder().addresses(["127.0.0.1:1"]);
    for (builder, word) in [
        (builder().max_backoff(Duration::ZERO), "max_backoff"),
        (
            builder().connections_per_endpoint(usize::MAX),
            "connections_per_endpoint",
        ),
        (
            builder().initial_stream_window_size(0),
            "initial_stream_window_size",
        ),
        (
            builder().initial_connection_window_size(1 << 10),
            "initial_connection_window_size",
        ),
    ] {
        let error = builder.connect().await.expect_err(word).to_string();
        assert!(
            error.contains(word) && error.contains("(unnamed)"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn an_invalid_address_is_reported() {
    let channel = over(["not an address"]);
    let status = say(&channel).await.expect_err("no endpoint");
    assert!(status.message().contains("\"not an address\""), "{status}");
}

#[tokio::test]
async fn a_wait_for_ready_call_is_served_by_a_new_endpoint() {
    let (changes, channel) = fed();
    insert(&changes, &refusing(), Attributes::new());
    until("the first attempt has failed", || {
        channel
            .endpoints()
            .iter()
            .any(|status| status.state == EndpointState::TransientFailure)
    })
    .await;
    assert!(
        say(&channel).await.is_err(),
        "a call must not wait by default"
    );
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(hello("patient"));
    request.extensions_mut().insert(WaitForReady::new(true));
    let call = tokio::spawn(async move { client.say_hello(request).await });
    let server = Greeter::start("late");
    insert(&changes, &server.address(), Attributes::new());
    let reply = in_time("a call", call).await.expect("no panic");
    assert!(
        reply
            .expect("an answer")
            .into_inner()
            .message
            .ends_with("late")
    );
}

#[tokio::test]
async fn a_wait_ends_at_the_deadline_and_the_error_states_its_cause() {
    let channel = BalancedChannel::builder()
        .service("greeter")
        .wait_for_ready(true)
        .timeout(Duration::from_secs(1))
        .addresses([refusing()])
        .connect_lazy();
    let status = say(&channel).await.expect_err("no endpoint becomes ready");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(
        status.message().contains("waiting for an endpoint"),
        "{status}"
    );
    assert!(
        status.message().contains("0 of 1 endpoints ready"),
        "{status}"
    );
    assert!(status.message().contains("refused"), "{status}");
}

#[tokio::test]
async fn the_deadline_applies_to_a_server_that_does_not_respond() {
    let mut raw = Raw::start(|_| ());
    let channel = over([raw.address()]);
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(hello("slow"));
    request.set_timeout(Duration::from_millis(100));
    let call = tokio::spawn(async move { client.say_hello(request).await });
    let (request, mut respond) = raw.accept().await;
    assert!(request.headers().contains_key("grpc-timeout"));
    let status = in_time("a call", call)
        .await
        .expect("no panic")
        .expect_err("an exceeded deadline");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let reset = in_time("a reset", std::future::poll_fn(|cx| respond.poll_reset(cx))).await;
    assert_eq!(
        reset.expect("a reset"),
        Reason::CANCEL,
        "the server must receive a reset with CANCEL"
    );
    idle(&channel).await;
}

#[tokio::test]
async fn the_deadline_starts_when_the_future_of_the_call_is_first_polled() {
    use tower::Service;
    let mut raw = Raw::start(|_| ());
    let mut channel = over([raw.address()]);
    let request = http::Request::post("/helloworld.Greeter/SayHello")
        .header("grpc-timeout", "30S")
        .body(tonic::body::Body::empty())
        .expect("a request");
    let call = channel.call(request);
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(60)).await;
    tokio::time::resume();
    let call = tokio::spawn(call);
    reply(raw.accept().await).await;
    let response = in_time("a call", call).await.expect("no panic");
    response.expect("the call has 30 s from its first poll on");
}

#[tokio::test]
async fn a_dropped_call_is_cancelled_at_the_server() {
    let mut raw = Raw::start(|_| ());
    let channel = over([raw.address()]);
    let call = tokio::spawn({
        let channel = channel.clone();
        async move { say(&channel).await }
    });
    let (_request, mut respond) = raw.accept().await;
    call.abort();
    let reset = in_time("a reset", std::future::poll_fn(|cx| respond.poll_reset(cx))).await;
    assert_eq!(reset.expect("a reset"), Reason::CANCEL);
    idle(&channel).await;
}

#[tokio::test]
async fn a_removed_endpoint_gets_no_new_calls_and_finishes_those_in_flight() {
    let (changes, channel) = fed();
    let mut old = Raw::start(|_| ());
    insert(&changes, &old.address(), Attributes::new());
    let in_flight = tokio::spawn({
        let channel = channel.clone();
        async move { say(&channel).await }
    });
    let call = old.accept().await;
    let new = Greeter::start("new");
    insert(&changes, &new.address(), Attributes::new());
    ready(&channel, 2).await;
    remove(&changes, &old.address());
    until("the channel applies the removal", || {
        channel
            .endpoints()
            .iter()
            .any(|status| status.state == EndpointState::Draining)
    })
    .await;
    assert_eq!(tally(&channel, 50).await.len(), 1);
    assert!(
        old.accepted.try_recv().is_err(),
        "a removed endpoint was called"
    );
    reply(call).await;
    in_flight
        .await
        .expect("no panic")
        .expect("the call in flight is finished");
    until("the endpoint is removed from the status", || {
        channel.endpoints().len() == 1
    })
    .await;
    until("the connection of the endpoint is closed", || {
        old.connections.load(Ordering::SeqCst) == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_no_longer_listed_is_not_picked() {
    const ENDPOINTS: usize = 400;
    let raw = Raw::start(|_| ());
    let to = raw.address;
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .connector(move |_| tokio::net::TcpStream::connect(to))
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let address = |index: usize| format!("10.0.{}.{}:1", index / 256, index % 256);
    for index in 0..ENDPOINTS {
        insert(&changes, &address(index), Attributes::new());
    }
    ready(&channel, ENDPOINTS).await;
    // The removals are sent as one batch. Picks can already see the first removals while the channel's background task still applies the
    // last ones.
    for index in 1..ENDPOINTS {
        remove(&changes, &address(index));
    }
    let shared = channel.0.shared();
    loop {
        let listed = channel.endpoints();
        let crate::balance::Pick::Taken(permit) = shared.pick(
            &crate::balance::PickKey::Any,
            &crate::balance::SplitDraw::default(),
            |_| true,
        ) else {
            unreachable!("no endpoint is left");
        };
        let picked = permit.endpoint().address();
        assert!(
            listed.iter().any(|status| status.address == *picked),
            "{picked} was picked when only {} were listed",
            listed.len()
        );
        if listed.len() == 1 {
            break;
        }
    }
}

#[tokio::test]
async fn attributes_change_without_a_reconnect() {
    // The policy compares calls in flight and not latencies, because the latencies of servers that share one busy process differ too much.
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .policy(LbPolicy::LeastRequest)
        .seed(7)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let servers = [Greeter::start("light"), Greeter::start("heavy")];
    for server in &servers {
        insert(&changes, &server.address(), Attributes::new());
    }
    ready(&channel, 2).await;
    let calls = tally(&channel, 400).await;
    assert!(calls.values().all(|&calls| calls > 100), "{calls:?}");
    insert(
        &changes,
        &servers[1].address(),
        Attributes::new().with_weight(9),
    );
    until("the channel applies the weight", || {
        channel.endpoints().iter().any(|status| status.weight == 9)
    })
    .await;
    // Picks use the new weight when the next ready set (the set of connections from which picks are made) is published.
    let heavy = async { while tally(&channel, 400).await["heavy"] <= 300 {} };
    in_time("the share of the heavy endpoint", heavy).await;
    assert!(
        channel
            .endpoints()
            .iter()
            .all(|status| status.connections == 1)
    );
}

#[tokio::test]
async fn a_last_resort_serves_only_while_nothing_else_is_ready_and_is_never_dialled() {
    let (changes, channel) = fed();
    let (held, fresh) = (Greeter::start("held"), Greeter::start("fresh"));
    insert(&changes, &held.address(), Attributes::new());
    ready(&channel, 1).await;
    insert(
        &changes,
        &held.address(),
        Attributes::new().with_last_resort(true),
    );
    until("the channel applies the last resort", || {
        channel.endpoints()[0].last_resort
    })
    .await;
    assert_eq!(
        tally(&channel, 10).await["held"],
        10,
        "a last resort must serve calls while no other endpoint exists"
    );
    insert(&changes, &fresh.address(), Attributes::new());
    ready(&channel, 2).await;
    let served = async { while !tally(&channel, 1).await.contains_key("fresh") {} };
    in_time("a call to the new endpoint", served).await;
    assert_eq!(
        tally(&channel, 10).await["fresh"],
        10,
        "a last resort must receive no calls while another endpoint is ready"
    );
    remove(&changes, &fresh.address());
    until("the channel applies the removal", || {
        channel.endpoints().len() == 1
    })
    .await;
    assert_eq!(tally(&channel, 10).await["held"], 10);

    let mut stranger = {
        let port = held.address.port();
        held.shut_down().await;
        Raw::start_on(port, |_| ())
    };
    let status = say(&channel).await.expect_err("the connection is closed");
    assert_eq!(status.code(), Code::Unavailable);
    // A new endpoint that is a last resort is not dialled either.
    let other = Raw::start(|_| ());
    insert(
        &changes,
        &other.address(),
        Attributes::new().with_last_resort(true),
    );
    // The sleep is longer than the first backoff, so any dial happens before the end of the sleep.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(channel.endpoints().len(), 2);
    let dialled = other.connections.load(Ordering::SeqCst);
    assert_eq!(dialled, 0, "the new last resort was dialled");
    assert!(stranger.accepted.try_recv().is_err());
    assert_eq!(
        stranger.connections.load(Ordering::SeqCst),
        0,
        "the last resort was dialled"
    );
}

#[tokio::test]
async fn a_new_registration_ends_the_backoff() {
    let (changes, stream) = mpsc::unbounded_channel();
    let dials = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&dials);
    let channel = BalancedChannel::builder()
        .connector(move |address: Address| {
            counted.fetch_add(1, Ordering::SeqCst);
            async move { tokio::net::TcpStream::connect(address.as_str()).await }
        })
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let address = refusing();
    // After each failure the endpoint waits for a backoff of about 1 s. This is longer than the 500 ms within which the test expects each
    // dial.
    insert(&changes, &address, Attributes::new().with_generation(1));
    for generation in 2..=4 {
        until("the endpoint is failing", || {
            channel.endpoints()[..]
                .iter()
                .any(|status| status.state == EndpointState::TransientFailure)
        })
        .await;
        let before = dials.load(Ordering::SeqCst);
        insert(
            &changes,
            &address,
            Attributes::new().with_generation(generation),
        );
        let dialled = until("the endpoint is dialled", || {
            dials.load(Ordering::SeqCst) > before
        });
        let ((), took) = timed(dialled).await;
        assert!(
            took < Duration::from_millis(500),
            "the dial waited for the backoff: {took:?}"
        );
    }
    let port = address
        .rsplit(':')
        .next()
        .expect("a port")
        .parse()
        .expect("a port");
    let server = Greeter::start_with("back", port, |server| server);
    insert(&changes, &address, Attributes::new().with_generation(9));
    let ((), took) = timed(ready(&channel, 1)).await;
    assert!(
        took < Duration::from_millis(500),
        "the dial waited for the backoff: {took:?}"
    );
    drop(server);
}

#[tokio::test]
async fn an_outlier_stays_ejected_until_it_is_registered_again() {
    let (changes, stream) = mpsc::unbounded_channel();
    let detection = OutlierDetection::new()
        .without_success_rate()
        .interval(Duration::from_millis(100))
        .base_ejection_time(Duration::from_secs(300))
        .max_ejection_percent(50)
        .failure_percentage(
            FailurePercentageEjection::new()
                .threshold(50)
                .minimum_hosts(2)
                .request_volume(5),
        );
    let channel = BalancedChannel::builder()
        .policy(LbPolicy::WeightedRoundRobin)
        .outlier_detection(detection)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let good = [Greeter::start("alpha"), Greeter::start("beta")];
    let bad = Raw::answering(
        |_| (),
        |(_, mut respond)| async move {
            let mut head = Response::new(());
            let unavailable = "14".parse().expect("a value");
            head.headers_mut().insert("grpc-status", unavailable);
            let _ = respond.send_response(head, true);
        },
    );
    for server in &good {
        insert(&changes, &server.address(), Attributes::new());
    }
    let ejected = || {
        let mut endpoints = channel.endpoints().into_iter();
        endpoints.any(|status| status.ejected && status.address.as_str() == bad.address())
    };
    for generation in 1..=3 {
        insert(
            &changes,
            &bad.address(),
            Attributes::new().with_generation(generation),
        );
        ready(&channel, 3).await;
        until("the endpoint is not ejected", || !ejected()).await;
        let out = async {
            while !ejected() {
                drop(say(&channel).await);
            }
        };
        in_time("the ejection", out).await;
        let served = tally(&channel, 50).await;
        assert_eq!(served.len(), 2, "{served:?}");
    }
}

#[tokio::test]
async fn a_server_with_a_limit_of_one_stream_serves_a_hundred_callers() {
    let running = Arc::new(AtomicUsize::new(0));
    let server = Raw::answering(
        |builder| {
            builder.max_concurrent_streams(1);
        },
        move |call| {
            let running = Arc::clone(&running);
            async move {
                assert!(
                    running.fetch_add(1, Ordering::SeqCst) < 2,
                    "more than two calls run at once"
                );
                tokio::task::yield_now().await;
                running.fetch_sub(1, Ordering::SeqCst);
                reply(call).await;
            }
        },
    );
    let channel = over([server.address()]);
    let mut calls = JoinSet::new();
    for _ in 0..100 {
        let channel = channel.clone();
        calls.spawn(async move { say(&channel).await.map(drop) });
    }
    let outcomes = in_time("a hundred calls", calls.join_all()).await;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(
        channel.endpoints()[0].connections,
        2,
        "a second connection must be opened when the streams are used up"
    );
    idle(&channel).await;
}

#[tokio::test]
async fn a_caller_that_retries_in_a_loop_does_not_starve_other_tasks() {
    let channel = BalancedChannel::builder()
        .addresses([refusing()])
        .connect_lazy();
    until("the endpoint has failed", || {
        let known = channel.endpoints();
        known
            .iter()
            .any(|one| one.state == EndpointState::TransientFailure)
    })
    .await;
    let turn = tokio::spawn(async {});
    let mut calls = 0;
    while !turn.is_finished() {
        say(&channel).await.expect_err("no endpoint is ready");
        calls += 1;
        assert!(calls < 10_000, "the other task is starved");
    }
}

#[tokio::test]
async fn calls_beyond_max_waiters_are_rejected() {
    let channel = BalancedChannel::builder()
        .wait_for_ready(true)
        .max_waiters(3)
        .addresses([refusing()])
        .connect_lazy();
    let mut calls = JoinSet::new();
    for _ in 0..4 {
        let channel = channel.clone();
        calls.spawn(async move { say(&channel).await });
    }
    let first = in_time("a refusal", calls.join_next())
        .await
        .expect("a call");
    let status = first.expect("no panic").expect_err("one call too many");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("3 calls are waiting"), "{status}");
}

#[tokio::test]
async fn dropping_the_last_clone_closes_the_connections() {
    let mut raw = Raw::start(|_| ());
    let channel = over([raw.address()]);
    let call = tokio::spawn(async move { say(&channel).await });
    let accepted = raw.accept().await;
    reply(accepted).await;
    call.await.expect("no panic").expect("an answer");
    until("the connection is closed", || {
        raw.connections.load(Ordering::SeqCst) == 0
    })
    .await;
}

#[tokio::test]
async fn an_endpoint_with_several_connections_serves_all_calls() {
    let server = Greeter::start("alpha");
    let channel = BalancedChannel::builder()
        .connections_per_endpoint(4)
        .addresses([server.address()])
        .connect_lazy();
    until("four connections are open", || {
        channel
            .endpoints()
            .iter()
            .any(|status| status.connections == 4)
    })
    .await;
    assert_eq!(tally(&channel, 100).await["alpha"], 100);
    let status = &channel.endpoints()[0];
    assert_eq!(
        (status.calls, status.in_flight, status.failures),
        (100, 0, 0)
    );
    assert!(
        status
            .latency
            .is_some_and(|latency| latency > Duration::ZERO)
    );
}

#[tokio::test]
async fn a_custom_connector_is_used() {
    let server = Greeter::start("far");
    let to = server.address;
    let channel = BalancedChannel::builder()
        .connector(move |_| tokio::net::TcpStream::connect(to))
        .addresses(["nowhere.invalid:1"])
        .connect_lazy();
    assert!(say(&channel).await.expect("an answer").ends_with("far"));
}

#[tokio::test]
async fn a_panic_of_the_connector_counts_as_a_failed_dial() {
    let channel = BalancedChannel::builder()
        .connector(|_| async {
            panic!("a panic in a connector") as std::io::Result<tokio::io::DuplexStream>
        })
        .addresses(["127.0.0.1:1"])
        .connect_lazy();
    let status = say(&channel).await.expect_err("no connection");
    assert!(status.message().contains("panicked"), "{status}");
}

#[tokio::test]
async fn a_host_name_is_resolved() {
    let server = Greeter::start("alpha");
    let channel = over([format!("localhost:{}", server.address.port())]);
    assert!(say(&channel).await.is_ok());
}

#[tokio::test]
async fn a_response_without_a_body_is_valid() {
    let server = Raw::answering(
        |_| (),
        |(_, mut respond)| async move {
            let mut head = Response::new(());
            head.headers_mut()
                .insert("grpc-status", "5".parse().expect("a value"));
            head.headers_mut()
                .insert("grpc-message", "nobody".parse().expect("a value"));
            let _ = respond.send_response(head, true);
        },
    );
    let channel = over([server.address()]);
    let status = say(&channel).await.expect_err("not found");
    assert_eq!(
        (status.code(), status.message()),
        (Code::NotFound, "nobody")
    );
    assert_eq!(
        channel.endpoints()[0].failures,
        0,
        "NOT_FOUND must not count as a failure of the endpoint"
    );
    assert_eq!(channel.endpoints()[0].in_flight, 0);
}

#[tokio::test]
async fn ten_thousand_concurrent_calls_are_all_served() {
    let servers = [Greeter::start("alpha"), Greeter::start("beta")];
    let channel = over(servers.iter().map(Greeter::address));
    let mut calls = JoinSet::new();
    for _ in 0..10_000 {
        let channel = channel.clone();
        calls.spawn(async move { say(&channel).await.map(drop) });
    }
    // Calls and servers share one thread, so the timeout is long.
    let bound = Duration::from_secs(90);
    let outcomes = tokio::time::timeout(bound, calls.join_all()).await;
    let outcomes = outcomes.expect("ten thousand calls within 90 s");
    assert!(outcomes.iter().all(Result::is_ok));
    idle(&channel).await;
}

#[tokio::test]
async fn a_body_read_frame_by_frame_releases_its_window() {
    // The response is ten times as large as a stream window.
    let server = Raw::answering(
        |_| (),
        |(_, mut respond)| async move {
            let mut stream = respond.send_response(grpc_head(), false).expect("a head");
            // A message of 1 024 bytes after gRPC's prefix of 5 bytes: the tag and the length of the field, and the text.
            let message = [&[0, 0, 0, 4, 0, 10, 0xfd, 7][..], &[b'x'; 1021]].concat();
            let message = Bytes::from(message);
            for _ in 0..10_000 {
                if stream.send_data(message.clone(), false).is_err() {
                    return;
                }
            }
            let _ = stream.send_trailers(support::ok());
        },
    );
    let channel = over([server.address()]);
    let mut client = GreeterClient::new(channel.clone());
    let replies = client
        .say_hellos(hello("much"))
        .await
        .expect("a stream")
        .into_inner();
    let replies = in_time("ten thousand messages", replies.collect::<Vec<_>>()).await;
    assert_eq!(replies.iter().filter(|reply| reply.is_ok()).count(), 10_000);
    idle(&channel).await;
}
