//! The layer that refuses calls over the limit.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tonic::Status;
use tower::{Layer, Service};

use super::gradient::{Bounds, Gradient};

/// A [`tower::Layer`] for a server, which limits the number of calls in flight and adapts the limit to their latency. See the
/// [module](super).
///
/// A call over the limit fails at once with `RESOURCE_EXHAUSTED`. The header `grpc-retry-pushback-ms` of the response tells clients with a
/// [retry policy](crate::RetryPolicy) when to send the call again (gRFC A6). Calls of the health service are never refused.
///
/// - A call is in flight until its response begins. So the messages of a response stream do not count, and an open stream does not either.
/// - The limit starts at 32, and changes at most every 100 ms, by the ratio of the latency without a queue to the current median latency.
/// - To measure the latency without a queue, the limit is halved for about 20 calls: 1, 2, 4, 8 and 16 s after an overload begins, then
///   every 30 s.
/// - All clones of the layer share one limit, so it applies to all connections of a server together.
///
/// A server with methods of very different latencies should have one layer per service, because the limit follows the median of all calls.
#[derive(Clone)]
pub struct AdaptiveLimitLayer {
    shared: Arc<Shared>,
}

struct Shared {
    limit: AtomicUsize,
    in_flight: AtomicUsize,
    refused: AtomicUsize,
    gradient: Mutex<Gradient>,
}

impl AdaptiveLimitLayer {
    /// Creates a layer whose limit is between 4 and 10 000 calls.
    #[must_use]
    pub fn new() -> Self {
        Self::with_bounds(DEFAULT_MIN, DEFAULT_MAX)
    }

    /// Creates a layer whose limit is between `min` and `max` calls. `min` is at least 1, and `max` at least `min`; other values are raised.
    #[must_use]
    pub fn with_bounds(min: usize, max: usize) -> Self {
        let min = min.max(1);
        let max = max.max(min);
        let gradient = Gradient::new(Bounds { min, max }, Instant::now());
        let shared = Shared {
            limit: AtomicUsize::new(gradient.limit()),
            in_flight: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            gradient: Mutex::new(gradient),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Returns the current limit: the number of calls that may be in flight at once.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.shared.limit.load(Ordering::Relaxed)
    }

    /// Returns the number of calls in flight.
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

impl Shared {
    fn accept(self: &Arc<Self>) -> Result<Permit, Duration> {
        let in_flight = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        if in_flight <= self.limit.load(Ordering::Relaxed) {
            return Ok(Permit {
                shared: Arc::clone(self),
                start: Instant::now(),
                in_flight,
            });
        }
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.refused.fetch_add(1, Ordering::Relaxed);
        let baseline = self.gradient.try_lock().ok();
        let baseline = baseline.and_then(|gradient| gradient.baseline());
        let pushback = baseline.unwrap_or_default() * PUSHBACK;
        Err(pushback.clamp(MIN_PUSHBACK, MAX_PUSHBACK))
    }
}

/// One call in flight.
struct Permit {
    shared: Arc<Shared>,
    start: Instant,
    /// The number of calls in flight when the call was accepted.
    in_flight: usize,
}

impl Permit {
    /// Records the latency of a call whose response has begun.
    fn end(self) {
        // No call waits for the lock. Under contention, there are enough other calls to derive the limit from.
        if let Ok(mut gradient) = self.shared.gradient.try_lock() {
            gradient.on_end(self.start, Instant::now(), self.in_flight);
            let limit = gradient.limit();
            self.shared.limit.store(limit, Ordering::Relaxed);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        // A call that its caller cancels has no latency.
        self.shared.in_flight.fetch_sub(1, Ordering::Relaxed);
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
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<LimitBody<R>>;
    type Error = S::Error;
    type Future = LimitFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let permit = if request.uri().path().starts_with(HEALTH) {
            None
        } else {
            match self.limit.shared.accept() {
                Ok(permit) => Some(permit),
                Err(pushback) => return LimitFuture::refused(pushback),
            }
        };
        LimitFuture {
            state: State::Served {
                future: self.inner.call(request),
                permit,
            },
        }
    }
}

pin_project! {
    /// The response future of [`AdaptiveLimit`].
    #[must_use = "futures do nothing unless polled"]
    pub struct LimitFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F> {
        Served {
            #[pin]
            future: F,
            permit: Option<Permit>,
        },
        Refused {
            pushback: Duration,
        },
    }
}

impl<F> LimitFuture<F> {
    fn refused(pushback: Duration) -> Self {
        Self {
            state: State::Refused { pushback },
        }
    }
}

impl<F, R, E> Future for LimitFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<LimitBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Served { future, permit } => {
                let response = ready!(future.poll(cx));
                if let Some(permit) = permit.take() {
                    permit.end();
                }
                let response = response?;
                Poll::Ready(Ok(response.map(|body| LimitBody { body: Some(body) })))
            }
            StateProjection::Refused { pushback } => Poll::Ready(Ok(refusal(*pushback))),
        }
    }
}

impl<F> fmt::Debug for LimitFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitFuture").finish_non_exhaustive()
    }
}

/// Returns the response to a call over the limit, which consists of headers only.
fn refusal<R>(pushback: Duration) -> Response<LimitBody<R>> {
    let status =
        Status::resource_exhausted("the server is overloaded: its concurrency limit is reached");
    let mut response = status.into_http::<()>().map(|()| LimitBody { body: None });
    let pushback = HeaderValue::from(u64::try_from(pushback.as_millis()).unwrap_or(u64::MAX));
    response.headers_mut().insert(PUSHBACK_HEADER, pushback);
    response
}

pin_project! {
    /// The response body of [`AdaptiveLimit`]. The body of a refused call is empty.
    #[derive(Debug)]
    pub struct LimitBody<B> {
        #[pin]
        body: Option<B>,
    }
}

impl<B: Body> Body for LimitBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        match self.project().body.as_pin_mut() {
            Some(body) => body.poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// Health checks must succeed while a server is overloaded: otherwise, the load moves to the other servers, and these become overloaded too.
const HEALTH: &str = "/grpc.health.v1.Health/";
/// gRFC A6.
const PUSHBACK_HEADER: &str = "grpc-retry-pushback-ms";
/// A refused call may be sent again after this many latencies without a queue.
const PUSHBACK: u32 = 2;
const MIN_PUSHBACK: Duration = Duration::from_millis(10);
const MAX_PUSHBACK: Duration = Duration::from_secs(1);
const DEFAULT_MIN: usize = 4;
const DEFAULT_MAX: usize = 10_000;
