//! The layer that refuses calls over the limit.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{HeaderValue, Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep};
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::body::{LimitBody, LimitRequestBody};
use super::call::{Call, Shared};
use super::gradient::{Bounds, End};

/// A [`tower::Layer`] for a server, which limits the number of calls in flight and adapts the limit to their latency. See the
/// [module](super).
///
/// A call over the limit fails with `RESOURCE_EXHAUSTED` as soon as its request has arrived, or after 20 ms. The request is discarded. The
/// header `grpc-retry-pushback-ms` of the response is the time after which clients with a [retry policy](crate::RetryPolicy) send the call
/// again (gRFC A6): twice the latency without a queue, but 10 ms at least and 1 s at most. Calls of the health service are never refused
/// and do not count.
///
/// **Uploads:** if many uploads or client streams that last for more than 20 ms are refused, h2 closes the connection, because it tolerates
/// about 1 000 frames that arrive after the response of their call (measured with h2 0.4.20). All calls of the connection then fail.
///
/// # Calls in flight
///
/// - A call is in flight until its response begins, or until it fails. So the messages of a response stream do not count, and an open
///   stream does not either.
/// - A call is not in flight while its handler waits for the client, that is, while the handler has polled the request body and the next
///   frame has not arrived. When it arrives, the call is in flight again, even if the limit is reached. So idle uploads do not block a
///   server.
/// - A handler that waits for something else before its response begins, such as an event or another server, is in flight.
///
/// # Latencies
///
/// - The latency of a call is the time for which it was in flight, until its response began. So it does not contain the time in which the
///   handler waited for the client. A call whose handler stops polling the request body before a frame arrives is not measured.
/// - A call that fails before it sends a message, with another code than `CANCELLED` or `DEADLINE_EXCEEDED`, is not measured, because a
///   rejection may be much faster than the work that it avoids.
/// - A call that is dropped because its client cancels it or its deadline passes, and a call that fails with `CANCELLED` or
///   `DEADLINE_EXCEEDED`, counts with its latency so far if that is more than 0.9 times the latency without a queue. It is *late*. As long
///   as the latency without a queue is unknown, such a call counts if it lasted at least as long as three quarters of the successful calls
///   of its window.
///
/// # The limit
///
/// - The limit starts at 32. All clones of the layer share one limit, so it applies to all connections of a server together.
/// - A window accepts calls for 100 ms and at least 20 calls, but at most 1 000 calls. When nine tenths of them have ended, the layer takes
///   the 75th percentile of their latencies. Then the next window begins.
/// - A window is *loaded* if at some time at least half of the limit was in flight, or if at least half of its calls are late (such a
///   window is late as well). A window that is not loaded raises a limit below 32 by a quarter plus 0.75, up to 32, and does not change it
///   otherwise.
/// - After a loaded window, the limit is multiplied by 1.25 times the ratio of the latency without a queue to the latency of the window,
///   but by 0.5 at least and by 1.25 at most. Then 0.75 is added. So a server with `n` workers gets a limit of about 1.25 `n` + 0.75. A
///   late window does not increase the limit, and halves it as long as the latency without a queue is unknown.
/// - Without a measurement of the latency without a queue, the limit does not fall below half of its largest value since the last
///   measurement: a latency that has another cause than a queue, such as a slow database, does not fall with the limit. If the limit would
///   fall below that, a measurement begins, at the earliest 1 s after the last one. If only such measurements follow each other, this
///   interval becomes 4 s, 16 s and 30 s.
/// - A measurement that begins after two late windows halves the limit again while at least half of the calls are late, or while the late
///   share is more than half of the share before the measurement. The limit is not the cause of the late calls if that is so at `min` too, or
///   when the measurement expires, or if the rate of successful calls falls to less than 0.45 of the rate before: a server with a queue is as
///   busy at half of the limit. The limit then returns to the value before the fall. The latency without a queue changes as after other
///   measurements.
/// - The latency without a queue is that of the first window. After a window that is not loaded, it moves a quarter of the way to the
///   latency of the window. After a loaded window with a smaller latency, it moves by a thousandth of the way for each call of the window.
/// - Under load, the latency without a queue is measured. For that, the limit is set to half, and stays there until 30 calls have been
///   accepted and nine tenths of them have ended. If their latency is less than 0.6 times that at twice the limit, the limit is halved
///   again. Otherwise, their latency is the result. The mean of the result and the previous value is the new value, or the result alone if
///   it is not 0.6 to 1.6 times the previous value. Afterwards, the limit is at most twice the limit of the result. The measurement expires
///   after 1 s and 64 times the latency at its beginning.
/// - The first measurement is after the first window if that reached the limit. Otherwise, it is at least 1 s after the last window that
///   was not loaded. The next ones follow after 4 s, 16 s, and then every 30 s, or earlier if the limit would fall by more than half. Each
///   of them waits for a window that is late, or whose latency is more than 1.25 times the latency without a queue.
///
/// # Where to add the layer
///
/// The service gets a request with the body [`LimitRequestBody`]. So layers between this layer and the services must accept any body, as
/// those of tonic and tower do. Add this layer last if one does not.
///
/// The deadlines of the calls should be at least twice the latency without a queue. A call that is dropped earlier does not show a queue.
///
/// A server with methods of very different latencies should have one layer per service (`tonic::service::LayerExt::named_layer`), because
/// the limit follows the 75th percentile of all calls.
#[derive(Clone)]
pub struct AdaptiveLimitLayer {
    shared: Arc<Shared>,
}

