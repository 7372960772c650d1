//! Restarts and kills of servers, and refused calls: which calls are sent again and which are not. No call runs twice.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::support::PATIENCE;
use super::*;

/// Starts a server that counts the calls it has processed.
fn counting(processed: &Arc<AtomicUsize>) -> support::Cut {
    let processed = Arc::clone(processed);
    Raw::answering(
        |_| (),
        move |call| {
            processed.fetch_add(1, Ordering::SeqCst);
            reply(call)
        },
    )
}

/// Starts a server that counts every call and resets its stream with `reason`.
fn resetting(reason: Reason, seen: &Arc<AtomicUsize>) -> support::Cut {
    let seen = Arc::clone(seen);
    Raw::answering(
        |_| (),
        move |(_, mut respond)| {
            seen.fetch_add(1, Ordering::SeqCst);
            respond.send_reset(reason);
            async {}
        },
    )
}

#[tokio::test]
async fn a_refused_call_is_sent_to_another_server_and_runs_once() {
    let (refused, processed) = (Arc::default(), Arc::default());
    let servers = [
        resetting(Reason::REFUSED_STREAM, &refused),
        counting(&processed),
    ];
    let channel = over(servers.iter().map(support::Cut::address));
    ready(&channel, 2).await;
    for _ in 0..200 {
        say(&channel)
            .await
            .expect("the other server serves the call");
    }
    assert_eq!(
        processed.load(Ordering::SeqCst),
        200,
        "each call must run once"
    );
    assert!(
        refused.load(Ordering::SeqCst) > 0,
        "the refusing server must receive calls"
    );
    assert!(
        channel
            .endpoints()
            .iter()
            .all(|status| status.failures == 0),
        "a refused stream must not count as a failure"
    );
    idle(&channel).await;
}

#[tokio::test]
async fn a_call_refused_by_every_server_fails_after_four_sends() {
    let seen = Arc::default();
    let servers: Vec<_> = (0..6)
        .map(|_| resetting(Reason::REFUSED_STREAM, &seen))
        .collect();
    let channel = over(servers.iter().map(support::Cut::address));
    ready(&channel, 6).await;
    let status = say(&channel)
        .await
        .expect_err("all servers refuse the call");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("endpoint 127.0.0.1"), "{status}");
    assert_eq!(
        seen.load(Ordering::SeqCst),
        4,
        "the call must be sent once, and then three more times: {status:?}"
    );
}

