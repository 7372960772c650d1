//! The body of a response.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep};
use tonic::{Code, Status};

use super::core::Core;
use super::http_status::code;
use super::load_report::record_load_report;
use super::message_limits::{MessageCheck, MessageLimits};
use super::observation::CallObservation;
use super::pushback::record_pushback;
use super::status;
use crate::balance::{AnswerFault, Blame, Permit};
use crate::transport::deadline::Deadline;
use crate::transport::response_body::{Broken, Incoming};

pin_project! {
    /// The body of a response. Dropping it before its end cancels the call at the server.
    ///
    /// Until it ends, the body enforces the call's deadline, and the call counts as in flight on its endpoint.
    #[derive(Default)]
    pub struct ResponseBody {
        stream: Option<Stream>,
        #[pin]
        timer: Option<Sleep>,
    }
}

/// A response that has not ended.
struct Stream {
    incoming: Incoming,
    permit: Permit,
    core: Arc<Core>,
    deadline: Option<Deadline>,
    /// Whether the head carried the gRPC status.
    status_in_head: bool,
    /// Whether a data frame was returned.
    has_begun: bool,
    /// The check of the size of messages, if they have a limit.
    check: Option<Box<MessageCheck>>,
    /// The metrics and the span of the call, if either is enabled.
    observation: Option<Box<CallObservation>>,
}

impl ResponseBody {
    /// Creates the body of a response. With `status_in_head`, trailers are optional.
    pub(super) fn new(
        incoming: Incoming,
        status_in_head: bool,
        mut permit: Permit,
        core: Arc<Core>,
        (deadline, limits): (Option<Deadline>, MessageLimits),
    ) -> Self {
        // Without a status in the head, trailers must follow, so the response has not ended. `is_complete` takes h2's lock, so it is called
        // only if the head has a status.
        let ended = status_in_head && incoming.is_complete();
        let stream = if ended {
            permit.end_attempt(Code::Ok);
            // The stream ends before the permit gives its place to another call.
            drop(incoming);
            drop(permit);
            None
        } else {
            Some(Stream {
                incoming,
                permit,
                core,
                deadline,
                status_in_head,
                has_begun: false,
                check: limits.of_response(),
                observation: None,
            })
        };
        Self {
            stream,
            timer: None,
        }
    }

