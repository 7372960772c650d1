//! Tests of one connection to a real `h2` server: what each kind of failure means for a call, and how bodies are sent and received.

use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection as ServerConnection, SendResponse};
use h2::{Reason, RecvStream};
use http::{Request, Response};
use http_body::Frame;
use tokio::io::{DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Status;
use tonic::body::Body;

use super::connect::{DialError, happy_eyeballs};
use super::connection_task::{CloseReason, ConnectionEvent};
use super::exchange::Exchange;
use super::h2_error::is_unprocessed;
use super::http2::{Connection, OpenError, Settings};
use super::request_body::{Outgoing, Pumped, Recall};
use super::response_body::Incoming;

type Accepted = (Request<RecvStream>, SendResponse<Bytes>);

static DEFAULTS: LazyLock<Settings> = LazyLock::new(Settings::default);
const PATIENCE: Duration = Duration::from_secs(10);

/// A client connection, the calls that its server receives, and the control of the server.
struct Pair {
    client: Connection,
    accepted: mpsc::UnboundedReceiver<Accepted>,
    control: mpsc::UnboundedSender<Order>,
    left: mpsc::UnboundedReceiver<CloseReason>,
}

/// A command to the server.
enum Order {
    GoAway(Reason),
    GracefulShutdown,
    Vanish,
}

impl Pair {
    async fn new(configure: impl FnOnce(&mut h2::server::Builder)) -> Self {
        let (near, far) = duplex(1 << 20);
        let mut builder = h2::server::Builder::new();
        builder.max_concurrent_reset_streams(100_000);
        configure(&mut builder);
        let (accepts, accepted) = mpsc::unbounded_channel();
        let (control, orders) = mpsc::unbounded_channel();
        tokio::spawn(serve(far, builder, accepts, orders));
        let (leaves, left) = mpsc::unbounded_channel();
        let on_event = move |report| {
            if let ConnectionEvent::Closed(leave) = report {
                let _ = leaves.send(leave);
            }
        };
        let established = Connection::establish(near, &DEFAULTS, None);
        let established = timeout(PATIENCE, established).await.expect("in time");
        let client = established.expect("a connection").start(on_event);
        Self {
            client,
            accepted,
            control,
            left,
        }
    }

    fn send(&self, body: Outgoing) -> Exchange {
        Exchange::start(&self.client, request(), body, Recall::Never).expect("sent")
    }

    async fn accept(&mut self) -> Accepted {
        timeout(PATIENCE, self.accepted.recv())
            .await
            .expect("a call in time")
            .expect("a live server")
    }

    fn order(&self, order: Order) {
        assert!(self.control.send(order).is_ok(), "the server must run");
    }
}

async fn serve(
    io: DuplexStream,
    builder: h2::server::Builder,
    accepts: mpsc::UnboundedSender<Accepted>,
    mut orders: mpsc::UnboundedReceiver<Order>,
) {
    let mut connection: ServerConnection<_, Bytes> =
        builder.handshake(io).await.expect("a handshake");
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Order::GoAway(reason)) => connection.abrupt_shutdown(reason),
                Some(Order::GracefulShutdown) => connection.graceful_shutdown(),
                Some(Order::Vanish) | None => return,
            },
            accepted = connection.accept() => match accepted {
                Some(Ok(accepted)) => {
                    let _ = accepts.send(accepted);
                }
                _ => return,
            },
        }
    }
}

fn request() -> Request<()> {
    Request::post("http://greeter/helloworld.Greeter/SayHello")
        .version(http::Version::HTTP_2)
        .body(())
        .expect("a request")
}

fn single() -> Outgoing {
    Outgoing::Single(Bytes::from_static(b"one frame"))
}

async fn head(exchange: &mut Exchange) -> Result<Response<Incoming>, h2::Error> {
    timeout(PATIENCE, poll_fn(|cx| exchange.poll_head(cx)))
        .await
        .expect("a head in time")
}

