use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body::{Body, Frame};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_test::task::{self, Spawn};
use tower::{Layer, Service, service_fn};

use crate::limit::{AdaptiveLimitLayer, LimitBody, LimitRequestBody};

/// A request body whose frames arrive when the test sends them.
struct Frames(mpsc::UnboundedReceiver<Bytes>);

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0
            .poll_recv(cx)
            .map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

type RequestBody = LimitRequestBody<Frames>;
type Answer = Result<Response<LimitBody<()>>, Infallible>;

/// Returns the next frame, or `None` at the end.
async fn frame(body: &mut Pin<&mut RequestBody>) -> Option<Bytes> {
    let frame = poll_fn(|cx| body.as_mut().poll_frame(cx)).await?.unwrap();
    Some(frame.into_data().unwrap())
}

/// Makes a call to a handler behind the layer. Returns the client's side of the request and the future of the response.
fn call<H, F>(
    layer: &AdaptiveLimitLayer,
    handler: H,
) -> (
    mpsc::UnboundedSender<Bytes>,
    Spawn<impl Future<Output = Answer> + use<H, F>>,
)
where
    H: FnOnce(RequestBody) -> F,
    F: Future<Output = Response<()>>,
{
    let (client, frames) = mpsc::unbounded_channel();
    let mut handler = Some(handler);
    let mut service = layer.layer(service_fn(move |request: Request<RequestBody>| {
        let handler = handler.take().unwrap();
        let response = handler(request.into_body());
        async move { Ok::<_, Infallible>(response.await) }
    }));
    let response = service.call(Request::new(Frames(frames)));
    (client, task::spawn(response))
}

/// Reads the request to its end, and works for a millisecond after each frame.
async fn upload(body: RequestBody) -> Response<()> {
    let mut body = pin!(body);
    while frame(&mut body).await.is_some() {
        sleep(MILLI).await;
    }
    Response::new(())
}

fn is_refused(answer: &Answer) -> bool {
    let status = answer.as_ref().unwrap().headers().get("grpc-status");
    status == Some(&HeaderValue::from_static("8"))
}

fn status(code: &'static str) -> Response<()> {
    let response = Response::builder().header("grpc-status", code);
    response.body(()).unwrap()
}

/// Serves calls one after the other.
async fn serve(layer: &AdaptiveLimitLayer, calls: usize, latency: Duration) {
    for _ in 0..calls {
        let (_client, response) = call(layer, async move |_| {
            sleep(latency).await;
            Response::new(())
        });
        response.await.unwrap();
    }
}

const MILLI: Duration = Duration::from_millis(1);

