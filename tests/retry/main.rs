//! Calls that are sent again: the effects and the limits of a retry policy.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod hedging;
mod kills;
#[path = "../support/mod.rs"]
mod support;

use std::time::Duration;

use h2::Reason;
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::script::{self, Act, Server};
use support::{SOON, all_ready, eventually};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request, Response, Status};
use tonic_etcd::{
    BalancedChannel, LbPolicy, RetryPolicy,
    channel::{ChannelBuilder, HashKey, HedgingPolicy, RetryBudget, ServedBy},
};

/// Returns a channel over these servers once all of them are ready.
async fn over(builder: ChannelBuilder, servers: &[Server]) -> BalancedChannel {
    let addresses = servers.iter().map(|server| &server.address);
    let channel = builder
        .service("greeter")
        .seed(7)
        .addresses(addresses)
        .connect_lazy();
    all_ready(&channel, servers.len()).await;
    channel
}

/// Waits until no call is in flight.
async fn idle(channel: &BalancedChannel) {
    eventually("no call is in flight", async || {
        let known = channel.endpoints();
        known.iter().all(|endpoint| endpoint.in_flight == 0)
    })
    .await;
}

/// Returns a retry policy with a short backoff, to keep the tests quick.
fn policy() -> RetryPolicy {
    let (first, max) = (Duration::from_millis(1), Duration::from_millis(5));
    RetryPolicy::new([Code::Unavailable])
        .initial_backoff(first)
        .max_backoff(max)
}

fn retrying(policy: RetryPolicy) -> ChannelBuilder {
    BalancedChannel::builder().retry(policy)
}

fn hello(name: &str) -> HelloRequest {
    HelloRequest {
        name: name.to_owned(),
        replies: 1,
    }
}

async fn say_within(
    channel: &BalancedChannel,
    deadline: Option<Duration>,
) -> Result<Response<()>, Status> {
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(hello("world"));
    if let Some(deadline) = deadline {
        request.set_timeout(deadline);
    }
    let call = timeout(SOON, client.say_hello(request));
    let response = call.await.expect("an answer in time")?;
    Ok(response.map(drop))
}

async fn say(channel: &BalancedChannel) -> Result<Response<()>, Status> {
    say_within(channel, None).await
}

fn count(servers: &[Server]) -> usize {
    servers.iter().map(Server::count).sum()
}

const DOWN: Act = Act::Fail(Code::Unavailable, &[]);

#[tokio::test]
async fn a_retry_succeeds_at_another_server_and_both_sides_see_the_attempts() {
    let servers = [Server::always(DOWN).await, Server::always(Act::Reply).await];
    let channel = over(retrying(policy()), &servers).await;
    let mut retried = 0;
    for _ in 0..50 {
        let response = say(&channel)
            .await
            .expect("the other server serves the call");
        retried += usize::from(
            response
                .metadata()
                .contains_key("grpc-previous-rpc-attempts"),
        );
    }
    assert!(retried > 0);
    assert_eq!(
        servers[0].count(),
        retried,
        "each retry must follow one failure"
    );
    assert_eq!(servers[1].count(), 50);
    let seconds = servers[1].calls();
    let seconds: Vec<_> = seconds
        .iter()
        .filter_map(|seen| seen.previous.as_deref())
        .collect();
    assert_eq!(seconds.len(), retried);
    assert!(seconds.iter().all(|previous| *previous == "1"));
    assert!(
        servers[0]
            .calls()
            .iter()
            .all(|seen| seen.previous.is_none())
    );
    idle(&channel).await;
    let failures: u64 = channel.endpoints().iter().map(|one| one.failures).sum();
    assert_eq!(
        failures,
        u64::try_from(retried).unwrap(),
        "each failed attempt must be counted"
    );
}

#[tokio::test]
async fn the_error_lists_every_attempt_and_no_server_is_tried_twice() {
    let mut servers = Vec::new();
    for _ in 0..4 {
        servers.push(Server::always(DOWN).await);
    }
    let channel = over(retrying(policy()), &servers).await;
    let status = say(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().starts_with("as told (4 attempts: "),
        "{status}"
    );
    for server in &servers {
        assert_eq!(server.count(), 1, "each server must receive one attempt");
        let listed = format!("{} Unavailable", server.address);
        assert!(status.message().contains(&listed), "{status}");
    }
    idle(&channel).await;
}