/// Returns a body whose frames the test sends. The body ends when the sender is dropped.
fn fed() -> (mpsc::UnboundedSender<Bytes>, Body) {
    let (feed, frames) = mpsc::unbounded_channel();
    (feed, Body::new(Fed(frames)))
}

struct Fed(mpsc::UnboundedReceiver<Bytes>);

impl http_body::Body for Fed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.0
            .poll_recv(cx)
            .map(|frame| frame.map(|frame| Ok(Frame::data(frame))))
    }
}

async fn gather(body: Body) -> Outgoing {
    let mut body = Some(body);
    poll_fn(|cx| {
        let body = body.take().expect("polled once");
        std::task::Poll::Ready(Outgoing::gather(body, cx))
    })
    .await
    .expect("a body")
}

async fn read_all(mut body: RecvStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        bytes.extend_from_slice(&data);
    }
    bytes
}

#[tokio::test]
async fn a_call_returns_its_response_and_trailers() {
    let mut pair = Pair::new(|_| ()).await;
    let mut exchange = pair.send(single());
    let (request, mut respond) = pair.accept().await;
    assert_eq!(read_all(request.into_body()).await, b"one frame");
    let mut stream = respond
        .send_response(Response::new(()), false)
        .expect("a head");
    stream.send_data("hello".into(), false).expect("data");
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().expect("a value"));
    stream.send_trailers(trailers).expect("trailers");
    let mut body = head(&mut exchange).await.expect("a head").into_body();
    let data = poll_fn(|cx| body.poll_frame(cx)).await;
    let data = data.expect("a frame").expect("no error").into_data();
    assert_eq!(data.expect("data"), "hello");
    assert!(!body.is_complete(), "the body must have unread trailers");
    let trailers = poll_fn(|cx| body.poll_frame(cx)).await;
    assert!(trailers.expect("a frame").expect("no error").is_trailers());
    assert!(body.is_complete());
}

#[tokio::test]
async fn a_peer_that_never_responds_is_not_connected() {
    let (near, _far) = duplex(1 << 16);
    let establishing = Connection::establish(near, &DEFAULTS, None);
    let outcome = timeout(Duration::from_millis(50), establishing).await;
    assert!(outcome.is_err(), "the handshake ended without a response");
}

#[tokio::test]
async fn a_peer_that_allows_no_streams_is_not_connected() {
    let (near, far) = duplex(1 << 16);
    tokio::spawn(async move {
        let mut builder = h2::server::Builder::new();
        builder.max_concurrent_streams(0);
        let mut server: ServerConnection<_, Bytes> = builder.handshake(far).await.expect("h2");
        while server.accept().await.is_some() {}
    });
    let establishing = Connection::establish(near, &DEFAULTS, None);
    let outcome = timeout(Duration::from_millis(50), establishing).await;
    assert!(outcome.is_err(), "the connection is ready with 0 streams");
}

#[tokio::test]
async fn the_stream_limit_of_the_peer_is_known_from_the_start() {
    let pair = Pair::new(|builder| {
        builder.max_concurrent_streams(7);
    })
    .await;
    assert_eq!(pair.client.max_streams(), 7);
}

#[tokio::test]
async fn after_a_goaway_new_calls_are_rejected_and_open_calls_may_have_run() {
    let mut pair = Pair::new(|_| ()).await;
    let mut below = pair.send(single());
    let (_request, _respond) = pair.accept().await;
    // The server has accepted the call, so the GOAWAY's last stream id is the stream id of the call. The server may have run the call.
    pair.order(Order::GoAway(Reason::NO_ERROR));
    let left = timeout(PATIENCE, pair.left.recv()).await.expect("in time");
    assert!(left.expect("a reason").is_graceful());
    match Exchange::start(&pair.client, request(), single(), Recall::Never) {
        Err((OpenError::Gone(_), Outgoing::Single(_))) => {}
        other => panic!("a closed connection must reject calls, but returned {other:?}"),
    }
    let error = head(&mut below)
        .await
        .expect_err("the connection is closed");
    assert!(
        !is_unprocessed(&error),
        "the call may have run, so it must not count as unprocessed: {error}"
    );
}

