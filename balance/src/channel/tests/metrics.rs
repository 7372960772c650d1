//! The values of the instruments of a channel.

use std::sync::atomic::{AtomicUsize, Ordering};

use h2::Reason;
use http::HeaderMap;
use tokio::time::sleep;
use tonic::Status;
use tower::ServiceExt;

use super::support::{Cut, EMPTY_MESSAGE};
use super::*;
use crate::RetryPolicy;
use crate::channel::{ChannelBuilder, HedgingPolicy};
use crate::error::ChannelError;
use crate::metrics::Metrics;
use crate::metrics::tests::memory::Memory;

const CALL: &str = "{grpc.method=helloworld.Greeter/SayHello,grpc.target=greeter}";

/// Returns the key of an instrument with the labels of an ended `SayHello`.
fn ended(instrument: &str, status: &str) -> String {
    keyed(instrument, "helloworld.Greeter/SayHello", status)
}

fn keyed(instrument: &str, method: &str, status: &str) -> String {
    format!(
        "grpc.client.{instrument}{{grpc.method={method},grpc.status={status},grpc.target=greeter}}"
    )
}

fn everything(memory: &Memory) -> Metrics {
    let instruments = crate::metrics::instruments().iter();
    instruments.fold(Metrics::new(memory.clone()), |metrics, instrument| {
        metrics.enable(instrument.name())
    })
}

/// Returns a channel that records everything, after all its endpoints are ready.
async fn recorded(
    configure: impl FnOnce(ChannelBuilder) -> ChannelBuilder,
    addresses: &[String],
) -> (Memory, BalancedChannel) {
    let memory = Memory::default();
    let builder = BalancedChannel::builder().service("greeter").seed(7);
    let builder = configure(builder.metrics(everything(&memory)));
    let channel = builder.addresses(addresses).connect_lazy();
    ready(&channel, addresses.len()).await;
    (memory, channel)
}

/// Starts a server that answers the nth call, counted from 0, with the status that the function returns, or resets the stream.
fn scripted(act: impl Fn(usize) -> Result<Code, Reason> + Send + Sync + 'static) -> Cut {
    let (calls, act) = (Arc::new(AtomicUsize::new(0)), Arc::new(act));
    Raw::answering(
        |_| {},
        move |(request, mut respond)| {
            let act = act(calls.fetch_add(1, Ordering::SeqCst));
            async move {
                match act {
                    Ok(Code::Ok) => reply((request, respond)).await,
                    Ok(code) => {
                        let mut head = grpc_head();
                        let status = (code as i32).into();
                        head.headers_mut().insert("grpc-status", status);
                        let _ = respond.send_response(head, true);
                    }
                    Err(reason) => respond.send_reset(reason),
                }
            }
        },
    )
}

fn quick_retry() -> RetryPolicy {
    let (first, max) = (Duration::from_millis(10), Duration::from_millis(20));
    RetryPolicy::new([Code::Unavailable])
        .initial_backoff(first)
        .max_backoff(max)
}

#[tokio::test]
async fn a_successful_call_is_measured_once_and_further_calls_create_no_handles() {
    let server = Greeter::start("alpha");
    let (memory, channel) = recorded(|builder| builder, &[server.address()]).await;
    let message = say(&channel).await.expect("an answer");
    let request = 2 + "world".len() + 2;
    let response = 2 + message.len();
    let bytes = |size: usize| vec![f64::from(u32::try_from(size).expect("small"))];
    let started = format!("grpc.client.attempt.started{CALL}");
    assert_eq!(memory.sum(&started), 1);
    let sent = ended("attempt.sent_total_compressed_message_size", "OK");
    assert_eq!(memory.values(&sent), bytes(request));
    let received = ended("attempt.rcvd_total_compressed_message_size", "OK");
    assert_eq!(memory.values(&received), bytes(response));
    let attempt = memory.values(&ended("attempt.duration", "OK"));
    let call = memory.values(&ended("call.duration", "OK"));
    assert_eq!((attempt.len(), call.len()), (1, 1));
    assert!(0.0 < attempt[0] && attempt[0] <= call[0] && call[0] < 20.0);
    let handles = memory.handles();
    for _ in 0..20 {
        say(&channel).await.expect("an answer");
    }
    assert_eq!(memory.sum(&started), 21);
    assert_eq!(memory.values(&ended("call.duration", "OK")).len(), 21);
    assert_eq!(memory.handles(), handles, "a call has resolved labels");
    let keys = memory.keys();
    assert!(
        keys.iter()
            .all(|key| !key.contains("call.retr") && !key.contains("hedges")),
        "zero was recorded: {keys:?}"
    );
}

