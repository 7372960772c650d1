//! Responses that are not gRPC: from proxies, from web servers, and from other protocols on the port.

use tokio::time::sleep;
use tonic::{Code, Status};
use tonic_etcd::{BalancedChannel, channel::EndpointState};

use super::support::callers::Callers;
use super::support::peer::foreign::{Foreign, Speaks};
use super::support::peer::{Answer, Manner, Peer};
use super::support::{all_ready, eventually};
use super::{
    addresses, hello, lazily, ms, over, retrying, say, send, shown, status, stream, support,
};

/// Responses of a proxy, a web server or a broken server, and the gRPC code for each (http-grpc-status-mapping.md).
const ANSWERS: [(Answer, &str, Code); 13] = [
    (html(200), "200", Code::Unknown),
    (html(400), "400", Code::Internal),
    (html(401), "401", Code::Unauthenticated),
    (html(403), "403", Code::PermissionDenied),
    (html(404), "404", Code::Unimplemented),
    (html(418), "418", Code::Unknown),
    (html(429), "429", Code::Unavailable),
    (html(500), "500", Code::Unknown),
    (html(502), "502", Code::Unavailable),
    (html(503), "503", Code::Unavailable),
    (html(504), "504", Code::Unavailable),
    (other(Some("application/json")), "200", Code::Unknown),
    (other(None), "200", Code::Unknown),
];

const fn html(status: u16) -> Answer {
    Answer::html(status)
}

const fn other(content_type: Option<&'static str>) -> Answer {
    Answer::Http {
        status: 200,
        content_type,
        body: "{\"it\":\"works\"}",
    }
}