#[tokio::test]
async fn a_goaway_with_an_error_code_is_not_graceful() {
    let mut pair = Pair::new(|_| ()).await;
    pair.order(Order::GoAway(Reason::ENHANCE_YOUR_CALM));
    let left = timeout(PATIENCE, pair.left.recv()).await.expect("in time");
    assert!(!left.expect("a reason").is_graceful());
}

#[tokio::test]
async fn a_graceful_shutdown_finishes_calls_in_flight() {
    let mut pair = Pair::new(|_| ()).await;
    let mut exchange = pair.send(single());
    let (_request, mut respond) = pair.accept().await;
    pair.order(Order::GracefulShutdown);
    assert!(
        timeout(PATIENCE, pair.left.recv())
            .await
            .expect("in time")
            .is_some()
    );
    respond
        .send_response(Response::new(()), true)
        .expect("a head");
    head(&mut exchange)
        .await
        .expect("the call in flight finishes");
}

#[tokio::test]
async fn a_broken_connection_does_not_prove_a_call_unprocessed() {
    let mut pair = Pair::new(|_| ()).await;
    let mut exchange = pair.send(single());
    let _accepted = pair.accept().await;
    pair.order(Order::Vanish);
    let error = head(&mut exchange)
        .await
        .expect_err("the peer has disconnected");
    assert!(
        !is_unprocessed(&error),
        "the call may have run, so it must not count as unprocessed: {error}"
    );
}

#[tokio::test]
async fn a_reset_stream_is_unprocessed_only_with_refused_stream() {
    let mut pair = Pair::new(|_| ()).await;
    for (reason, unprocessed) in [
        (Reason::REFUSED_STREAM, true),
        (Reason::CANCEL, false),
        (Reason::INTERNAL_ERROR, false),
        (Reason::ENHANCE_YOUR_CALM, false),
    ] {
        let mut exchange = pair.send(single());
        let (_request, mut respond) = pair.accept().await;
        respond.send_reset(reason);
        let error = head(&mut exchange).await.expect_err("reset");
        assert_eq!(is_unprocessed(&error), unprocessed, "{error}");
    }
}

#[tokio::test]
async fn a_local_h2_error_does_not_prove_a_call_unprocessed() {
    let (near, mut far) = duplex(1 << 16);
    let server = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        // The server sends SETTINGS and, in advance, the acknowledgement of the client's SETTINGS. Then it answers the client's PING.
        let mut preface = [0; 24];
        far.read_exact(&mut preface).await.expect("a preface");
        far.write_all(b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0")
            .await
            .expect("settings");
        loop {
            let mut frame = [0; 9];
            far.read_exact(&mut frame).await.expect("a frame");
            let length = usize::from(frame[1]) << 8 | usize::from(frame[2]);
            let mut payload = vec![0; length];
            far.read_exact(&mut payload).await.expect("a payload");
            match frame[3] {
                6 if frame[4] == 0 => {
                    far.write_all(b"\0\0\x08\x06\x01\0\0\0\0")
                        .await
                        .expect("a pong");
                    far.write_all(&payload).await.expect("a pong");
                }
                1 => break,
                _ => {}
            }
        }
        // DATA on stream 0 violates the protocol.
        far.write_all(b"\0\0\x01\0\0\0\0\0\0x")
            .await
            .expect("an invalid frame");
        std::future::pending::<()>().await;
    });
    let established = Connection::establish(near, &DEFAULTS, None);
    let established = timeout(PATIENCE, established).await.expect("in time");
    let client = established.expect("a connection").start(|_| ());
    let mut exchange = Exchange::start(&client, request(), single(), Recall::Never).expect("sent");
    let error = head(&mut exchange).await.expect_err("a protocol error");
    assert!(
        error.is_go_away(),
        "h2 must report its own error as a GOAWAY: {error}"
    );
    assert!(!is_unprocessed(&error));
    server.abort();
}