#[tokio::test]
async fn requests_that_no_generated_client_has_made_are_recorded_as_other() {
    let server = Greeter::start("alpha");
    let (memory, channel) = recorded(|builder| builder, &[server.address()]).await;
    for path in ["/helloworld.Greeter/SayHello", "/a.B/C"] {
        let mut request = http::Request::new(tonic::body::Body::empty());
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = path.parse().expect("a path");
        let _ = channel.clone().oneshot(request).await;
    }
    let started = "grpc.client.attempt.started{grpc.method=other,grpc.target=greeter}";
    assert_eq!(memory.sum(started), 2);
    // After a call of a generated client, the name of the method is known.
    say(&channel).await.expect("an answer");
    let mut request = http::Request::new(tonic::body::Body::empty());
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = "/helloworld.Greeter/SayHello".parse().expect("a path");
    let _ = channel.clone().oneshot(request).await;
    assert_eq!(memory.sum(started), 2);
    let started = format!("grpc.client.attempt.started{CALL}");
    assert_eq!(memory.sum(&started), 2);
}

/// The second call on a thread uses the memory of the first.
#[tokio::test]
async fn a_call_after_a_failed_one_is_measured_alone() {
    let server = scripted(|call| match call {
        0 => Err(Reason::INTERNAL_ERROR),
        _ => Ok(Code::Ok),
    });
    let (memory, channel) = recorded(|builder| builder, &[server.address()]).await;
    say(&channel).await.expect_err("a reset stream");
    for _ in 0..2 {
        say(&channel).await.expect("an answer");
    }
    for (status, calls) in [("INTERNAL", 1), ("OK", 2)] {
        assert_eq!(memory.values(&ended("call.duration", status)).len(), calls);
        assert_eq!(
            memory.values(&ended("attempt.duration", status)).len(),
            calls
        );
    }
    let received = memory.values(&ended("attempt.rcvd_total_compressed_message_size", "OK"));
    assert_eq!(received[0].to_bits(), received[1].to_bits());
}

#[tokio::test]
async fn streams_are_measured_until_their_end_and_their_sizes_exclude_prefixes() {
    let server = Greeter::start("alpha");
    let (memory, channel) = recorded(|builder| builder, &[server.address()]).await;
    let mut client = GreeterClient::new(channel.clone());
    let (feed, requests) = mpsc::unbounded_channel();
    let chat = client.chat(UnboundedReceiverStream::new(requests));
    let mut replies = chat.await.expect("a stream").into_inner();
    let mut expected = 0;
    for name in ["one", "three", "seventeen"] {
        feed.send(hello(name)).expect("an open stream");
        let reply = in_time("a reply", replies.message()).await;
        let message = reply.expect("a reply").expect("a message").message;
        expected += 2 + message.len();
    }
    let ended = |instrument| keyed(instrument, "helloworld.Greeter/Chat", "OK");
    assert!(memory.values(&ended("call.duration")).is_empty());
    drop(feed);
    let end = in_time("the end", replies.message()).await;
    assert!(end.expect("an end").is_none());
    assert_eq!(memory.values(&ended("call.duration")).len(), 1);
    let bytes = |size: usize| vec![f64::from(u32::try_from(size).expect("small"))];
    let sent = ended("attempt.sent_total_compressed_message_size");
    assert_eq!(memory.values(&sent), bytes(3 * 4 + 3 + 5 + 9));
    let received = ended("attempt.rcvd_total_compressed_message_size");
    assert_eq!(memory.values(&received), bytes(expected));
}

