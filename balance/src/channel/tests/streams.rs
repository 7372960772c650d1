//! Edge cases of request bodies and response bodies: unread, dropped, parked (no longer polled), answered early, stalled.

use super::*;

/// Starts a server that answers each call with this many messages of this size.
fn streaming(messages: usize, size: usize) -> support::Cut {
    Raw::answering(|_| (), move |call| stream(call, messages, size))
}

/// Answers a call with this many messages of this size, under flow control.
async fn stream((request, mut respond): support::Accepted, messages: usize, size: usize) {
    drop(request);
    let Ok(mut stream) = respond.send_response(grpc_head(), false) else {
        return;
    };
    let message = Bytes::from(vec![0; size]);
    for _ in 0..messages {
        stream.reserve_capacity(size);
        while stream.capacity() < size {
            match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
                Some(Ok(_)) => {}
                _ => return,
            }
        }
        if stream.send_data(message.clone(), false).is_err() {
            return;
        }
    }
    let _ = stream.send_trailers(support::ok());
}

type Body = std::pin::Pin<Box<crate::channel::ResponseBody>>;

async fn open(channel: &BalancedChannel) -> Body {
    open_path(channel, "/helloworld.Greeter/SayHellos").await
}

async fn open_path(channel: &BalancedChannel, path: &str) -> Body {
    use tower::Service;
    let request = http::Request::post(path)
        .body(tonic::body::Body::empty())
        .expect("a request");
    let response = in_time("a head", channel.clone().call(request)).await;
    Box::pin(response.expect("a response").into_body())
}

async fn frame(body: &mut Body) -> Option<Result<http_body::Frame<Bytes>, tonic::Status>> {
    let frame = std::future::poll_fn(|cx| http_body::Body::poll_frame(body.as_mut(), cx));
    in_time("a frame", frame).await
}

/// Reads to the end and returns the number of bytes.
async fn read_all(body: &mut Body) -> usize {
    let mut bytes = 0;
    while let Some(frame) = frame(body).await {
        let data = frame.expect("no error").into_data();
        bytes += data.map_or(0, |data| data.len());
    }
    bytes
}

#[tokio::test]
async fn unread_streams_do_not_block_other_calls() {
    let unread = streaming(100_000, 1024);
    let channel = over([unread.address()]);
    let mut parked = Vec::new();
    for _ in 0..20 {
        parked.push(open(&channel).await);
    }
    // Each parked stream fills its window at some point. Later calls must not be affected.
    let mut body = open(&channel).await;
    for _ in 0..20_000 {
        frame(&mut body).await.expect("a frame").expect("no error");
    }
    assert_eq!(channel.endpoints()[0].in_flight, 21);
    drop((parked, body));
    idle(&channel).await;
}

#[tokio::test]
async fn an_unread_stream_of_small_messages_does_not_block_other_calls() {
    let server = Raw::answering(
        |_| (),
        |call: support::Accepted| async {
            if call.0.uri().path().ends_with("/SayHello") {
                reply(call).await;
            } else {
                stream(call, 40_000, 10).await;
            }
        },
    );
    let channel = over([server.address()]);
    let mut body = open(&channel).await;
    let unread = Duration::from_secs(soak("seconds in which the stream is not read", 1, 6) as u64);
    let start = tokio::time::Instant::now();
    let mut calls = 0;
    while tokio::time::Instant::now().saturating_duration_since(start) < unread || calls <= 100 {
        say(&channel).await.expect("an answer to a unary call");
        calls += 1;
    }
    assert_eq!(read_all(&mut body).await, 400_000);
    assert_eq!(channel.endpoints()[0].failures, 0);
    idle(&channel).await;
}

#[tokio::test]
async fn no_call_fails_after_many_dropped_streams() {
    let server = Raw::answering(
        |_| (),
        |call: support::Accepted| async {
            let long = call.0.uri().path().ends_with("/Long");
            stream(call, if long { 20 << 10 } else { 1_000 }, 1024).await;
        },
    );
    let channel = over([server.address()]);
    // h2 closes a connection after 1 024 resets that it counts as errors.
    for _ in 0..1_500 {
        let mut body = open(&channel).await;
        frame(&mut body).await.expect("a frame").expect("no error");
    }
    let mut body = open_path(&channel, "/helloworld.Greeter/Long").await;
    assert_eq!(read_all(&mut body).await, 20 << 20);
    assert_eq!(channel.endpoints()[0].failures, 0);
    assert_eq!(
        channel.endpoints()[0].last_error,
        None,
        "the connection must stay open"
    );
    idle(&channel).await;
}