#[tokio::test]
async fn a_malformed_request_is_distinguished_from_a_lost_connection() {
    let pair = Pair::new(|_| ()).await;
    let mut malformed = request();
    malformed
        .headers_mut()
        .insert("connection", "close".parse().expect("a value"));
    match Exchange::start(&pair.client, malformed, single(), Recall::Never) {
        Err((OpenError::Malformed(_), _)) => {}
        other => panic!("the request must be rejected as malformed, but got {other:?}"),
    }
}

#[tokio::test]
async fn only_an_incomplete_request_body_is_gathered_as_a_stream() {
    let (feed, body) = fed();
    feed.send("x".into()).expect("fed");
    drop(feed);
    assert!(matches!(gather(body).await, Outgoing::Single(frame) if frame == "x"));
    assert!(matches!(gather(Body::empty()).await, Outgoing::Empty));
    let (_feed, body) = fed();
    assert!(matches!(gather(body).await, Outgoing::Stream { .. }));
}

#[tokio::test]
async fn a_caller_can_wait_for_the_response_head_before_it_sends() {
    let mut pair = Pair::new(|_| ()).await;
    let (feed, body) = fed();
    let mut exchange = pair.send(gather(body).await);
    let (request, mut respond) = pair.accept().await;
    respond
        .send_response(Response::new(()), false)
        .expect("a head");
    let response = head(&mut exchange)
        .await
        .expect("a head before any message");
    feed.send("late".into()).expect("fed");
    drop(feed);
    assert_eq!(read_all(request.into_body()).await, b"late");
    drop(response);
}

#[tokio::test]
async fn parked_uploads_do_not_block_the_connection() {
    let mut pair = Pair::new(|_| ()).await;
    let mut parked = Vec::new();
    for _ in 0..100 {
        let (feed, body) = fed();
        feed.send(Bytes::from(vec![0; 1 << 20])).expect("fed");
        let mut exchange = pair.send(gather(body).await);
        // The call is polled once and then parked (no longer polled).
        poll_fn(|cx| {
            let _ = exchange.poll_head(cx);
            std::task::Poll::Ready(())
        })
        .await;
        parked.push((exchange, feed, pair.accept().await));
    }
    let mut exchange = pair.send(Outgoing::Empty);
    let (_request, mut respond) = pair.accept().await;
    respond
        .send_response(Response::new(()), true)
        .expect("a head");
    head(&mut exchange).await.expect("an answer");
}

#[tokio::test]
async fn an_early_response_is_delivered_while_the_caller_sends() {
    let mut pair = Pair::new(|_| ()).await;
    let (feed, body) = fed();
    feed.send("first".into()).expect("fed");
    let mut exchange = pair.send(gather(body).await);
    let (request, mut respond) = pair.accept().await;
    drop(request);
    respond
        .send_response(Response::new(()), true)
        .expect("an answer");
    // After the answer is sent, the `h2` server resets the stream with NO_ERROR.
    drop(respond);
    // After the stream is closed, further sends fail with h2's "inactive stream".
    for _ in 0..100 {
        let _ = feed.send("more".into());
        tokio::task::yield_now().await;
    }
    let response = head(&mut exchange).await.expect("the early answer");
    assert!(response.body().is_complete());
}

#[tokio::test]
async fn a_dropped_response_ends_the_request_stream() {
    let mut pair = Pair::new(|_| ()).await;
    let (feed, body) = fed();
    let mut exchange = pair.send(gather(body).await);
    let (request, mut respond) = pair.accept().await;
    let mut stream = respond
        .send_response(Response::new(()), false)
        .expect("a head");
    drop(head(&mut exchange).await.expect("a head"));
    drop(exchange);
    let reset = timeout(PATIENCE, poll_fn(|cx| stream.poll_reset(cx))).await;
    assert_eq!(reset.expect("in time").expect("a reset"), Reason::CANCEL);
    assert!(
        timeout(PATIENCE, feed.closed()).await.is_ok(),
        "the body must be dropped"
    );
    drop(request);
}