impl AdaptiveLimitLayer {
    /// Creates a layer whose limit is between 1 and 10 000 calls.
    #[must_use]
    pub fn new() -> Self {
        Self::with_bounds(DEFAULT_MIN, DEFAULT_MAX)
    }

    /// Creates a layer whose limit is between `min` and `max` calls, also while it measures the latency without a queue. Smaller values are
    /// raised: `min` to 1, `max` to `min`. If `min` is larger than the number of calls that the server can process at once, a queue remains
    /// under overload.
    #[must_use]
    pub fn with_bounds(min: usize, max: usize) -> Self {
        let min = min.max(1);
        let max = max.max(min);
        Self {
            shared: Arc::new(Shared::new(Bounds { min, max })),
        }
    }

    /// Returns the current limit: the number of calls that may be in flight at once.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.shared.limit.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) fn baseline(&self) -> Option<Duration> {
        self.shared.baseline()
    }

    /// Returns the number of calls in flight. It may exceed the limit, after the limit has fallen, and when several handlers that waited
    /// for their clients continue.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    /// Returns the number of calls that were refused since the layer was created.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.shared.refused.load(Ordering::Relaxed)
    }
}

impl Default for AdaptiveLimitLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for AdaptiveLimitLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdaptiveLimitLayer")
            .field("limit", &self.limit())
            .field("in_flight", &self.in_flight())
            .field("refused", &self.refused())
            .finish()
    }
}

impl<S> Layer<S> for AdaptiveLimitLayer {
    type Service = AdaptiveLimit<S>;

    fn layer(&self, inner: S) -> Self::Service {
        AdaptiveLimit {
            inner,
            limit: self.clone(),
        }
    }
}

/// A call in flight. If it is dropped before its response begins, it overran its deadline or was cancelled.
struct InFlight(Arc<Call>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.end(End::Overrun);
    }
}

/// The service of [`AdaptiveLimitLayer`].
#[derive(Clone, Debug)]
pub struct AdaptiveLimit<S> {
    inner: S,
    limit: AdaptiveLimitLayer,
}

impl<S, B, R> Service<Request<B>> for AdaptiveLimit<S>
where
    S: Service<Request<LimitRequestBody<B>>, Response = Response<R>>,
    B: Body,
{
    type Response = Response<LimitBody<R>>;
    type Error = S::Error;
    type Future = LimitFuture<S::Future, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let call = if request.uri().path().starts_with(HEALTH) {
            None
        } else {
            match Call::accept(&self.limit.shared) {
                Ok(call) => Some(call),
                Err(pushback) => return LimitFuture::refused(pushback, request.into_body()),
            }
        };
        let in_flight = call.clone().map(InFlight);
        let request = request.map(|body| LimitRequestBody::new(body, call));
        LimitFuture {
            state: State::Served {
                future: self.inner.call(request),
                in_flight,
            },
        }
    }
}