/// Asserts that a message names the endpoint, the HTTP status and the content-type.
fn assert_named(status: &Status, peer: &Peer, http: &str, answer: Answer) {
    let message = status.message();
    let content_type = match answer {
        Answer::Http {
            content_type: Some(content_type),
            ..
        } => content_type,
        // Without a content-type, the message names the missing header.
        _ => "content-type",
    };
    for part in [&*peer.address.to_string(), http, content_type] {
        assert!(
            message.contains(part),
            "{answer:?}: {part:?} is missing in {message:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_non_grpc_answer_is_reported_with_its_code_and_origin() {
    let mut wrong = Vec::new();
    for (answer, http, code) in ANSWERS {
        let peer = Peer::answering(answer).await;
        let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
        let error = say(&channel, ms(2_000))
            .await
            .expect_err("a non-gRPC response must fail the call");
        if error.code() != code {
            wrong.push((http, code, error));
            continue;
        }
        assert_named(&error, &peer, http, answer);
        let streamed = stream(
            support::greeter::greeter_client::GreeterClient::new(channel.clone()),
            hello(),
        );
        let error = streamed
            .await
            .expect_err("a non-gRPC response must fail a stream");
        assert_eq!(error.code(), code, "{answer:?}: {error:?}");
        assert_named(&error, &peer, http, answer);
    }
    assert!(
        wrong.is_empty(),
        "{} of {} responses failed the call with a wrong code: {wrong:#?}",
        wrong.len(),
        ANSWERS.len()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_non_grpc_answer_counts_as_a_failure_and_is_the_last_error() {
    let mut wrong = Vec::new();
    for (answer, http, _) in ANSWERS {
        let peer = Peer::answering(answer).await;
        let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
        for _ in 0..5 {
            say(&channel, ms(2_000))
                .await
                .expect_err("a non-gRPC response must fail the call");
        }
        let shown = status(&channel, peer.address);
        let error = shown.last_error.clone().unwrap_or_default();
        if shown.failures < 5 || !error.contains(http) {
            wrong.push((answer, shown.failures, error));
        }
    }
    assert!(
        wrong.is_empty(),
        "each call must count as a failure, and `last_error` must contain the HTTP status: {wrong:#?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_without_trailers_is_an_error_and_a_failure() {
    let peer = Peer::answering(Answer::NoTrailers).await;
    let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
    for unary in [true, false] {
        let client = support::greeter::greeter_client::GreeterClient::new(channel.clone());
        let error = if unary {
            send(&channel, hello())
                .await
                .expect_err("a response without a status must fail the call")
        } else {
            stream(client, hello())
                .await
                .expect_err("a response without a status must fail the call")
        };
        assert!(
            [Code::Unknown, Code::Internal].contains(&error.code()),
            "{error:?}"
        );
        assert!(
            error.message().contains("without") && names_the_end(error.message()),
            "the message must name the missing part: {error:?}"
        );
        assert!(
            error.message().contains(&peer.address.to_string()),
            "the message must name the server: {error:?}"
        );
    }
    let known = status(&channel, peer.address);
    assert_eq!(
        known.failures, 2,
        "each call must count as a failure of the endpoint"
    );
    let error = known.last_error.expect("the endpoint must have an error");
    assert!(
        names_the_end(&error),
        "the last error must name the missing part: {error}"
    );
}

/// Returns whether a text names the part that is missing at the end of a response.
fn names_the_end(text: &str) -> bool {
    text.contains("trailers") || text.contains("status")
}

/// Runs a server with this answer beside `good` good servers, waits for 1 s, and then counts calls for 1.5 s. Returns the number of calls
/// that the server with this answer received, and its share of all calls in percent.
async fn share(answer: Answer, good: usize) -> (usize, f64) {
    let bad = Peer::answering(answer).await;
    // The good servers are slower, because a real reply takes longer than an error page.
    let manner = Manner {
        delay: ms(2),
        ..Manner::default()
    };
    let mut peers = vec![bad];
    for _ in 0..good {
        peers.push(Peer::start(manner.clone()).await);
    }
    let channel = over(BalancedChannel::builder(), &addresses(&peers)).await;
    let callers = Callers::start(&channel, CALLERS);
    sleep(ms(1_000)).await;
    let requests = || {
        (
            peers[0].requests(),
            peers.iter().map(Peer::requests).sum::<usize>(),
        )
    };
    let (before, all_before) = requests();
    sleep(ms(1_500)).await;
    let (after, all_after) = requests();
    let (calls, failed) = callers.stopped().await;
    let share = 100.0 * as_f64(after - before) / as_f64(all_after - all_before);
    println!(
        "{answer:?} beside {good}: {share:.2} % of the calls; of {calls} calls {}",
        shown(&failed)
    );
    (after - before, share)
}

fn as_f64(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap())
}

async fn gets_few_calls(good: usize) {
    let mut wrong = Vec::new();
    for answer in [
        html(200),
        html(403),
        html(429),
        html(503),
        other(None),
        Answer::NoTrailers,
    ] {
        let (count, share) = share(answer, good).await;
        // On a busy machine, there are few calls in total. One call of each caller may then be more than 1 % of all calls.
        if share > 1.0 && count > CALLERS {
            wrong.push((answer, share));
        }
    }
    assert!(
        wrong.is_empty(),
        "a failing server beside {good} good ones must get at most 1 % of the calls: {wrong:#?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_non_grpc_answers_gets_few_calls_beside_one_good_server() {
    gets_few_calls(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_non_grpc_answers_gets_few_calls_beside_four_good_servers() {
    gets_few_calls(4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unavailable_proxy_beside_a_good_server_fails_no_call_under_a_retry_policy() {
    let bad = Peer::answering(html(503)).await;
    let good = Peer::good().await;
    let channel = over(retrying(), &addresses([&bad, &good])).await;
    let callers = Callers::start(&channel, 4);
    super::all_well(callers, ms(1_000), "503 under a policy").await;
}

/// Every content-type that gRPC servers send is accepted, whatever follows `application/grpc`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_grpc_content_type_is_accepted() {
    for content_type in [
        "application/grpc",
        "application/grpc+proto",
        "application/grpc;charset=utf-8",
        "application/grpc; charset=utf-8",
        "Application/gRPC",
    ] {
        let peer = Peer::start(Manner {
            content_type: Some(content_type),
            ..Manner::default()
        })
        .await;
        let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
        say(&channel, ms(2_000)).await.expect(content_type);
        assert_eq!(status(&channel, peer.address).failures, 0, "{content_type}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_of_another_protocol_is_never_picked_and_is_named() {
    let mut wrong = Vec::new();
    for speaks in [Speaks::Http1, Speaks::Ssh, Speaks::Tls, Speaks::Redis] {
        let foreign = Foreign::start(speaks).await;
        let good = Peer::good().await;
        let all = [foreign.address.to_string(), good.address.to_string()];
        let channel = lazily(BalancedChannel::builder(), &all);
        let callers = Callers::start(&channel, 4);
        eventually("the foreign server was dialled", async || {
            let known = channel.endpoints();
            known.iter().any(|endpoint| endpoint.last_error.is_some())
        })
        .await;
        super::all_well(callers, ms(300), &format!("beside {speaks:?}")).await;
        let known = status(&channel, foreign.address);
        assert_eq!(known.calls, 0, "{speaks:?} must never be picked");
        assert_ne!(
            known.state,
            EndpointState::Ready,
            "{speaks:?} must not be ready"
        );
        let error = known.last_error.unwrap();
        println!("{speaks:?}: {error}; {} connections", foreign.connections());
        if !error.contains(speaks.name()) {
            wrong.push((speaks, error));
        }
    }
    assert!(
        wrong.is_empty(),
        "`last_error` must name the protocol of the peer: {wrong:#?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_error_of_a_call_without_a_grpc_server_names_the_protocol() {
    for speaks in [Speaks::Http1, Speaks::Ssh, Speaks::Tls, Speaks::Redis] {
        let foreign = Foreign::start(speaks).await;
        let channel = lazily(BalancedChannel::builder(), &[foreign.address.to_string()]);
        let error = say(&channel, ms(5_000))
            .await
            .expect_err("a server without gRPC must fail the call");
        assert_eq!(error.code(), Code::Unavailable, "{error:?}");
        assert!(
            error.message().contains(speaks.name()),
            "{speaks:?}: the error must name the protocol: {error:?}"
        );
    }
}

/// A server that answered with HTML gets calls again once it answers with gRPC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_recovers_gets_calls_again() {
    let sick = Peer::answering(html(503)).await;
    let good = Peer::good().await;
    let channel = over(BalancedChannel::builder(), &addresses([&sick, &good])).await;
    all_ready(&channel, 2).await;
    let callers = Callers::start(&channel, 4);
    sleep(ms(1_000)).await;
    sick.set(Manner::default());
    let before = sick.requests();
    // The failures have raised the latency estimate of the server. The estimate decays within seconds.
    eventually("the server receives calls again", async || {
        sick.requests() > before + 100
    })
    .await;
    callers.stopped().await;
}

const CALLERS: usize = 8;