#[tokio::test]
async fn the_small_body_of_a_refused_stream_is_returned() {
    let mut pair = Pair::new(|_| ()).await;
    let (feed, body) = fed();
    feed.send("one".into()).expect("fed");
    let mut exchange = pair.send(gather(body).await);
    let (_request, mut respond) = pair.accept().await;
    respond.send_reset(Reason::REFUSED_STREAM);
    head(&mut exchange).await.expect_err("refused");
    match exchange.into_pumped().await {
        Some(Pumped::Returned(Outgoing::Stream { read, .. })) => assert_eq!(read, ["one"]),
        other => panic!("the body must be returned, but got {other:?}"),
    }
}

#[tokio::test]
async fn if_a_body_fails_the_stream_is_reset_and_the_call_fails_with_the_error_of_the_body() {
    struct Failing;
    impl http_body::Body for Failing {
        type Data = Bytes;
        type Error = Status;
        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<Frame<Bytes>, Status>>> {
            std::task::Poll::Ready(Some(Err(Status::data_loss("disk"))))
        }
    }
    let mut pair = Pair::new(|_| ()).await;
    let rest = Body::new(Failing);
    let mut exchange = pair.send(Outgoing::Stream {
        read: Vec::new(),
        rest,
    });
    let _accepted = pair.accept().await;
    head(&mut exchange).await.expect_err("reset");
    match exchange.into_pumped().await {
        Some(Pumped::Failed(status)) => assert_eq!(status.code(), tonic::Code::DataLoss),
        other => panic!("the call must fail with the error of the body, but got {other:?}"),
    }
}

#[tokio::test]
async fn thousands_of_half_read_streams_leave_the_connection_window_intact() {
    let mut pair = Pair::new(|_| ()).await;
    let ended = Arc::new(AtomicUsize::new(0));
    for _ in 0..3_000 {
        let mut exchange = pair.send(single());
        let (_request, mut respond) = pair.accept().await;
        let mut stream = respond
            .send_response(Response::new(()), false)
            .expect("a head");
        let ended = Arc::clone(&ended);
        tokio::spawn(async move {
            for _ in 0..100 {
                if stream
                    .send_data(Bytes::from_static(&[0; 1024]), false)
                    .is_err()
                {
                    break;
                }
            }
            let _ = poll_fn(|cx| stream.poll_reset(cx)).await;
            ended.fetch_add(1, Ordering::Relaxed);
        });
        let mut body = head(&mut exchange).await.expect("a head").into_body();
        let frame = timeout(PATIENCE, poll_fn(|cx| body.poll_frame(cx))).await;
        frame
            .expect("in time")
            .expect("a frame")
            .expect("a frame, although earlier streams were dropped");
    }
    // If the window of the connection is intact, a response of twenty stream windows is received.
    let mut exchange = pair.send(single());
    let (_request, mut respond) = pair.accept().await;
    let mut stream = respond
        .send_response(Response::new(()), false)
        .expect("a head");
    stream
        .send_data(Bytes::from(vec![0; 20 << 20]), true)
        .expect("data");
    let mut body = head(&mut exchange).await.expect("a head").into_body();
    let mut received = 0;
    while let Some(frame) = timeout(PATIENCE, poll_fn(|cx| body.poll_frame(cx)))
        .await
        .expect("in time")
    {
        received += frame
            .expect("no error")
            .into_data()
            .map_or(0, |data| data.len());
    }
    assert_eq!(received, 20 << 20);
}

#[tokio::test]
async fn a_dropped_connection_is_closed_after_its_last_call() {
    let mut pair = Pair::new(|_| ()).await;
    let mut exchange = pair.send(single());
    let (_request, mut respond) = pair.accept().await;
    drop(pair.client);
    respond
        .send_response(Response::new(()), true)
        .expect("a head");
    head(&mut exchange).await.expect("the call finishes");
    drop(exchange);
    let closed = timeout(PATIENCE, pair.left.recv()).await;
    assert!(closed.is_ok(), "the connection must be closed");
}