#[tokio::test]
async fn a_lone_server_that_refuses_a_call_receives_it_once() {
    let seen = Arc::default();
    let server = resetting(Reason::REFUSED_STREAM, &seen);
    let channel = over([server.address()]);
    let (outcome, took) = timed(say(&channel)).await;
    assert_eq!(outcome.expect_err("refused").code(), Code::Unavailable);
    assert_eq!(seen.load(Ordering::SeqCst), 1);
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn calls_reset_for_other_reasons_are_not_sent_again() {
    for (reason, code) in [
        (Reason::CANCEL, Code::Cancelled),
        (Reason::INTERNAL_ERROR, Code::Internal),
        (Reason::ENHANCE_YOUR_CALM, Code::ResourceExhausted),
        (Reason::INADEQUATE_SECURITY, Code::PermissionDenied),
    ] {
        let seen = Arc::default();
        let servers = [resetting(reason, &seen), resetting(reason, &seen)];
        let channel = over(servers.iter().map(support::Cut::address));
        ready(&channel, 2).await;
        let status = say(&channel).await.expect_err("reset");
        assert_eq!(status.code(), code, "{status}");
        assert_eq!(
            seen.load(Ordering::SeqCst),
            1,
            "a call reset with {reason:?} may have run, so it must not be sent again"
        );
    }
}

#[tokio::test]
async fn a_call_refused_after_the_head_is_not_sent_again() {
    let seen = Arc::new(AtomicUsize::new(0));
    let (read, reading) = tokio::sync::watch::channel(false);
    let answer = |seen: Arc<AtomicUsize>, reading: tokio::sync::watch::Receiver<bool>| {
        move |(_, mut respond): support::Accepted| {
            seen.fetch_add(1, Ordering::SeqCst);
            let mut reading = reading.clone();
            async move {
                let mut stream = respond.send_response(grpc_head(), false).expect("a head");
                // A reset would discard a head that is not written yet, so the server waits until the client has read the head.
                let _ = reading.wait_for(|reading| *reading).await;
                stream.send_reset(Reason::REFUSED_STREAM);
            }
        }
    };
    let servers = [
        Raw::answering(|_| (), answer(Arc::clone(&seen), reading.clone())),
        Raw::answering(|_| (), answer(Arc::clone(&seen), reading)),
    ];
    let channel = over(servers.iter().map(support::Cut::address));
    ready(&channel, 2).await;
    let mut client = GreeterClient::new(channel.clone());
    let replies = in_time("a head", client.say_hellos(hello("stream"))).await;
    let mut replies = replies.expect("a head").into_inner();
    read.send_replace(true);
    let status = in_time("a reset", replies.message())
        .await
        .expect_err("reset");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert_eq!(seen.load(Ordering::SeqCst), 1);
    idle(&channel).await;
}

#[tokio::test]
async fn a_streamed_call_is_sent_again_while_its_first_messages_are_buffered() {
    let (refused, processed) = (Arc::default(), Arc::default());
    let servers = [
        resetting(Reason::REFUSED_STREAM, &refused),
        counting(&processed),
    ];
    let channel = over(servers.iter().map(support::Cut::address));
    ready(&channel, 2).await;
    let mut client = GreeterClient::new(channel.clone());
    for _ in 0..50 {
        let (feed, requests) = mpsc::unbounded_channel();
        feed.send(hello("one")).expect("open");
        let call = client.greet_all(UnboundedReceiverStream::new(requests));
        let (outcome, ()) = tokio::join!(in_time("a call", call), async {
            tokio::task::yield_now().await;
            let _ = feed.send(hello("two"));
            drop(feed);
        });
        outcome.expect("the other server serves the call");
    }
    assert_eq!(processed.load(Ordering::SeqCst), 50);
    assert!(refused.load(Ordering::SeqCst) > 0);
}

#[tokio::test]
async fn a_call_whose_connection_is_lost_fails_with_unavailable_and_names_the_endpoint() {
    let mut raw = Raw::start(|_| ());
    let processed = Arc::default();
    let other = counting(&processed);
    let channel = over([raw.address(), other.address()]);
    ready(&channel, 2).await;
    // Repeats the call until the first server gets it.
    let (call, _accepted) = loop {
        let call = tokio::spawn({
            let channel = channel.clone();
            async move { say(&channel).await }
        });
        let before = processed.load(Ordering::SeqCst);
        tokio::select! {
            accepted = raw.accept() => break (call, accepted),
            () = until("a server gets the call", || processed.load(Ordering::SeqCst) > before) => {}
        }
        call.await.expect("no panic").expect("an answer");
    };
    let processed_before = processed.load(Ordering::SeqCst);
    raw.cut();
    let status = in_time("a call", call)
        .await
        .expect("no panic")
        .expect_err("cut");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains(&raw.address()), "{status}");
    assert_eq!(
        processed.load(Ordering::SeqCst),
        processed_before,
        "the call may have run, so it must not be sent again"
    );
    until("the channel detects the lost connection", || {
        let mut endpoints = channel.endpoints().into_iter();
        endpoints.any(|status| status.connections == 0)
    })
    .await;
    drop(other);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_during_graceful_restarts() {
    let mut servers: Vec<_> = (0..3).map(|_| Greeter::start("one")).collect();
    let channel = over(servers.iter().map(Greeter::address));
    ready(&channel, 3).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let mut callers = JoinSet::new();
    for _ in 0..32 {
        let (channel, stop) = (channel.clone(), stop.clone());
        callers.spawn(async move {
            let mut calls = 0_usize;
            while !stop.is_cancelled() {
                say(&channel).await.expect("no call fails");
                calls += 1;
            }
            calls
        });
    }
    for round in 0..9 {
        let server = servers.remove(0);
        let port = server.address.port();
        server.shut_down().await;
        let name = format!("round-{round}");
        servers.push(Greeter::start_with(&name, port, |server| server));
        ready(&channel, 3).await;
    }
    stop.cancel();
    let calls: usize = in_time("the callers", callers.join_all())
        .await
        .iter()
        .sum();
    assert!(calls > 1_000, "{calls}");
    idle(&channel).await;
}

#[tokio::test]
async fn a_lone_server_can_restart_between_calls() {
    let server = Greeter::start("before");
    let channel = over([server.address()]);
    say(&channel).await.expect("an answer");
    let port = server.address.port();
    server.shut_down().await;
    let _server = Greeter::start_with("after", port, |server| server);
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(hello("patient"));
    request.extensions_mut().insert(WaitForReady::new(true));
    let reply = in_time("a call", client.say_hello(request))
        .await
        .expect("an answer");
    assert!(reply.into_inner().message.ends_with("after"));
}

#[tokio::test]
async fn no_call_fails_after_a_kill_and_the_restarted_server_is_used_again() {
    let steady = Greeter::start("steady");
    let shaky = Raw::start(|_| ());
    let port = shaky.address.port();
    let channel = over([steady.address(), shaky.address()]);
    ready(&channel, 2).await;
    shaky.cut();
    until("the channel detects the lost connection", || {
        channel
            .endpoints()
            .iter()
            .any(|status| status.state != EndpointState::Ready)
    })
    .await;
    assert_eq!(tally(&channel, 100).await["steady"], 100);
    drop(shaky);
    let _back = Greeter::start_with("back", port, |server| server);
    ready(&channel, 2).await;
    // A single caller uses the faster server until the latency estimate of the other server has decayed.
    let used = async { while !tally(&channel, 1).await.contains_key("back") {} };
    in_time("the endpoint receives calls again", used).await;
}

#[tokio::test]
async fn a_malformed_request_fails_with_internal_and_later_calls_succeed() {
    use tower::Service;
    let server = Greeter::start("alpha");
    let mut channel = over([server.address()]);
    let request = http::Request::post("/helloworld.Greeter/SayHello")
        .header("connection", "close")
        .body(tonic::body::Body::empty())
        .expect("a request");
    let status = in_time("a call", channel.call(request))
        .await
        .expect_err("malformed");
    assert_eq!(status.code(), Code::Internal, "{status}");
    say(&channel)
        .await
        .expect("the endpoint still serves other calls");
}

#[tokio::test]
async fn a_call_above_the_last_stream_of_a_goaway_is_sent_to_another_server() {
    let processed = Arc::default();
    let shy = support::shy(0);
    let other = counting(&processed);
    let channel = over([shy, other.address()]);
    ready(&channel, 2).await;
    // After some calls, the default policy of the channel picks the server that sends a GOAWAY.
    let left = async {
        while channel
            .endpoints()
            .iter()
            .all(|status| status.last_error.is_none())
        {
            say(&channel)
                .await
                .expect("the other server serves the call");
        }
    };
    in_time("the call to the server with the GOAWAY", left).await;
    let calls: u64 = channel.endpoints().iter().map(|status| status.calls).sum();
    assert!(
        calls > processed.load(Ordering::SeqCst) as u64,
        "at least one call must have been sent to both servers"
    );
}

/// The endpoint `beta` refuses all connections. It could do so for hours, so the call must not wait for `beta`.
#[tokio::test]
async fn a_call_above_the_last_stream_of_a_goaway_is_sent_again_after_a_reconnect() {
    let (shy, back) = (support::shy(0), Greeter::start("back"));
    let (dials, then) = (AtomicUsize::new(0), back.address());
    let channel = BalancedChannel::builder()
        .connector(move |address| {
            let target = match (address.host(), dials.load(Ordering::SeqCst)) {
                (Some("alpha"), 0) => Some(shy.clone()),
                (Some("alpha"), _) => Some(then.clone()),
                _ => None,
            };
            dials.fetch_add(usize::from(target.is_some()), Ordering::SeqCst);
            async move {
                let target = target.ok_or(io::ErrorKind::ConnectionRefused)?;
                tokio::net::TcpStream::connect(target).await
            }
        })
        .addresses(["alpha:1", "beta:1"])
        .connect_lazy();
    ready(&channel, 1).await;
    until("the other endpoint refuses connections", || {
        let endpoints = channel.endpoints();
        let mut states = endpoints.iter().map(|endpoint| endpoint.state);
        states.any(|state| state == EndpointState::TransientFailure)
    })
    .await;
    let (outcome, took) = timed(say(&channel)).await;
    outcome.expect("the endpoint is connected again");
    assert!(took < Duration::from_secs(10), "{took:?}");
}

/// The first call fills the socket, so the second one stays in the queue of the connection until the server is killed.
#[tokio::test]
async fn a_call_that_never_left_a_lost_connection_is_sent_to_another_server_and_one_that_left_is_not()
 {
    let back = Greeter::start("back");
    let (accepts, mut accepted) = mpsc::unbounded_channel();
    let (kill, killed) = tokio::sync::watch::channel(false);
    let to = back.address();
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .connector(move |address: Address| {
            let (near, far) = tokio::io::duplex(1 << 12);
            let (accepts, mut killed, to) = (accepts.clone(), killed.clone(), to.clone());
            async move {
                if address.host() != Some("full") {
                    let mut server = tokio::net::TcpStream::connect(to).await?;
                    tokio::spawn(async move {
                        let mut far = far;
                        let _ = tokio::io::copy_bidirectional(&mut far, &mut server).await;
                    });
                    return Ok(near);
                }
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(far).await.expect("a connection");
                    let call = connection.accept().await;
                    // The server reads no more bytes.
                    accepts.send(call.is_some()).expect("the test runs");
                    let _ = killed.wait_for(|killed| *killed).await;
                });
                Ok::<_, io::Error>(near)
            }
        })
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    insert(&changes, "full:1", Attributes::new());
    ready(&channel, 1).await;
    let call = |size: usize| {
        let channel = channel.clone();
        tokio::spawn(async move {
            let mut client = GreeterClient::new(channel);
            client.say_hello(hello(&"x".repeat(size))).await
        })
    };
    let left = call(60_000);
    assert!(
        in_time("the first call", accepted.recv())
            .await
            .expect("a server")
    );
    let unsent = call(1);
    until("the second call is in the queue", || {
        channel
            .endpoints()
            .iter()
            .any(|status| status.in_flight == 2)
    })
    .await;
    insert(&changes, "back:1", Attributes::new());
    ready(&channel, 2).await;
    kill.send(true).expect("the server runs");
    let unsent = in_time("the second call", unsent).await.expect("no panic");
    let reply = unsent.expect("another server serves the call");
    assert!(reply.into_inner().message.contains("back"));
    let left = in_time("the first call", left).await.expect("no panic");
    assert_eq!(
        left.expect_err("it may have been processed").code(),
        Code::Unavailable
    );
}