#[tokio::test]
async fn with_two_servers_each_retry_uses_the_other_server() {
    let servers = [Server::always(DOWN).await, Server::always(DOWN).await];
    let channel = over(retrying(policy().max_attempts(5)), &servers).await;
    for _ in 0..10 {
        say(&channel).await.unwrap_err();
    }
    let numbered = |server: usize| {
        let calls = servers[server].calls();
        calls
            .into_iter()
            .map(move |seen| (seen.at, server, seen.previous))
    };
    let mut all: Vec<_> = numbered(0).chain(numbered(1)).collect();
    all.sort();
    assert_eq!(all.len(), 50);
    for pair in all.windows(2) {
        let is_retry = pair[1].2.is_some();
        assert!(!is_retry || pair[0].1 != pair[1].1, "{pair:?}");
    }
}

#[tokio::test]
async fn a_lone_server_is_retried() {
    let acts = |call| if call < 2 { DOWN } else { Act::Reply };
    let servers = [Server::start(acts).await];
    let channel = over(retrying(policy()), &servers).await;
    say(&channel).await.expect("the third attempt succeeds");
    let previous: Vec<_> = servers[0]
        .calls()
        .into_iter()
        .map(|seen| seen.previous)
        .collect();
    let number = |number: &str| Some(number.to_owned());
    assert_eq!(previous, [None, number("1"), number("2")]);
}

#[tokio::test]
async fn codes_outside_the_policy_are_returned_unchanged() {
    let refused = Act::Fail(Code::NotFound, &[("grpc-status-details-bin", "AQID")]);
    let servers = [Server::always(refused).await];
    let channel = over(retrying(policy()), &servers).await;
    let status = say(&channel).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::NotFound, "as told")
    );
    assert_eq!(status.details(), [1, 2, 3]);
    assert_eq!(servers[0].count(), 1);
}

#[tokio::test]
async fn without_a_policy_nothing_is_retried_or_changed() {
    let servers = [Server::always(DOWN).await];
    let elsewhere = BalancedChannel::builder()
        .retry_for("other.Service", policy())
        .retry_for("helloworld.Greeter/SayHellos", policy());
    for builder in [BalancedChannel::builder(), elsewhere] {
        let channel = over(builder, &servers).await;
        let before = count(&servers);
        let status = say(&channel).await.unwrap_err();
        assert_eq!(status.message(), "as told");
        assert_eq!(count(&servers), before + 1);
    }
}

#[tokio::test]
async fn each_method_has_its_own_policy() {
    let servers = [Server::always(DOWN).await];
    let builder = retrying(policy().max_attempts(5))
        .retry_for("helloworld.Greeter", policy().max_attempts(3))
        .retry_for("/helloworld.Greeter/SayHellos", policy().max_attempts(1));
    let channel = over(builder, &servers).await;
    say(&channel).await.unwrap_err();
    assert_eq!(count(&servers), 3, "the policy of the service must apply");
    let mut client = GreeterClient::new(channel.clone());
    let status = client.say_hellos(hello("stream")).await.unwrap_err();
    assert_eq!(status.message(), "as told");
    assert_eq!(count(&servers), 4, "the policy of the method must apply");
}

#[tokio::test]
async fn pushback_delays_or_stops_a_retry() {
    let later = Act::Fail(Code::Unavailable, &[("grpc-retry-pushback-ms", "300")]);
    let acts = move |call| if call == 0 { later.clone() } else { Act::Reply };
    let servers = [Server::start(acts).await];
    let channel = over(retrying(policy()), &servers).await;
    say(&channel).await.expect("the retry succeeds");
    let calls = servers[0].calls();
    let waited = calls[1].at.saturating_duration_since(calls[0].at);
    assert!(waited >= Duration::from_millis(300), "{waited:?}");

    for never in ["-1", "later"] {
        let headers: &[_] = Box::leak(Box::new([("grpc-retry-pushback-ms", never)]));
        let servers = [Server::always(Act::Fail(Code::Unavailable, headers)).await];
        let channel = over(retrying(policy()), &servers).await;
        let status = say(&channel).await.unwrap_err();
        assert!(status.message().contains("requests no retry"), "{status}");
        assert_eq!(count(&servers), 1, "{never}");
    }
}

#[tokio::test]
async fn the_default_backoff_grows_as_in_grfc_a6() {
    let servers = [Server::always(DOWN).await];
    let channel = over(retrying(RetryPolicy::new([Code::Unavailable])), &servers).await;
    say(&channel).await.unwrap_err();
    let calls = servers[0].calls();
    assert_eq!(calls.len(), 4);
    // The backoff is 100 ms, 200 ms and 400 ms, with a jitter of 20 %.
    for (pair, least) in calls.windows(2).zip([80, 160, 320]) {
        let waited = pair[1].at.saturating_duration_since(pair[0].at);
        assert!(waited >= Duration::from_millis(least), "{waited:?}");
    }
}