    /// Sets the metrics and the span of the call. If the response has already ended, they end.
    pub(super) fn observe(&mut self, observation: Box<CallObservation>) {
        match &mut self.stream {
            Some(stream) => stream.observation = Some(observation),
            None => observation.end(Code::Ok, Instant::now()),
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
        let deadline_exceeded = match (&outcome, stream.deadline) {
            (Poll::Pending, None) => return Poll::Pending,
            (Poll::Pending, Some(deadline)) => {
                // The timer is created only if a read is pending, because most responses are received completely before the first read.
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
            // A server that ignores the deadline may send faster than the client reads. Then no read is pending, and the timer is never
            // polled, so the deadline is compared with the clock at each data frame but the first. The response of a unary call has one
            // data frame, so it needs no clock read.
            (Poll::Ready(Some(Ok(frame))), Some(deadline)) if frame.is_data() => {
                let has_begun = std::mem::replace(&mut stream.has_begun, true);
                Some(deadline).filter(|deadline| has_begun && Instant::now() >= deadline.at())
            }
            _ => None,
        };
        if let Some(deadline) = deadline_exceeded {
            stream.permit.on_deadline_exceeded(Instant::now());
            let endpoint = stream.permit.endpoint();
            let deadline_exceeded =
                status::deadline_exceeded_at(&stream.core, deadline, READING, endpoint);
            stream.on_end(Code::DeadlineExceeded);
            *this.stream = None;
            return Poll::Ready(Some(Err(deadline_exceeded)));
        }
        let Poll::Ready(outcome) = outcome else {
            return Poll::Pending;
        };
        let outcome = match outcome {
            Some(Ok(frame)) if frame.is_data() => match stream.check_data(&frame) {
                Ok(()) => return Poll::Ready(Some(Ok(frame))),
                Err(status) => Some(Err(status)),
            },
            Some(Ok(trailers)) => Some(stream.check_trailers(trailers)),
            Some(Err(broken)) => Some(Err(stream.fail(broken))),
            None => stream.end().map(Err),
        };
        let code = match &outcome {
            Some(Err(status)) => status.code(),
            _ => Code::Ok,
        };
        stream.on_end(code);
        *this.stream = None;
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
    /// Counts a data frame, and checks the size of its messages.
    fn check_data(&mut self, frame: &Frame<Bytes>) -> Result<(), Status> {
        let Some(data) = frame.data_ref() else {
            return Ok(());
        };
        self.permit.on_data(data);
        if let Some(observation) = &mut self.observation {
            observation.on_data(data);
        }
        let Some(check) = &mut self.check else {
            return Ok(());
        };
        check.add(data).map_err(|reason| {
            let address = self.permit.endpoint().address();
            let service = &self.core.service;
            Status::resource_exhausted(format!("call of {service:?} at {address}: {reason}"))
        })
    }

    /// Ends the metrics and the spans of the attempt and of the call. An attempt has an observation only if its call has one.
    fn on_end(&mut self, code: Code) {
        let Some(observation) = self.observation.take() else {
            return;
        };
        let now = Instant::now();
        self.permit.end_attempt_at(code, now);
        observation.end(code, now);
    }

    fn fail(&mut self, broken: Broken) -> Status {
        match broken {
            Broken::Request(status) => status,
            Broken::Stream(error) => {
                let now = Instant::now();
                if status::is_cancelled(&error)
                    && let Some(deadline_exceeded) = self.deadline_exceeded(now)
                {
                    return deadline_exceeded;
                }
                self.permit.on_failure(now, Blame::Connection);
                let address = self.permit.endpoint().address();
                let blame = self.permit.http2().goaway_error();
                status::connection_or_stream_failed(&self.core.service, address, error, blame)
            }
        }
    }

    /// Called after the server has cancelled the response. Returns the status of the call if the deadline was the cause, and `None`
    /// otherwise.
    fn deadline_exceeded(&mut self, now: Instant) -> Option<Status> {
        let deadline = self
            .deadline
            .filter(|_| status::is_deadline_cancellation(self.deadline, now))?;
        self.permit.on_deadline_exceeded(now);
        let endpoint = self.permit.endpoint();
        Some(status::deadline_exceeded_at(
            &self.core, deadline, READING, endpoint,
        ))
    }

    /// Handles the end of a response whose trailers are missing or carry no gRPC status. Returns an error unless the head carried the
    /// status.
    fn end(&mut self) -> Option<Status> {
        if self.status_in_head {
            return None;
        }
        // A truncated response is not a success, even if all received frames are valid.
        let endpoint = self.permit.endpoint();
        let shared = self.core.shared();
        shared.on_not_grpc(endpoint, AnswerFault::Unfinished, || {
            status::MISSING_TRAILERS.to_owned()
        });
        let status = status::missing_trailers(&self.core.service, endpoint.address());
        self.permit.on_failure(Instant::now(), Blame::Connection);
        Some(status)
    }

    /// Checks the trailers. Returns the trailers if the call succeeded. Returns an error if the trailers carry the status of a failure, or
    /// if neither head nor trailers carry a gRPC status.
    fn check_trailers(&mut self, trailers: Frame<Bytes>) -> Result<Frame<Bytes>, Status> {
        let Some(headers) = trailers.trailers_ref() else {
            return Ok(trailers);
        };
        record_load_report(&self.core, headers, &self.permit);
        let code = match code(headers) {
            Some(Code::Ok) => {
                self.permit.on_answer();
                self.core.on_success();
                return Ok(trailers);
            }
            None if self.status_in_head => return Ok(trailers),
            None => return self.end().map_or(Ok(trailers), Err),
            Some(code) => code,
        };
        self.permit.on_answer();
        let now = Instant::now();
        if code == Code::Cancelled
            && let Some(deadline_exceeded) = self.deadline_exceeded(now)
        {
            return Err(deadline_exceeded);
        }
        if let Some(blame) = status::blame(code) {
            self.permit.on_failure(now, blame);
        }
        record_pushback(&self.core, code, headers, &self.permit, now);
        let address = self.permit.endpoint().address();
        status::server_error(address, headers).map_or(Ok(trailers), Err)
    }
}

const READING: &str = "reading the response";

impl fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody")
            .field("ended", &self.stream.is_none())
            .finish_non_exhaustive()
    }
}