/// All streams of very many connections are in use, and one call waits. Whichever connection has a free stream first, the waiting call gets
/// that stream.
#[tokio::test]
async fn a_stream_freed_on_one_of_a_thousand_connections_is_used() {
    const ENDPOINTS: usize = 600;
    let (accepts, mut accepted) = mpsc::unbounded_channel::<support::Accepted>();
    let channel = BalancedChannel::builder()
        .seed(7)
        .connector(move |_| {
            let (near, far) = tokio::io::duplex(1 << 14);
            let accepts = accepts.clone();
            tokio::spawn(async move {
                let mut builder = h2::server::Builder::new();
                builder.max_concurrent_streams(1);
                let mut connection = builder.handshake(far).await.expect("a connection");
                while let Some(Ok(call)) = connection.accept().await {
                    // The send fails at the end of the test, when the receiver is dropped.
                    let _ = accepts.send(call);
                }
            });
            std::future::ready(Ok::<_, io::Error>(near))
        })
        .addresses((1..=ENDPOINTS).map(|number| format!("server{number}:1")))
        .connect_lazy();
    ready(&channel, ENDPOINTS).await;
    let call = || {
        let channel = channel.clone();
        tokio::spawn(async move { say(&channel).await.expect("an answer") })
    };
    let (mut calls, mut held) = (Vec::new(), Vec::new());
    // An endpoint whose streams are all in use gets one more connection.
    for _ in 0..2 * ENDPOINTS {
        calls.push(call());
    }
    for _ in 0..2 * ENDPOINTS {
        held.push(in_time("a call", accepted.recv()).await.expect("a call"));
    }
    for round in 0..5 {
        calls.push(call());
        let waits = || channel.0.shared().waiters().waiting() == 1;
        until("the call waits", waits).await;
        reply(held.swap_remove(round * 100)).await;
        held.push(in_time("the call", accepted.recv()).await.expect("a call"));
    }
    for call in &calls {
        call.abort();
    }
}

