//! The bodies of requests and responses.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::call::Call;

pin_project! {
    /// The request body that [`AdaptiveLimit`](super::AdaptiveLimit) passes to its service. It records when the handler waits for the client.
    #[derive(Debug)]
    pub struct LimitRequestBody<B> {
        #[pin]
        body: B,
        wait: Wait,
    }
}

impl<B> LimitRequestBody<B> {
    pub(super) fn new(body: B, call: Option<Arc<Call>>) -> Self {
        let wait = Wait {
            call,
            is_waiting: false,
        };
        Self { body, wait }
    }
}

/// Whether the handler waits for the next frame of the request.
struct Wait {
    /// `None` if the limit does not apply to the call.
    call: Option<Arc<Call>>,
    is_waiting: bool,
}

impl Wait {
    fn set(&mut self, is_waiting: bool) {
        // A frame that has already arrived changes nothing, and takes no lock.
        if let Some(call) = &self.call
            && self.is_waiting != is_waiting
        {
            self.is_waiting = is_waiting;
            if is_waiting {
                call.pause();
            } else {
                call.resume();
            }
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        // The handler may continue without the rest of the request.
        if let Some(call) = &self.call
            && self.is_waiting
        {
            call.abandon();
        }
    }
}

impl fmt::Debug for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wait")
            .field("is_waiting", &self.is_waiting)
            .finish_non_exhaustive()
    }
}

impl<B: Body> Body for LimitRequestBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = this.body.poll_frame(cx);
        this.wait.set(frame.is_pending());
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

pin_project! {
    /// The response body of [`AdaptiveLimit`](super::AdaptiveLimit). The body of a refused call is empty.
    #[derive(Debug)]
    pub struct LimitBody<B> {
        #[pin]
        body: Option<B>,
    }
}

impl<B> LimitBody<B> {
    pub(super) fn new(body: Option<B>) -> Self {
        Self { body }
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