#[tokio::test]
async fn the_budget_stops_a_retry_storm_and_successful_calls_refill_it() {
    let down = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let is_down = std::sync::Arc::clone(&down);
    let acts = move |_| {
        let is_down = is_down.load(std::sync::atomic::Ordering::SeqCst);
        if is_down { DOWN } else { Act::Reply }
    };
    let servers = [Server::start(acts).await];
    let builder = retrying(policy()).retry_budget(RetryBudget::new(20, 0.5));
    let channel = over(builder, &servers).await;
    for _ in 0..100 {
        say(&channel).await.unwrap_err();
    }
    // The budget has 20 tokens, and each failure takes one. Retries are permitted while more than 10 are left. So the tenth failure is the
    // first that is not retried.
    assert!(count(&servers) < 110, "{} attempts", count(&servers));
    let status = say(&channel).await.unwrap_err();
    assert!(
        status.message().contains("retry budget is used up"),
        "{status}"
    );
    down.store(false, std::sync::atomic::Ordering::SeqCst);
    for _ in 0..40 {
        say(&channel).await.expect("the server serves again");
    }
    down.store(true, std::sync::atomic::Ordering::SeqCst);
    let before = count(&servers);
    say(&channel).await.unwrap_err();
    assert_eq!(
        count(&servers),
        before + 4,
        "the budget must permit all retries again"
    );
}

#[tokio::test]
async fn the_deadline_spans_all_attempts() {
    // The backoff would end after the deadline, so the call fails at once.
    let servers = [Server::always(DOWN).await];
    let minute = Duration::from_secs(60);
    let channel = over(
        retrying(policy().initial_backoff(minute).max_backoff(minute)),
        &servers,
    )
    .await;
    let status = say_within(&channel, Some(Duration::from_secs(10))).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("deadline leaves no time"),
        "{status}"
    );
    let previous = status.metadata().get("grpc-previous-rpc-attempts");
    assert!(
        previous.is_none(),
        "one attempt must not be reported as a retry"
    );

    // The deadline expires during the second attempt.
    let acts = |call| if call == 0 { DOWN } else { Act::Hang };
    let servers = [Server::start(acts).await];
    let channel = over(retrying(policy()), &servers).await;
    let status = say_within(&channel, Some(Duration::from_secs(2))).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let address = &servers[0].address;
    let listed = format!("(2 attempts: {address} Unavailable, {address} DeadlineExceeded)");
    assert!(status.message().contains("2s"), "{status}");
    assert!(status.message().contains(&listed), "{status}");
    let left = |seen: &script::Seen| seen.timeout.clone().expect("the request has a timeout");
    let calls = servers[0].calls();
    assert_ne!(
        left(&calls[0]),
        left(&calls[1]),
        "the retry must have a shorter timeout"
    );
    eventually("the second attempt is cancelled", async || {
        servers[0].cancelled() == 1
    })
    .await;
    idle(&channel).await;
}

#[tokio::test]
async fn a_response_that_has_started_is_not_retried() {
    let late = Act::HeadThenReset(Duration::from_secs(2));
    for act in [late, Act::FailLate(Code::Unavailable)] {
        let servers = [Server::always(act.clone()).await];
        let codes = [Code::Unavailable, Code::Internal];
        let channel = over(retrying(RetryPolicy::new(codes)), &servers).await;
        say(&channel).await.unwrap_err();
        assert_eq!(count(&servers), 1, "{act:?}");
        idle(&channel).await;
    }
}

#[tokio::test]
async fn a_response_head_that_was_not_delivered_does_not_prevent_a_retry() {
    let early = Act::HeadThenReset(Duration::from_millis(5));
    let servers = [
        Server::always(early).await,
        Server::always(Act::Reply).await,
    ];
    let (first, max) = (Duration::from_millis(1), Duration::from_millis(5));
    let named = RetryPolicy::new([Code::Internal])
        .initial_backoff(first)
        .max_backoff(max);
    let channel = over(retrying(named), &servers).await;
    let mut served = 0;
    for _ in 0..20 {
        let start = Instant::now();
        let outcome = say(&channel).await;
        // If headers arrive without a message, the channel delays them for 50 ms, and can retry in this time. On a busy machine, the reset
        // may be received too late.
        let late = Instant::now().saturating_duration_since(start) > Duration::from_millis(45);
        assert!(outcome.is_ok() || late, "{outcome:?}");
        served += usize::from(outcome.is_ok());
    }
    assert!(servers[0].count() > 0);
    assert_eq!(servers[1].count(), served);
    idle(&channel).await;
}