/// Makes a call with a timeout of one second and returns the body of its response.
async fn open_for_a_second(channel: &BalancedChannel) -> crate::channel::ResponseBody {
    use tower::Service;
    let request = http::Request::post("/helloworld.Greeter/SayHellos")
        .header("grpc-timeout", "1000m")
        .body(tonic::body::Body::empty())
        .expect("a request");
    let response = in_time("a head", channel.clone().call(request)).await;
    response.expect("a response").into_body()
}

#[tokio::test]
async fn the_deadline_applies_to_the_response_stream() {
    let server = Raw::answering(
        |_| (),
        |(_, mut respond)| async move {
            let mut stream = respond.send_response(grpc_head(), false).expect("a head");
            let _ = stream.send_data(Bytes::from_static(&[0; 8]), false);
            std::future::pending::<()>().await;
        },
    );
    let channel = over([server.address()]);
    let mut body = Box::pin(open_for_a_second(&channel).await);
    let mut next = async || {
        let frame = std::future::poll_fn(|cx| http_body::Body::poll_frame(body.as_mut(), cx));
        in_time("a frame", frame).await
    };
    next().await.expect("a frame").expect("the first message");
    let status = next().await.expect("a frame").expect_err("a late frame");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(
        status.message().contains("reading the response"),
        "{status}"
    );
    assert!(next().await.is_none(), "the error must end the stream");
    idle(&channel).await;
}

/// The server ignores the deadline, and sends faster than the client reads.
#[tokio::test]
async fn the_deadline_applies_while_messages_are_always_available() {
    let server = streaming(1_000_000, 1024);
    let channel = over([server.address()]);
    let mut body = Box::pin(open_for_a_second(&channel).await);
    let start = tokio::time::Instant::now();
    let status = loop {
        let next = std::future::poll_fn(|cx| http_body::Body::poll_frame(body.as_mut(), cx));
        match in_time("a frame", next).await.expect("a frame") {
            Ok(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            Err(status) => break status,
        }
        let read = tokio::time::Instant::now().saturating_duration_since(start);
        assert!(read < Duration::from_secs(10), "the stream does not end");
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
    idle(&channel).await;
}

#[tokio::test]
async fn parked_uploads_do_not_block_other_calls() {
    let server = Raw::answering(|_| (), reply);
    let channel = over([server.address()]);
    ready(&channel, 1).await;
    let mut parked = Vec::new();
    for _ in 0..100 {
        let (feed, requests) = mpsc::unbounded_channel();
        feed.send(hello(&"x".repeat(100_000))).expect("open");
        let mut client = GreeterClient::new(channel.clone());
        let mut call = Box::pin(async move {
            let requests = UnboundedReceiverStream::new(requests);
            client.greet_all(requests).await.map(drop)
        });
        // The call is polled for 2 ms during the upload and then parked.
        let moment = tokio::time::timeout(Duration::from_millis(2), &mut call);
        assert!(moment.await.is_err(), "the upload ended too early");
        parked.push((feed, call));
    }
    say(&channel).await.expect("an answer");
    let (feed, requests) = mpsc::unbounded_channel();
    let mut client = GreeterClient::new(channel.clone());
    let chat = client.greet_all(UnboundedReceiverStream::new(requests));
    feed.send(hello("one more upload")).expect("open");
    drop(feed);
    in_time("an upload beside them", chat)
        .await
        .expect("an answer");
    assert_eq!(channel.endpoints()[0].in_flight, 100);
    for (feed, call) in parked {
        drop(feed);
        in_time("an upload", call)
            .await
            .expect("the upload continues");
    }
    idle(&channel).await;
}

#[tokio::test]
async fn a_response_during_an_upload_is_delivered() {
    let server = Raw::answering(
        |_| (),
        |(request, mut respond)| async move {
            let mut body = request.into_body();
            let _ = body.data().await;
            let mut head = Response::new(());
            head.headers_mut()
                .insert("grpc-status", "8".parse().expect("a value"));
            head.headers_mut()
                .insert("grpc-message", "enough".parse().expect("a value"));
            let _ = respond.send_response(head, true);
        },
    );
    let channel = over([server.address()]);
    let mut client = GreeterClient::new(channel.clone());
    let (feed, requests) = mpsc::unbounded_channel();
    let call = client.greet_all(UnboundedReceiverStream::new(requests));
    let feeding = tokio::spawn(async move {
        while feed.send(hello(&"x".repeat(1_000))).is_ok() {
            tokio::task::yield_now().await;
        }
    });
    let status = in_time("a call", call).await.expect_err("an early answer");
    assert_eq!(
        (status.code(), status.message()),
        (Code::ResourceExhausted, "enough")
    );
    in_time("the upload's end", feeding)
        .await
        .expect("no panic");
    idle(&channel).await;
}

#[tokio::test]
async fn an_upload_to_a_server_that_never_reads_is_limited_by_the_window() {
    // By default, the connection window of h2 is as large as one stream window, so the upload would use it up and stop the other calls. The
    // server of this test has a larger connection window.
    let mut raw = Raw::start(|builder| {
        builder.initial_connection_window_size(1 << 20);
    });
    let channel = over([raw.address()]);
    let mut client = GreeterClient::new(channel.clone());
    let produced = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&produced);
    let requests = tokio_stream::iter(0..200).map(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
        hello(&"x".repeat(1 << 20))
    });
    let call = tokio::spawn(async move { client.greet_all(requests).await.map(drop) });
    let accepted = raw.accept().await;
    until("a message is taken", || produced.load(Ordering::SeqCst) > 0).await;
    // If the window did not limit the upload, the channel would take more of its messages during these 100 calls.
    for _ in 0..100 {
        let other = tokio::spawn({
            let channel = channel.clone();
            async move { say(&channel).await }
        });
        let accepted = raw.accept().await;
        reply(accepted).await;
        other.await.expect("no panic").expect("an answer");
    }
    let produced = produced.load(Ordering::SeqCst);
    assert!(
        produced < 4,
        "{produced} MiB were taken for a window of 64 KiB"
    );
    call.abort();
    drop(accepted);
    idle(&channel).await;
}