/// 3 000 endpoints do not respond, and each dial of such an endpoint lasts until the connect timeout. A new endpoint that responds is
/// nevertheless ready within a second.
#[tokio::test(start_paused = true)]
async fn a_thousand_unresponsive_endpoints_do_not_delay_the_others() {
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .seed(7)
        .connector(move |address| async move {
            if address.host() == Some("hole") {
                std::future::pending::<()>().await;
            }
            let (near, far) = tokio::io::duplex(1 << 14);
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(far).await.expect("a connection");
                while connection.accept().await.is_some() {}
            });
            Ok(near)
        })
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    for port in 1..=3_000 {
        insert(&changes, &format!("hole:{port}"), Attributes::new());
    }
    // After this sleep, every endpoint has been dialled and has failed. From now on, more endpoints are due for a dial than the channel
    // dials at once.
    tokio::time::sleep(Duration::from_secs(180)).await;
    for round in 1..=10 {
        insert(&changes, &format!("alpha:{round}"), Attributes::new());
        let start = tokio::time::Instant::now();
        ready(&channel, round).await;
        let took = tokio::time::Instant::now().saturating_duration_since(start);
        assert!(took < Duration::from_secs(1), "{took:?}");
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    // A new generation means that the server of a failing endpoint was started again. The endpoint is then dialled at once, even if its
    // backoff has not ended or other endpoints are before it in the queue.
    for round in 1..=10 {
        let address = format!("hole:{round}");
        insert(&changes, &address, Attributes::new().with_generation(round));
        let dialled = || {
            let endpoints = channel.endpoints();
            let one = endpoints.iter().find(|one| one.address.as_str() == address);
            one.is_some_and(|one| one.state == EndpointState::Connecting)
        };
        until("the endpoint is dialled at once", dialled).await;
    }
}