#[tokio::test]
async fn each_end_of_a_call_has_its_status() {
    let server = Raw::answering(
        |_| {},
        |(request, mut respond)| async move {
            let name = request.headers().get("x-act").cloned();
            match name.as_ref().and_then(|name| name.to_str().ok()) {
                Some("hang") => {
                    let _ = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
                }
                Some("late") => {
                    let mut stream = respond.send_response(grpc_head(), false).expect("a stream");
                    let _ = stream.send_data(Bytes::from_static(EMPTY_MESSAGE), false);
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", 5.into());
                    let _ = stream.send_trailers(trailers);
                }
                Some("reset") => respond.send_reset(Reason::INTERNAL_ERROR),
                _ => {
                    let head = Response::builder().status(503).body(()).expect("a head");
                    let _ = respond.send_response(head, true);
                }
            }
        },
    );
    let (memory, channel) = recorded(|builder| builder, &[server.address()]).await;
    let call = |act: &'static str, timeout: Option<Duration>| {
        let mut client = GreeterClient::new(channel.clone());
        let mut request = Request::new(hello("world"));
        request
            .metadata_mut()
            .insert("x-act", act.parse().expect("a value"));
        if let Some(timeout) = timeout {
            request.set_timeout(timeout);
        }
        async move {
            client
                .say_hello(request)
                .await
                .map_err(|status: Status| status.code())
        }
    };
    let limit = Some(Duration::from_millis(50));
    for (act, timeout, code, status) in [
        ("late", None, Code::NotFound, "NOT_FOUND"),
        ("page", None, Code::Unavailable, "UNAVAILABLE"),
        ("hang", limit, Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        ("reset", None, Code::Internal, "INTERNAL"),
    ] {
        let outcome = in_time(act, call(act, timeout)).await;
        assert_eq!(outcome.expect_err("a failure"), code);
        for instrument in ["attempt.duration", "call.duration"] {
            assert_eq!(memory.values(&ended(instrument, status)).len(), 1, "{act}");
        }
    }
    // A caller that drops the call cancels it.
    let dropped = tokio::time::timeout(Duration::from_millis(50), call("hang", None)).await;
    assert!(dropped.is_err());
    for instrument in ["attempt.duration", "call.duration"] {
        let values = memory.values(&ended(instrument, "CANCELLED"));
        assert_eq!(values.len(), 1, "{instrument}");
    }
    assert_eq!(memory.sum(&format!("grpc.client.attempt.started{CALL}")), 5);
}

#[tokio::test]
async fn a_call_without_an_endpoint_has_a_duration_and_no_attempt() {
    let memory = Memory::default();
    let builder = BalancedChannel::builder().service("greeter");
    let builder = builder.metrics(everything(&memory)).addresses([refusing()]);
    let channel = builder.connect_lazy();
    say(&channel).await.expect_err("no endpoint can be reached");
    assert_eq!(
        memory.values(&ended("call.duration", "UNAVAILABLE")).len(),
        1
    );
    assert_eq!(memory.sum(&format!("grpc.client.attempt.started{CALL}")), 0);
    let failed = "grpc.subchannel.connection_attempts_failed{grpc.target=greeter}";
    assert!(memory.sum(failed) > 0);
}

#[tokio::test]
async fn retries_and_the_delay_between_them_are_recorded_once_per_call() {
    let server = scripted(|call| {
        Ok(if call < 2 {
            Code::Unavailable
        } else {
            Code::Ok
        })
    });
    let configure = |builder: ChannelBuilder| builder.retry(quick_retry().max_attempts(4));
    let (memory, channel) = recorded(configure, &[server.address()]).await;
    say(&channel).await.expect("the third attempt succeeds");
    assert_eq!(
        memory.values(&format!("grpc.client.call.retries{CALL}")),
        [2.0]
    );
    let delay = memory.values(&format!("grpc.client.call.retry_delay{CALL}"));
    assert_eq!(delay.len(), 1);
    // Each of the two backoffs is at least 8 ms: 10 ms, less the random variation of 20 %.
    let call = memory.values(&ended("call.duration", "OK"));
    assert!(
        0.016 <= delay[0] && delay[0] <= call[0],
        "{delay:?} {call:?}"
    );
    assert_eq!(memory.sum(&format!("grpc.client.attempt.started{CALL}")), 3);
    assert_eq!(
        memory
            .values(&ended("attempt.duration", "UNAVAILABLE"))
            .len(),
        2
    );
    assert_eq!(memory.values(&ended("attempt.duration", "OK")).len(), 1);
    say(&channel).await.expect("the first attempt succeeds");
    assert_eq!(
        memory
            .values(&format!("grpc.client.call.retries{CALL}"))
            .len(),
        1
    );
}