pin_project! {
    /// The response future of [`AdaptiveLimit`].
    #[must_use = "futures do nothing unless polled"]
    pub struct LimitFuture<F, B> {
        #[pin]
        state: State<F, B>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F, B> {
        Served {
            #[pin]
            future: F,
            in_flight: Option<InFlight>,
        },
        Refused {
            pushback: Duration,
            #[pin]
            body: B,
            expires: Option<Pin<Box<Sleep>>>,
        },
    }
}

impl<F, B> LimitFuture<F, B> {
    fn refused(pushback: Duration, body: B) -> Self {
        let expires = None;
        Self {
            state: State::Refused {
                pushback,
                body,
                expires,
            },
        }
    }
}

impl<F, B, R, E> Future for LimitFuture<F, B>
where
    F: Future<Output = Result<Response<R>, E>>,
    B: Body,
{
    type Output = Result<Response<LimitBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Served { future, in_flight } => {
                let response = ready!(future.poll(cx));
                if let Some(InFlight(call)) = in_flight {
                    call.end(response.as_ref().map_or(End::Unsampled, end));
                }
                *in_flight = None;
                Poll::Ready(Ok(response?.map(|body| LimitBody::new(Some(body)))))
            }
            StateProjection::Refused {
                pushback,
                mut body,
                expires,
            } => {
                // h2 closes a connection after about 1 000 frames that arrive after the response to their call.
                loop {
                    let frame = body.as_mut().poll_frame(cx);
                    let is_last = match &frame {
                        Poll::Pending => false,
                        Poll::Ready(Some(Ok(_))) => body.is_end_stream(),
                        Poll::Ready(None | Some(Err(_))) => true,
                    };
                    if is_last {
                        break;
                    }
                    let expires = expires.get_or_insert_with(|| Box::pin(sleep(REQUEST_TIMEOUT)));
                    if frame.is_pending() {
                        ready!(expires.as_mut().poll(cx));
                        break;
                    }
                    // A client can send frames without an end.
                    if Instant::now() >= expires.deadline() {
                        break;
                    }
                }
                Poll::Ready(Ok(refusal(*pushback)))
            }
        }
    }
}

impl<F, B> fmt::Debug for LimitFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitFuture").finish_non_exhaustive()
    }
}

/// Returns the response to a call over the limit, which consists of headers only.
fn refusal<R>(pushback: Duration) -> Response<LimitBody<R>> {
    let status =
        Status::resource_exhausted("the server is overloaded: its concurrency limit is reached");
    let mut response = status.into_http::<()>().map(|()| LimitBody::new(None));
    let pushback = HeaderValue::from(u64::try_from(pushback.as_millis()).unwrap_or(u64::MAX));
    response.headers_mut().insert(PUSHBACK_HEADER, pushback);
    response
}

/// Returns how a call ended whose response has this head.
fn end<R>(response: &Response<R>) -> End {
    if !response.status().is_success() {
        return End::Unsampled;
    }
    // A call that fails without a message has its status in the head of the response.
    match response.headers().get(Status::GRPC_STATUS) {
        None => End::Success,
        Some(status) => match Code::from_bytes(status.as_bytes()) {
            Code::Ok => End::Success,
            Code::Cancelled | Code::DeadlineExceeded => End::Overrun,
            _ => End::Unsampled,
        },
    }
}

/// Health checks must succeed while a server is overloaded: otherwise, the load moves to the other servers, and these become overloaded
/// too.
const HEALTH: &str = "/grpc.health.v1.Health/";
/// The request of a unary call usually arrives with its head. A request of 4 MiB arrives within this time in a fast network.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(20);
/// gRFC A6.
const PUSHBACK_HEADER: &str = "grpc-retry-pushback-ms";
/// A server may have a single worker. A larger limit would keep a queue.
const DEFAULT_MIN: usize = 1;
const DEFAULT_MAX: usize = 10_000;