#[tokio::test]
async fn resets_and_http_errors_are_retried_according_to_their_codes() {
    for (act, code) in [
        (Act::Reset(Reason::INTERNAL_ERROR), Code::Internal),
        (
            Act::Reset(Reason::ENHANCE_YOUR_CALM),
            Code::ResourceExhausted,
        ),
        (Act::Http(503), Code::Unavailable),
    ] {
        let servers = [
            Server::always(act.clone()).await,
            Server::always(Act::Reply).await,
        ];
        let (first, max) = (Duration::from_millis(1), Duration::from_millis(5));
        let named = RetryPolicy::new([code])
            .initial_backoff(first)
            .max_backoff(max);
        let channel = over(retrying(named), &servers).await;
        for _ in 0..20 {
            say(&channel)
                .await
                .expect("the other server serves the call");
        }
        assert!(servers[0].count() > 0);
        let other = RetryPolicy::new([Code::Aborted]);
        let channel = over(retrying(other), &servers[..1]).await;
        let before = servers[0].count();
        let status = say(&channel).await.unwrap_err();
        assert_eq!(status.code(), code, "{act:?}: {status}");
        assert_eq!(servers[0].count(), before + 1);
    }
}

#[tokio::test]
async fn a_missing_endpoint_is_retried_as_unavailable() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refusing = listener.local_addr().unwrap().to_string();
    drop(listener);
    let channel = retrying(policy()).addresses([&refusing]).connect_lazy();
    let status = say(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let list = "(4 attempts: no ready endpoint (Unavailable), no ready endpoint (Unavailable), ";
    assert!(status.message().contains(list), "{status}");
    assert!(status.message().contains(&refusing), "{status}");
}

#[tokio::test]
async fn a_large_unary_request_is_resent_completely() {
    let servers = [Server::always(DOWN).await];
    let channel = over(retrying(policy()), &servers).await;
    let mut client = GreeterClient::new(channel);
    let large = hello(&"x".repeat(1 << 20));
    client.say_hello(large).await.unwrap_err();
    let calls = servers[0].calls();
    assert_eq!(calls.len(), 4);
    assert!(calls[0].body.len() > 1 << 20);
    assert!(calls.iter().all(|seen| seen.body == calls[0].body));
}

/// Sends a stream of three requests: two at once, and the third after a second attempt has begun or the call has ended.
async fn stream(act: Act, size: usize) -> (Result<Response<()>, Status>, Vec<script::Seen>) {
    let acts = move |call| if call == 0 { act.clone() } else { Act::Reply };
    let servers = [Server::start(acts).await];
    let channel = over(retrying(policy()), &servers).await;
    let mut client = GreeterClient::new(channel.clone());
    let (feed, requests) = mpsc::unbounded_channel();
    for name in ["a", "b"] {
        feed.send(hello(&name.repeat(size))).unwrap();
    }
    let call = tokio::spawn(async move {
        let call = client.greet_all(UnboundedReceiverStream::new(requests));
        timeout(SOON, call)
            .await
            .expect("an answer in time")
            .map(|reply| reply.map(drop))
    });
    eventually("a second attempt begins or the call ends", async || {
        servers[0].count() == 2 || call.is_finished()
    })
    .await;
    let _ = feed.send(hello("last"));
    drop(feed);
    let outcome = timeout(SOON, call).await.unwrap().unwrap();
    idle(&channel).await;
    (outcome, servers[0].calls())
}

#[tokio::test]
async fn a_request_stream_is_resent_from_its_start() {
    let (outcome, calls) = stream(Act::FailEarly(Code::Unavailable), 10).await;
    outcome.expect("the second attempt succeeds");
    assert_eq!(calls.len(), 2);
    let text = String::from_utf8_lossy(&calls[1].body).into_owned();
    for name in ["aaaaaaaaaa", "bbbbbbbbbb", "last"] {
        assert_eq!(text.matches(name).count(), 1, "{text:?}");
    }
}

#[tokio::test]
async fn a_request_stream_beyond_the_buffer_is_not_resent() {
    let (outcome, calls) = stream(Act::FailEarly(Code::Unavailable), 50_000).await;
    let status = outcome.unwrap_err();
    assert_eq!(calls.len(), 1);
    assert!(
        status
            .message()
            .contains("the request cannot be sent again"),
        "{status}"
    );
}

#[tokio::test]
async fn a_response_stream_is_retried_until_its_first_message() {
    let servers = [Server::start(|call| if call == 0 { DOWN } else { Act::Reply }).await];
    let channel = over(retrying(policy()), &servers).await;
    let mut client = GreeterClient::new(channel.clone());
    let mut replies = client
        .say_hellos(hello("stream"))
        .await
        .unwrap()
        .into_inner();
    assert!(replies.message().await.unwrap().is_some());
    assert!(replies.message().await.unwrap().is_none());
    assert_eq!(count(&servers), 2);
    drop(replies);
    idle(&channel).await;
}