#[tokio::test]
async fn dropping_an_unfinished_response_cancels_the_call_and_its_upload() {
    let mut raw = Raw::start(|_| ());
    let channel = over([raw.address()]);
    let mut client = GreeterClient::new(channel.clone());
    let (feed, requests) = mpsc::unbounded_channel();
    let call =
        tokio::spawn(async move { client.chat(UnboundedReceiverStream::new(requests)).await });
    let (request, mut respond) = raw.accept().await;
    let mut stream = respond.send_response(grpc_head(), false).expect("a head");
    let replies = in_time("a head", call)
        .await
        .expect("no panic")
        .expect("a stream");
    drop(replies);
    let reset = in_time("a reset", std::future::poll_fn(|cx| stream.poll_reset(cx))).await;
    assert_eq!(reset.expect("a reset"), Reason::CANCEL);
    in_time("the upload's end", feed.closed()).await;
    drop(request);
    idle(&channel).await;
}

#[tokio::test]
async fn cancelled_calls_and_half_read_streams_do_not_affect_other_calls() {
    let server = Greeter::start("alpha");
    let channel = over([server.address()]);
    ready(&channel, 1).await;
    let mut client = GreeterClient::new(channel.clone());
    let request = HelloRequest {
        replies: 100,
        ..hello("stream")
    };
    for _ in 0..soak("rounds of 20 cancelled calls", 300, 5_000) {
        let mut cancelled = JoinSet::new();
        for call in 0..20 {
            let (mut client, channel, request) = (client.clone(), channel.clone(), request.clone());
            cancelled.spawn(async move {
                if call % 2 == 0 {
                    return say(&channel).await.map(drop);
                }
                let mut replies = client.say_hellos(request).await?.into_inner();
                replies.message().await.map(drop)
            });
        }
        // After a random number of yields, some calls are not sent yet, some responses are half read, and some calls have ended.
        for _ in 0..fastrand::usize(1..40) {
            tokio::task::yield_now().await;
        }
        cancelled.abort_all();
        let ordinary = in_time("an ordinary call", client.say_hello(hello("ordinary"))).await;
        ordinary.expect("an answer");
        while let Some(outcome) = cancelled.join_next().await {
            assert!(outcome.is_err() || outcome.is_ok_and(|outcome| outcome.is_ok()));
        }
    }
    let status = &channel.endpoints()[0];
    assert_eq!((status.connections, status.failures), (1, 0));
    assert_eq!(status.last_error, None, "a connection was lost");
    idle(&channel).await;
}