/// Returns a connection to a server that sends raw bytes. The server answers PINGs, and answers the first request with `frames`. Then it
/// closes the connection if `hangs_up` is true, and otherwise sends nothing more.
async fn scripted(
    frames: &'static [u8],
    hangs_up: bool,
) -> (Connection, mpsc::UnboundedReceiver<CloseReason>) {
    let (near, mut far) = duplex(1 << 16);
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut preface = [0; 24];
        far.read_exact(&mut preface).await.expect("a preface");
        far.write_all(b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0")
            .await
            .expect("settings");
        loop {
            let mut head = [0; 9];
            far.read_exact(&mut head).await.expect("a frame");
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            far.read_exact(&mut payload).await.expect("a payload");
            match head[3] {
                6 if head[4] == 0 => {
                    let pong = [b"\0\0\x08\x06\x01\0\0\0\0", &payload[..]].concat();
                    far.write_all(&pong).await.expect("a pong");
                }
                1 => break,
                _ => {}
            }
        }
        far.write_all(frames).await.expect("frames");
        if !hangs_up {
            std::future::pending::<()>().await;
        }
    });
    let (leaves, left) = mpsc::unbounded_channel();
    let established = Connection::establish(near, &DEFAULTS, None);
    let established = timeout(PATIENCE, established).await.expect("in time");
    let client = established.expect("a connection").start(move |report| {
        if let ConnectionEvent::Closed(leave) = report {
            let _ = leaves.send(leave);
        }
    });
    (client, left)
}

