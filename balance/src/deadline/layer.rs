//! The layer that makes the deadline of each served call known to the calls that its handler makes.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tower::{Layer, Service};

use super::served::{Scope, ServedDeadline};
use crate::transport::deadline::{self, GRPC_TIMEOUT};

/// A [`tower::Layer`] for a server: calls that a handler makes inherit the deadline of the call that it serves. See the [module](super).
///
/// The layer reads the deadline from the header `grpc-timeout`. It has no effect on a call without this header. The layer does not end
/// calls at their deadline: tonic's server does this.
#[derive(Clone, Copy, Debug)]
pub struct PropagateDeadlineLayer {
    max_margin: Duration,
}

impl PropagateDeadlineLayer {
    /// Creates a layer with a margin of at most 10 ms.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            max_margin: DEFAULT_MAX_MARGIN,
        }
    }

    /// Sets the maximum margin: the time by which inherited deadlines are earlier than the deadline of the served call, so that the handler
    /// can still respond. The margin is a twentieth of the remaining time, but not longer than this maximum. The default is 10 ms. Zero
    /// passes on all of the remaining time.
    #[must_use]
    pub const fn max_margin(mut self, max_margin: Duration) -> Self {
        self.max_margin = max_margin;
        self
    }
}

impl Default for PropagateDeadlineLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for PropagateDeadlineLayer {
    type Service = PropagateDeadline<S>;

    fn layer(&self, inner: S) -> Self::Service {
        PropagateDeadline {
            inner,
            max_margin: self.max_margin,
        }
    }
}

/// The service of [`PropagateDeadlineLayer`].
#[derive(Clone, Debug)]
pub struct PropagateDeadline<S> {
    inner: S,
    max_margin: Duration,
}

impl<S, B, R> Service<Request<B>> for PropagateDeadline<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<ServedBody<R>>;
    type Error = S::Error;
    type Future = ServedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let timeout = request.headers().get(GRPC_TIMEOUT);
        let deadline = timeout
            .and_then(deadline::parse)
            .and_then(|timeout| ServedDeadline::after(timeout, Instant::now(), self.max_margin));
        // The handler may already make its calls here, before its future is polled.
        let future = match deadline {
            Some(deadline) => deadline.enter(|| self.inner.call(request)),
            None => self.inner.call(request),
        };
        ServedFuture {
            future: Scope::new(future, deadline),
            deadline,
        }
    }
}

pin_project! {
    /// The response future of [`PropagateDeadline`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ServedFuture<F> {
        #[pin]
        future: Scope<F>,
        deadline: Option<ServedDeadline>,
    }
}

impl<F, R, E> Future for ServedFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<ServedBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.future.poll(cx))?;
        let deadline = *this.deadline;
        Poll::Ready(Ok(response.map(|body| ServedBody { body, deadline })))
    }
}

pin_project! {
    /// The response body of [`PropagateDeadline`]. The stream of a handler is polled as a part of the body, so its calls inherit the deadline
    /// as well.
    #[derive(Debug)]
    pub struct ServedBody<B> {
        #[pin]
        body: B,
        deadline: Option<ServedDeadline>,
    }
}

impl<B: Body> Body for ServedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        match this.deadline {
            Some(deadline) => deadline.enter(|| this.body.poll_frame(cx)),
            None => this.body.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response within one data centre needs a few milliseconds at most, also on a busy machine.
const DEFAULT_MAX_MARGIN: Duration = Duration::from_millis(10);