#[tokio::test(start_paused = true)]
async fn a_handler_that_waits_for_its_client_is_not_in_flight() {
    let layer = AdaptiveLimitLayer::with_bounds(2, 2);
    let mut uploads: Vec<_> = (0..10)
        .map(|_| {
            let (client, mut response) = call(&layer, upload);
            assert!(response.poll().is_pending());
            (client, response)
        })
        .collect();
    assert_eq!(layer.in_flight(), 0);
    // All of them continue when their frames arrive, although they are more than the limit.
    for (client, response) in &mut uploads {
        client.send(Bytes::new()).unwrap();
        assert!(response.poll().is_pending());
    }
    assert_eq!(layer.in_flight(), 10);
    let (_client, response) = call(&layer, async |_| Response::new(()));
    assert!(is_refused(&response.await));
    // The work for the first frame ends, and the handlers wait for the next frame.
    sleep(2 * MILLI).await;
    for (_, response) in &mut uploads {
        assert!(response.poll().is_pending());
    }
    assert_eq!(layer.in_flight(), 0);
    for (client, response) in uploads {
        drop(client);
        assert!(!is_refused(&response.await));
    }
    assert_eq!(layer.in_flight(), 0);
    assert_eq!(layer.refused(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_handler_whose_request_another_task_reads_is_not_in_flight_while_that_task_waits() {
    let layer = AdaptiveLimitLayer::new();
    let (client, mut response) = call(&layer, async |body| {
        let reader = tokio::spawn(async move {
            let mut body = pin!(body);
            while frame(&mut body).await.is_some() {}
        });
        reader.await.unwrap();
        Response::new(())
    });
    assert!(response.poll().is_pending());
    assert_eq!(layer.in_flight(), 1);
    tokio::task::yield_now().await;
    assert_eq!(layer.in_flight(), 0);
    drop(client);
    response.await.unwrap();
    assert_eq!(layer.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_continues_without_the_rest_of_its_request_is_in_flight() {
    let layer = AdaptiveLimitLayer::new();
    let (_client, mut response) = call(&layer, async |body| {
        {
            let mut body = Box::pin(body);
            let mut body = body.as_mut();
            let late = tokio::time::timeout(MILLI, frame(&mut body)).await;
            assert!(late.is_err());
        }
        sleep(MILLI).await;
        Response::new(())
    });
    assert!(response.poll().is_pending());
    assert_eq!(layer.in_flight(), 0);
    sleep(MILLI).await;
    assert!(response.poll().is_pending());
    assert_eq!(layer.in_flight(), 1);
    response.await.unwrap();
    assert_eq!(layer.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_outlives_its_call_is_not_in_flight() {
    let layer = AdaptiveLimitLayer::new();
    let (client, mut response) = call(&layer, upload);
    assert!(response.poll().is_pending());
    drop(response);
    drop(client);
    assert_eq!(layer.in_flight(), 0);
    // The handler returns its response, and reads on.
    let (sender, mut bodies) = mpsc::unbounded_channel();
    let (client, response) = call(&layer, async move |body| {
        assert!(sender.send(body).is_ok());
        Response::new(())
    });
    response.await.unwrap();
    let mut body = pin!(bodies.recv().await.unwrap());
    assert!(task::spawn(frame(&mut body)).poll().is_pending());
    client.send(Bytes::new()).unwrap();
    assert!(frame(&mut body).await.is_some());
    assert_eq!(layer.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_latency_does_not_contain_the_wait_for_the_client() {
    let layer = AdaptiveLimitLayer::new();
    for _ in 0..30 {
        // A unary call whose message arrives after its head.
        let (client, mut response) = call(&layer, async |body| {
            assert!(frame(&mut pin!(body)).await.is_some());
            sleep(10 * MILLI).await;
            Response::new(())
        });
        assert!(response.poll().is_pending());
        sleep(60_000 * MILLI).await;
        client.send(Bytes::new()).unwrap();
        response.await.unwrap();
    }
    assert_eq!(layer.baseline(), Some(10 * MILLI));
}

/// An upload in many frames, for example of a large message.
#[tokio::test(start_paused = true)]
async fn a_call_whose_handler_waits_many_times_counts_with_the_time_of_its_work() {
    let layer = AdaptiveLimitLayer::new();
    for _ in 0..30 {
        let (client, mut response) = call(&layer, upload);
        for _ in 0..10 {
            assert!(response.poll().is_pending());
            sleep(1_000 * MILLI).await;
            client.send(Bytes::new()).unwrap();
            assert!(response.poll().is_pending());
            sleep(MILLI).await;
        }
        assert!(response.poll().is_pending());
        drop(client);
        response.await.unwrap();
    }
    assert_eq!(layer.baseline(), Some(10 * MILLI));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_wait_without_a_frame_is_no_latency() {
    let layer = AdaptiveLimitLayer::new();
    for number in 0..100 {
        let (client, mut response) = call(&layer, upload);
        assert!(response.poll().is_pending());
        client.send(Bytes::new()).unwrap();
        assert!(response.poll().is_pending());
        sleep(MILLI).await;
        assert!(response.poll().is_pending());
        assert_eq!(layer.in_flight(), 0);
        // The caller cancels.
        drop(response);
        assert_eq!(layer.in_flight(), 0);
        // The handler continues without the request.
        let (_client, response) = call(&layer, async |body| {
            {
                let mut body = Box::pin(body);
                let late = tokio::time::timeout(MILLI, frame(&mut body.as_mut())).await;
                assert!(late.is_err());
            }
            sleep(MILLI).await;
            Response::new(())
        });
        response.await.unwrap();
        assert_eq!(layer.baseline(), None, "after {number} calls");
    }
    serve(&layer, 30, 10 * MILLI).await;
    assert_eq!(layer.baseline(), Some(10 * MILLI));
}

#[tokio::test(start_paused = true)]
async fn a_rejection_is_no_latency() {
    let layer = AdaptiveLimitLayer::new();
    for number in 0..300 {
        let (_client, response) = call(&layer, async move |_| {
            if number % 10 < 8 {
                status("16")
            } else {
                sleep(10 * MILLI).await;
                status("0")
            }
        });
        response.await.unwrap();
    }
    assert_eq!(layer.baseline(), Some(10 * MILLI));
}

/// Fills the layer with calls that end after a second, by their own or because they are dropped, and returns the limit after some seconds.
async fn limit_after_late_calls(response: Option<&'static str>) -> usize {
    let layer = AdaptiveLimitLayer::new();
    serve(&layer, 100, MILLI).await;
    for _ in 0..5 {
        let calls: Vec<_> = (0..layer.limit())
            .map(|_| {
                let (_, mut response) = call(&layer, async move |_| {
                    sleep(1_000 * MILLI).await;
                    match response {
                        Some(code) => status(code),
                        None => std::future::pending().await,
                    }
                });
                assert!(response.poll().is_pending());
                response
            })
            .collect();
        sleep(1_001 * MILLI).await;
        for mut call in calls {
            assert_eq!(call.poll().is_ready(), response.is_some());
        }
    }
    assert_eq!(layer.in_flight(), 0);
    layer.limit()
}

#[tokio::test(start_paused = true)]
async fn calls_that_are_dropped_at_their_deadline_reduce_the_limit() {
    assert!(limit_after_late_calls(None).await <= 16);
    // `DEADLINE_EXCEEDED`.
    assert!(limit_after_late_calls(Some("4")).await <= 16);
    // `NOT_FOUND`.
    assert_eq!(limit_after_late_calls(Some("5")).await, 32);
}

/// A frame that arrives after the response to its call counts against its connection.
#[tokio::test(start_paused = true)]
async fn a_refusal_waits_for_the_end_of_the_request_for_a_short_time() {
    let layer = AdaptiveLimitLayer::with_bounds(1, 1);
    let (_client, mut first) = call(&layer, async |_| std::future::pending().await);
    assert!(first.poll().is_pending());
    let start = Instant::now();
    let (client, mut refused) = call(&layer, upload);
    assert!(refused.poll().is_pending());
    for _ in 0..3 {
        client.send(Bytes::new()).unwrap();
        assert!(refused.poll().is_pending());
    }
    drop(client);
    assert!(is_refused(&refused.await));
    assert_eq!(Instant::now(), start);
    let (client, refused) = call(&layer, upload);
    client.send(Bytes::new()).unwrap();
    assert!(is_refused(&refused.await));
    assert_eq!(Instant::now().saturating_duration_since(start), 20 * MILLI);
}

#[test]
fn the_bounds_are_raised_to_one_and_to_each_other() {
    assert_eq!(AdaptiveLimitLayer::with_bounds(0, 0).limit(), 1);
    assert_eq!(AdaptiveLimitLayer::with_bounds(64, 2).limit(), 64);
}

/// Prints the cost of the layer for each call. Build with optimizations.
#[test]
#[ignore = "it measures, and asserts nothing"]
fn the_cost_of_a_call() {
    for threads in [1, 2] {
        let layer = AdaptiveLimitLayer::new();
        let time = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads)
                .map(|_| scope.spawn(|| time_of_calls(&layer)))
                .collect();
            let times = threads.into_iter().map(|thread| thread.join().unwrap());
            times.max().unwrap()
        });
        println!("{threads} threads: {:?} for each call", time / CALLS);
    }
    let start = Instant::now();
    for _ in 0..CALLS {
        std::hint::black_box(Instant::now());
    }
    let time = Instant::now().saturating_duration_since(start);
    println!("{:?} for each reading of the clock", time / CALLS);
}

const CALLS: u32 = 1_000_000;

fn time_of_calls(layer: &AdaptiveLimitLayer) -> Duration {
    let mut service = layer.layer(service_fn(async |request: Request<_>| {
        drop(request);
        Ok::<_, Infallible>(Response::new(()))
    }));
    let waker = std::task::Waker::noop();
    let mut cx = Context::from_waker(waker);
    let start = Instant::now();
    for _ in 0..CALLS {
        let mut response = pin!(service.call(Request::new(String::new())));
        assert!(response.as_mut().poll(&mut cx).is_ready());
    }
    Instant::now().saturating_duration_since(start)
}