#[tokio::test]
async fn a_call_above_the_last_stream_of_a_goaway_is_unprocessed_for_every_code() {
    for (frames, blame) in [
        // Last stream 0, code NO_ERROR.
        (b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\0", None),
        // The same GOAWAY with ENHANCE_YOUR_CALM and with INTERNAL_ERROR.
        (
            b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x0b",
            Some(Reason::ENHANCE_YOUR_CALM),
        ),
        (
            b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x02",
            Some(Reason::INTERNAL_ERROR),
        ),
    ] {
        let (client, _left) = scripted(frames, true).await;
        let mut exchange =
            Exchange::start(&client, request(), single(), Recall::Never).expect("sent");
        let error = head(&mut exchange)
            .await
            .expect_err("the server did not process the call");
        assert!(error.is_go_away() && error.is_remote(), "{error:?}");
        assert!(is_unprocessed(&error), "{error}");
        assert_eq!(
            client.goaway_error(),
            blame,
            "goaway_error must return every code except NO_ERROR"
        );
    }
}

#[tokio::test]
async fn a_call_at_the_last_stream_of_a_goaway_may_have_run() {
    // The last stream is 1, the stream of the call.
    let (client, mut left) = scripted(b"\0\0\x08\x07\0\0\0\0\0\0\0\0\x01\0\0\0\0", true).await;
    let mut exchange = Exchange::start(&client, request(), single(), Recall::Never).expect("sent");
    let error = head(&mut exchange)
        .await
        .expect_err("the connection is closed");
    assert!(
        error.is_io() && !error.is_go_away(),
        "the error must be an I/O error and not a GOAWAY: {error:?}"
    );
    assert!(!is_unprocessed(&error), "{error}");
    assert!(left.recv().await.is_some());
}

#[tokio::test]
async fn a_refusal_after_the_response_head_is_an_error_of_the_body() {
    let mut pair = Pair::new(|_| ()).await;
    let mut exchange = pair.send(single());
    let (_request, mut respond) = pair.accept().await;
    let mut stream = respond
        .send_response(Response::new(()), false)
        .expect("a head");
    let mut body = head(&mut exchange).await.expect("a head").into_body();
    stream.send_reset(Reason::REFUSED_STREAM);
    let frame = timeout(PATIENCE, poll_fn(|cx| body.poll_frame(cx))).await;
    match frame.expect("in time") {
        // `is_unprocessed` sees only the error, so it returns true. The call was processed nevertheless: its head was received.
        Some(Err(super::response_body::Broken::Stream(error))) => assert!(is_unprocessed(&error)),
        other => panic!("expected the reset of the stream, got {other:?}"),
    }
}

#[tokio::test]
async fn a_call_queued_inside_h2_looks_like_a_sent_call() {
    let mut pair = Pair::new(|builder| {
        builder.max_concurrent_streams(1);
    })
    .await;
    // The second call exceeds the limit of one stream. In a channel, the balancer counts streams, so it never queues a call inside h2.
    let mut sent = pair.send(single());
    let mut queued = pair.send(single());
    let _accepted = pair.accept().await;
    pair.order(Order::Vanish);
    let sent = head(&mut sent)
        .await
        .expect_err("the peer has disconnected");
    let queued = head(&mut queued)
        .await
        .expect_err("the peer has disconnected");
    assert!(
        pair.accepted.try_recv().is_err(),
        "the server must not receive the queued call"
    );
    for error in [sent, queued] {
        assert!(error.is_io() && !is_unprocessed(&error), "{error:?}");
    }
}

#[tokio::test]
async fn the_stream_limit_follows_the_settings_of_the_peer() {
    // SETTINGS with MAX_CONCURRENT_STREAMS of 3.
    let settings = b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x03";
    let (client, _left) = scripted(settings, false).await;
    assert!(client.max_streams() > 3, "the limit must not be known yet");
    let _exchange = Exchange::start(&client, request(), single(), Recall::Never).expect("sent");
    let known = async {
        while client.max_streams() != 3 {
            tokio::task::yield_now().await;
        }
    };
    assert!(timeout(PATIENCE, known).await.is_ok());
}

#[tokio::test]
async fn the_second_address_is_used_if_the_first_refuses_or_does_not_respond() {
    let listen = |backlog| {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        let local = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        socket.bind(local).expect("a free port");
        socket.listen(backlog).expect("a listener")
    };
    let address = |listener: &tokio::net::TcpListener| listener.local_addr().expect("an address");
    let alive = listen(16);
    // This address refuses connections, because its listener is already dropped.
    let refusing = address(&listen(1));
    let happy_eyeballs = |addresses| {
        happy_eyeballs(addresses, async |address| {
            tokio::net::TcpStream::connect(address)
                .await
                .map_err(DialError::Dial)
        })
    };
    let stream = timeout(PATIENCE, happy_eyeballs(vec![refusing, address(&alive)])).await;
    let stream = stream.expect("in time").expect("a connection");
    assert_eq!(stream.peer_addr().expect("a peer"), address(&alive));
    // This address drops packets: the accept queue of its listener is full.
    let hole = listen(1);
    let mut queue = Vec::new();
    let dial = || tokio::net::TcpStream::connect(address(&hole));
    while let Ok(connected) = timeout(Duration::from_millis(200), dial()).await {
        queue.push(connected.expect("a connection"));
        assert!(queue.len() < 1_000, "the queue never fills");
    }
    let start = tokio::time::Instant::now();
    let stream = timeout(
        PATIENCE,
        happy_eyeballs(vec![address(&hole), address(&alive)]),
    )
    .await;
    let stream = stream.expect("in time").expect("a connection");
    assert_eq!(stream.peer_addr().expect("a peer"), address(&alive));
    let took = tokio::time::Instant::now().saturating_duration_since(start);
    assert!(took < Duration::from_secs(5), "{took:?}");
    // If all addresses fail, the last error is returned.
    let outcome = timeout(PATIENCE, happy_eyeballs(vec![refusing, refusing])).await;
    match outcome.expect("in time") {
        Err(DialError::Dial(error)) => {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        }
        other => panic!("expected a refused connection, got {other:?}"),
    }
}