#[tokio::test]
async fn the_longest_durations_are_accepted() {
    let outliers = OutlierDetection::new().interval(Duration::MAX);
    let channel = BalancedChannel::builder()
        .startup_timeout(Duration::MAX)
        .outlier_detection(outliers)
        .addresses([refusing()])
        .connect_lazy();
    let status = say(&channel).await.expect_err("no endpoint is ready");
    assert_eq!(status.code(), Code::Unavailable);
}

#[tokio::test]
async fn a_call_at_the_last_stream_of_a_goaway_is_not_sent_again() {
    let processed = Arc::default();
    let shy = support::shy(1);
    let other: support::Cut = counting(&processed);
    let channel = over([shy, other.address()]);
    ready(&channel, 2).await;
    let mut served = 0;
    // Repeats the call until the server that sends a GOAWAY gets it.
    let status = loop {
        match say(&channel).await {
            Ok(_) => served += 1,
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("connection was lost"), "{status}");
    assert_eq!(
        processed.load(Ordering::SeqCst),
        served,
        "the call may have run, so it must not be sent again"
    );
}

#[tokio::test]
async fn calls_waiting_for_a_free_stream_are_not_queued_on_a_connection() {
    let mut full = Raw::start(|builder| {
        builder.max_concurrent_streams(1);
    });
    let (changes, channel) = fed();
    insert(&changes, &full.address(), Attributes::new());
    ready(&channel, 1).await;
    let mut calls = JoinSet::new();
    for _ in 0..50 {
        let channel = channel.clone();
        calls.spawn(async move { say(&channel).await });
    }
    // Each connection allows one stream. All streams are in use and calls wait, so the channel opens a second connection.
    let running = [full.accept().await, full.accept().await];
    until("two calls are in flight", || {
        channel.endpoints()[0].in_flight == 2
    })
    .await;
    assert!(
        full.accepted.try_recv().is_err(),
        "the server must receive only one call on each connection"
    );
    let rescue = Greeter::start("rescue");
    insert(&changes, &rescue.address(), Attributes::new());
    ready(&channel, 2).await;
    full.cut();
    drop(running);
    let outcomes = in_time("the calls", calls.join_all()).await;
    let failed: Vec<_> = outcomes
        .iter()
        .filter_map(|outcome| outcome.as_ref().err())
        .collect();
    assert!(failed.len() <= 2, "more than two calls failed: {failed:?}");
    idle(&channel).await;
}

#[tokio::test]
async fn an_address_whose_packets_are_dropped_does_not_delay_calls() {
    let servers = [
        Greeter::start("alpha"),
        Greeter::start("beta"),
        Greeter::start("gamma"),
    ];
    let hole = support::Hole::dig().await;
    let mut addresses: Vec<_> = servers.iter().map(Greeter::address).collect();
    addresses.push(hole.address());
    let channel = over(&addresses);
    let mut took = Vec::new();
    for _ in 0..2_000 {
        let (outcome, time) = timed(say(&channel)).await;
        outcome.expect("the other servers serve the call");
        took.push(time);
    }
    took.sort_unstable();
    let p99 = took[took.len() * 99 / 100];
    // A call that waited for a connection to this address would take seconds.
    assert!(p99 < Duration::from_millis(500), "{p99:?}");
    let connecting = channel.endpoints();
    let connecting = connecting
        .iter()
        .find(|status| status.address.to_string() == hole.address());
    assert_eq!(
        connecting.expect("the endpoint is known").state,
        EndpointState::Connecting
    );
}

#[tokio::test]
async fn keep_alive_closes_an_unresponsive_connection() {
    let mut raw = Raw::start(|_| ());
    let (frozen, freeze) = support::valve(raw.address);
    let channel = BalancedChannel::builder()
        .http2_keep_alive_interval(Duration::from_millis(50))
        .keep_alive_timeout(Duration::from_millis(200))
        .keep_alive_permit_time(Duration::from_millis(50))
        .addresses([frozen.to_string()])
        .connect_lazy();
    let healthy = tokio::spawn({
        let channel = channel.clone();
        async move { say(&channel).await }
    });
    let accepted = raw.accept().await;
    reply(accepted).await;
    healthy.await.expect("no panic").expect("an answer");
    let call = tokio::spawn({
        let channel = channel.clone();
        async move { say(&channel).await }
    });
    let _accepted = raw.accept().await;
    freeze.send_replace(true);
    let (outcome, took) = timed(call).await;
    let status = outcome.expect("no panic").expect_err("no answer");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    let error = channel.endpoints()[0].last_error.clone();
    until("the endpoint is no longer ready", || {
        channel.endpoints()[0].state != EndpointState::Ready
    })
    .await;
    assert!(error.is_some_and(|error| error.contains("ping")));
}

#[tokio::test]
async fn frequent_keep_alive_pings_do_not_close_an_idle_connection() {
    let server = Greeter::start("alpha");
    let channel = BalancedChannel::builder()
        .http2_keep_alive_interval(Duration::from_millis(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .keep_alive_permit_time(Duration::from_millis(5))
        .addresses([server.address()])
        .connect_lazy();
    say(&channel).await.expect("an answer");
    // The interval of 5 ms is raised to 10 ms, so 150 ms are fifteen keep-alive intervals. The connection must stay open.
    tokio::time::sleep(Duration::from_millis(150)).await;
    say(&channel).await.expect("an answer");
    assert_eq!(channel.endpoints()[0].last_error, None);
}

/// Runs a server that implements just enough HTTP/2 to count calls. After the first call, the server announces `then`, if set, as its limit
/// on concurrent streams.
async fn count_calls(
    mut io: DuplexStream,
    then: Option<u8>,
    calls: Arc<AtomicUsize>,
) -> io::Result<()> {
    let mut preface = [0; 24];
    io.read_exact(&mut preface).await?;
    // Sends SETTINGS and, in advance, the acknowledgement of the client's SETTINGS.
    io.write_all(b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0")
        .await?;
    loop {
        let mut head = [0; 9];
        io.read_exact(&mut head).await?;
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        io.read_exact(&mut payload).await?;
        match (head[3], head[4]) {
            (6, 0) => {
                let pong = [b"\0\0\x08\x06\x01\0\0\0\0", &payload[..]].concat();
                io.write_all(&pong).await?;
            }
            (1, _) if calls.fetch_add(1, Ordering::SeqCst) == 0 => {
                if let Some(streams) = then {
                    // SETTINGS with MAX_CONCURRENT_STREAMS.
                    io.write_all(b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0").await?;
                    io.write_all(&[streams]).await?;
                }
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_lowered_stream_limit_is_respected() {
    let calls = [Arc::<AtomicUsize>::default(), Arc::default()];
    let count = |connection: usize| calls[connection].load(Ordering::SeqCst);
    let connections = AtomicUsize::new(0);
    let counted = calls.clone();
    let channel = BalancedChannel::builder()
        .connector(move |_| {
            let connection = connections.fetch_add(1, Ordering::SeqCst);
            let (near, far) = tokio::io::duplex(1 << 16);
            let calls = Arc::clone(&counted[connection]);
            let then = (connection == 0).then_some(2);
            tokio::spawn(count_calls(far, then, calls));
            std::future::ready(Ok(near))
        })
        .addresses(["fake:1"])
        .connect_lazy();
    let mut callers = JoinSet::new();
    let mut call = || {
        let channel = channel.clone();
        callers.spawn(async move { say(&channel).await });
    };
    ready(&channel, 1).await;
    // When the peer changes its stream limit, the channel notifies waiting calls, so that they pick again. This notification shows that the
    // channel has applied the new limit.
    let limited = channel.0.shared().changed().notified();
    tokio::pin!(limited);
    limited.as_mut().enable();
    call();
    in_time("the new limit", limited).await;
    for _ in 0..9 {
        call();
    }
    until("all calls are received", || count(0) + count(1) == 10).await;
    assert_eq!(count(0), 2, "the first connection must carry two calls");
}

#[tokio::test]
async fn a_health_watch_gives_up_its_stream_if_the_connection_allows_only_one() {
    let calls = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&calls);
    let channel = BalancedChannel::builder()
        .health_check("")
        // The connect timeout also limits the time that a health watch waits for its first response. It is long here, so that the watch
        // stays open.
        .connect_timeout(PATIENCE * 3)
        .connector(move |_| {
            let (near, far) = tokio::io::duplex(1 << 16);
            tokio::spawn(count_calls(far, Some(1), Arc::clone(&counted)));
            std::future::ready(Ok(near))
        })
        .addresses(["fake:1"])
        .connect_lazy();
    // The watch is the first call, and the server does not respond to it.
    until("the health watch is open", || {
        calls.load(Ordering::SeqCst) == 1
    })
    .await;
    let call = tokio::spawn({
        let channel = channel.clone();
        async move { say(&channel).await }
    });
    until("the call is received", || calls.load(Ordering::SeqCst) == 2).await;
    call.abort();
}