#[tokio::test]
async fn transparent_retries_are_no_retries() {
    let server = scripted(|call| {
        if call == 0 {
            Err(Reason::REFUSED_STREAM)
        } else {
            Ok(Code::Ok)
        }
    });
    let other = scripted(|call| {
        if call == 0 {
            Err(Reason::REFUSED_STREAM)
        } else {
            Ok(Code::Ok)
        }
    });
    let (memory, channel) = recorded(|builder| builder, &[server.address(), other.address()]).await;
    for _ in 0..10 {
        let _ = say(&channel).await;
    }
    let transparent = memory.values(&format!("grpc.client.call.transparent_retries{CALL}"));
    assert!(transparent.iter().sum::<f64>() >= 1.0, "{transparent:?}");
    assert!(
        memory
            .values(&format!("grpc.client.call.retries{CALL}"))
            .is_empty()
    );
    let refused = memory
        .values(&ended("attempt.duration", "UNAVAILABLE"))
        .len();
    assert_eq!(refused, 2, "each server refuses one attempt");
    let started = memory.sum(&format!("grpc.client.attempt.started{CALL}"));
    let done = memory.values(&ended("attempt.duration", "OK")).len() + refused;
    assert_eq!(usize::try_from(started), Ok(done));
}

#[tokio::test]
async fn hedges_are_recorded_and_the_losing_attempt_is_cancelled() {
    let hanging = |_| {
        Raw::answering(
            |_| {},
            |(_, mut respond)| async move {
                let _ = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
            },
        )
    };
    let servers = [0, 1].map(hanging);
    let addresses = [servers[0].address(), servers[1].address()];
    let policy = HedgingPolicy::new(2, Duration::from_millis(5));
    let (memory, channel) = recorded(|builder| builder.hedge(policy), &addresses).await;
    let mut client = GreeterClient::new(channel);
    let mut request = Request::new(hello("world"));
    request.set_timeout(Duration::from_millis(100));
    client
        .say_hello(request)
        .await
        .expect_err("both servers hang");
    assert_eq!(
        memory.values(&format!("grpc.client.call.hedges{CALL}")),
        [1.0]
    );
    assert!(
        memory
            .values(&format!("grpc.client.call.retries{CALL}"))
            .is_empty()
    );
    let late = memory.values(&ended("attempt.duration", "DEADLINE_EXCEEDED"));
    let cancelled = memory.values(&ended("attempt.duration", "CANCELLED"));
    assert_eq!(late.len() + cancelled.len(), 2);
    assert_eq!(
        memory
            .values(&ended("call.duration", "DEADLINE_EXCEEDED"))
            .len(),
        1
    );
}

#[tokio::test]
async fn connections_are_counted_with_the_reason_of_their_end() {
    let memory = Memory::default();
    let metrics = everything(&memory)
        .with_label("grpc.disconnect_error")
        .with_label("grpc.lb.locality")
        .with_label("grpc.security_level");
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .service("greeter")
        .metrics(metrics)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let servers = [Greeter::start("alpha"), Greeter::start("beta")];
    insert(
        &changes,
        &servers[0].address(),
        Attributes::new().with_zone("a"),
    );
    insert(&changes, &servers[1].address(), Attributes::new());
    ready(&channel, 2).await;
    let open = |zone| {
        let labels =
            format!("grpc.lb.locality={zone},grpc.security_level=none,grpc.target=greeter");
        memory.sum(&format!("grpc.subchannel.open_connections{{{labels}}}"))
    };
    let ended = |zone, reason| {
        let labels =
            format!("grpc.disconnect_error={reason},grpc.lb.locality={zone},grpc.target=greeter");
        memory.sum(&format!("grpc.subchannel.disconnections{{{labels}}}"))
    };
    assert_eq!((open("a"), open("")), (1, 1));
    say(&channel).await.expect("an answer");
    remove(&changes, &servers[1].address());
    until("the connection is closed", || open("") == 0).await;
    assert_eq!(ended("", "subchannel shutdown"), 1);
    let [alpha, _beta] = servers;
    alpha.shut_down().await;
    until("the connection has ended", || open("a") == 0).await;
    assert_eq!(ended("a", "GOAWAY NO_ERROR"), 1);
    let succeeded =
        "grpc.subchannel.connection_attempts_succeeded{grpc.lb.locality=a,grpc.target=greeter}";
    assert_eq!(memory.sum(succeeded), 1);
}

