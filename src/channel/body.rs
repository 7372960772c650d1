//! The body of a response.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep};
use tonic::{Code, Status};

use super::{Core, status};
use crate::balance::{Blame, Ticket};
use crate::transport::deadline::Deadline;
use crate::transport::incoming::{Broken, Incoming};

pin_project! {
    /// The body of a response. Dropping it before its end cancels the call at the server.
    ///
    /// It holds the call's deadline and its place in the endpoint's load until it ends.
    #[derive(Default)]
    pub struct ResponseBody {
        stream: Option<Stream>,
        #[pin]
        timer: Option<Sleep>,
    }
}

/// A response under way.
struct Stream {
    incoming: Incoming,
    ticket: Ticket,
    core: Arc<Core>,
    deadline: Option<Deadline>,
}

impl ResponseBody {
    pub(super) fn new(
        incoming: Incoming,
        ended: bool,
        ticket: Ticket,
        core: Arc<Core>,
        deadline: Option<Deadline>,
    ) -> Self {
        // A response that is all head, an error for the most part, is over and leaves the endpoint's load here.
        let stream = (!ended).then_some(Stream {
            incoming,
            ticket,
            core,
            deadline,
        });
        Self {
            stream,
            timer: None,
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut this = self.project();
        let Some(stream) = this.stream else {
            return Poll::Ready(None);
        };
        let outcome = stream.incoming.poll_frame(cx);
        let overdue = match (&outcome, stream.deadline) {
            (Poll::Pending, None) => return Poll::Pending,
            (Poll::Pending, Some(deadline)) => {
                // Armed only now: most responses are here in one piece.
                if this.timer.is_none() {
                    let timer = tokio::time::sleep_until(deadline.at());
                    this.timer.set(Some(timer));
                }
                let timer = this.timer.as_mut().as_pin_mut();
                if timer.is_none_or(|timer| timer.poll(cx).is_pending()) {
                    return Poll::Pending;
                }
                Some(deadline)
            }
            // A server that ignores the deadline may send faster than its client reads, so that there is never a wait for the timer.
            (Poll::Ready(Some(Ok(frame))), Some(deadline)) if frame.is_data() => {
                Some(deadline).filter(|deadline| Instant::now() >= deadline.at())
            }
            _ => None,
        };
        if let Some(deadline) = overdue {
            stream.ticket.on_overdue(Instant::now());
            let overdue = status::overdue(&stream.core, deadline, "reading the response");
            *this.stream = None;
            return Poll::Ready(Some(Err(overdue)));
        }
        let Poll::Ready(outcome) = outcome else {
            return Poll::Pending;
        };
        let outcome = outcome.map(|frame| frame.map_err(|broken| stream.fail(broken)));
        if stream.is_over(outcome.as_ref()) {
            *this.stream = None;
        }
        Poll::Ready(outcome)
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.stream.is_none() {
            SizeHint::with_exact(0)
        } else {
            SizeHint::default()
        }
    }
}

impl Stream {
    fn fail(&mut self, broken: Broken) -> Status {
        match broken {
            Broken::Request(status) => status,
            Broken::Stream(error) => {
                self.ticket.on_failure(Instant::now(), Blame::Connection);
                let address = self.ticket.endpoint().address();
                status::broken(&self.core.service, address, error)
            }
        }
    }

    /// Notes what the trailers say, and whether this was the last frame.
    fn is_over(&mut self, frame: Option<&Result<Frame<Bytes>, Status>>) -> bool {
        match frame {
            None | Some(Err(_)) => true,
            Some(Ok(frame)) => {
                let code = frame.trailers_ref().and_then(code);
                if let Some(blame) = code.and_then(status::blame) {
                    self.ticket.on_failure(Instant::now(), blame);
                } else if code == Some(Code::Ok) {
                    self.core.on_success();
                }
                frame.is_trailers()
            }
        }
    }
}

/// The status that headers or trailers carry.
pub(super) fn code(headers: &HeaderMap) -> Option<Code> {
    let code = headers.get(GRPC_STATUS)?;
    Some(Code::from_bytes(code.as_bytes()))
}

/// Carried by a response's head only if there are no trailers.
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

impl fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody")
            .field("ended", &self.stream.is_none())
            .finish_non_exhaustive()
    }
}