#[tokio::test]
async fn attempts_have_the_zone_of_their_endpoint_if_the_label_is_enabled() {
    let memory = Memory::default();
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .service("greeter")
        .metrics(
            Metrics::new(memory.clone())
                .with_label("grpc.lb.locality")
                .with_label("grpc.lb.backend_service"),
        )
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let server = Greeter::start("alpha");
    insert(
        &changes,
        &server.address(),
        Attributes::new().with_zone("eu-1a"),
    );
    ready(&channel, 1).await;
    say(&channel).await.expect("an answer");
    let key = "grpc.client.attempt.duration{grpc.lb.backend_service=greeter,grpc.lb.locality=eu-1a,grpc.method=helloworld.Greeter/SayHello,grpc.status=OK,grpc.target=greeter}";
    assert_eq!(memory.values(key).len(), 1, "{:?}", memory.keys());
}

#[tokio::test]
async fn an_ejection_is_counted_by_its_detection_method() {
    let good = scripted(|_| Ok(Code::Ok));
    let bad = scripted(|_| Ok(Code::Unavailable));
    let detection = OutlierDetection::new()
        .interval(Duration::from_millis(100))
        .without_success_rate()
        .failure_percentage(
            FailurePercentageEjection::new()
                .minimum_hosts(2)
                .request_volume(3),
        );
    let configure = |builder: ChannelBuilder| {
        builder
            .policy(LbPolicy::WeightedRoundRobin)
            .outlier_detection(detection)
    };
    let (memory, channel) = recorded(configure, &[good.address(), bad.address()]).await;
    let enforced = "grpc.lb.outlier_detection.ejections_enforced{grpc.lb.outlier_detection.detection_method=failure_percentage,grpc.target=greeter}";
    in_time("an ejection", async {
        while memory.sum(enforced) == 0 {
            let _ = say(&channel).await;
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert!(channel.endpoints().iter().any(|endpoint| endpoint.ejected));
}

#[tokio::test]
async fn gauges_show_endpoints_and_waiting_calls_while_the_channel_exists() {
    let server = Raw::start(|builder| {
        builder.max_concurrent_streams(1);
    });
    let addresses = [server.address(), refusing()];
    let memory = Memory::default();
    let channel = BalancedChannel::builder()
        .service("greeter")
        .metrics(memory.clone())
        .addresses(addresses)
        .connect_lazy();
    ready(&channel, 1).await;
    let endpoints = |state| {
        let labels = format!("grpc.target=greeter,tonic_etcd.state={state}");
        memory.gauge(&format!("tonic_etcd.lb.endpoints{{{labels}}}"))
    };
    until("the other endpoint fails", || {
        endpoints("transient_failure") == Some(1.0)
    })
    .await;
    assert_eq!(
        (endpoints("ready"), endpoints("idle")),
        (Some(1.0), Some(0.0))
    );
    let waiting = || memory.gauge("tonic_etcd.lb.waiting_calls{grpc.target=greeter}");
    assert_eq!(waiting(), Some(0.0));
    let mut calls = JoinSet::new();
    // The channel dials further connections to a full endpoint, but not one for each call.
    for _ in 0..20 {
        let channel = channel.clone();
        calls.spawn(async move { say(&channel).await });
    }
    until("calls wait", || waiting() > Some(0.0)).await;
    calls.shutdown().await;
    until("no call waits", || waiting() == Some(0.0)).await;
    drop(channel);
    until("the gauge has ended", || waiting().is_none()).await;
}

#[tokio::test]
async fn experimental_instruments_are_disabled_by_default_and_unknown_names_are_refused() {
    let server = scripted(|call| {
        Ok(if call == 0 {
            Code::Unavailable
        } else {
            Code::Ok
        })
    });
    let memory = Memory::default();
    let builder = || {
        BalancedChannel::builder()
            .service("greeter")
            .retry(quick_retry())
    };
    let metrics = Metrics::new(memory.clone()).disable("grpc.client.call.duration");
    let channel = builder()
        .metrics(metrics)
        .addresses([server.address()])
        .connect_lazy();
    say(&channel).await.expect("an answer");
    let keys = memory.keys();
    let unwanted = |key: &String| {
        key.contains(".call.") || key.contains("subchannel") || key.contains("outlier")
    };
    assert_eq!(keys.iter().find(|key| unwanted(key)), None);
    assert!(keys.iter().any(|key| key.contains("attempt.started")));
    for metrics in [
        Metrics::new(memory.clone()).enable("grpc.client.call.retry"),
        Metrics::new(memory.clone()).disable("nothing"),
        Metrics::new(memory.clone()).with_label("address"),
    ] {
        let connected = builder()
            .metrics(metrics)
            .addresses([server.address()])
            .connect()
            .await;
        assert!(matches!(connected, Err(ChannelError::InvalidOption { .. })));
    }
}
