//! One attempt of a call, in the sense of a retry policy. An attempt can contain several sends: if the server certainly did not process the
//! call, the call is sent again within the same attempt.

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::Response;
use tokio::time::{Instant, timeout};
use tonic::Status;

use super::attempt::{Attempt, Try};
use super::core::Core;
use super::history::History;
use super::http_status::{Head, failure};
use super::prepare::{Prepared, prepare};
use super::request::Call;
use super::status;
use super::wait_for_endpoint::{Unavailable, wait_for_endpoint};
use crate::balance::{Blame, Endpoint, Permit};
use crate::transport::deadline::Deadline;
use crate::transport::h2_error::{is_connection_lost, is_unprocessed};
use crate::transport::request_body::{Outgoing, Pumped};
use crate::transport::response_body::{Broken, Incoming};

/// An attempt whose response head was received. The head may carry a failure.
pub(super) struct Answered {
    pub(super) attempt: Attempt,
    pub(super) head: Response<Incoming>,
}

/// A failed attempt. It holds neither a stream nor a place below a limit on requests.
pub(super) struct Failed {
    pub(super) status: Status,
    /// The endpoint at which the attempt failed, if any.
    pub(super) endpoint: Option<Arc<Endpoint>>,
    /// The body for another attempt, if one is possible.
    pub(super) body: Option<Outgoing>,
    /// Whether a limit on requests was reached. The call is then not sent again (gRFC A32).
    pub(super) is_limited: bool,
    /// Whether the status is that of a response.
    pub(super) is_answer: bool,
}

impl Failed {
    /// Creates a failure after which no further attempt is made.
    pub(super) fn permanent(status: Status) -> Self {
        Self {
            status,
            endpoint: None,
            body: None,
            is_limited: false,
            is_answer: false,
        }
    }

    /// Creates the failure of an attempt with a response.
    pub(super) fn answered(permit: &Permit, status: Status) -> Self {
        Self {
            is_answer: true,
            ..Self::at(permit, status, None)
        }
    }

    fn limited(status: Status) -> Self {
        Self {
            is_limited: true,
            ..Self::permanent(status)
        }
    }

    fn at(permit: &Permit, status: Status, body: Option<Outgoing>) -> Self {
        Self {
            endpoint: Some(Arc::clone(permit.endpoint())),
            body,
            ..Self::permanent(status)
        }
    }

    fn unsent(status: Status, body: Outgoing) -> Self {
        Self {
            body: Some(body),
            ..Self::permanent(status)
        }
    }
}

/// The input of an attempt.
pub(super) struct Sending {
    pub(super) body: Outgoing,
    /// A permit that the call already has, if any.
    pub(super) permit: Option<Permit>,
    pub(super) which: Try,
    pub(super) deadline: Option<Deadline>,
}

/// Picks a connection and sends the call. Repeats this until a response head is received, or until a failure does not allow a transparent
/// retry.
pub(super) async fn send(
    core: &Core,
    call: &mut Call,
    sending: Sending,
    history: &mut History,
) -> Result<Answered, Failed> {
    let Sending {
        mut body,
        permit: mut first,
        which,
        deadline,
    } = sending;
    loop {
        call.start_span(which.previous());
        let picked = pick_prepared(core, call, first.take(), history);
        let picked = match before_deadline(deadline, picked).await {
            Ok(picked) => picked,
            Err(late) => Err(PickError::late(core, late)),
        };
        let now = Instant::now();
        let late = deadline.filter(|deadline| now >= deadline.at());
        let picked = match (picked, late) {
            (Ok(_), Some(late)) => Err(PickError::late(core, late)),
            (picked, _) => picked,
        };
        let permit = match picked {
            Ok(permit) => permit,
            Err(error) => {
                call.end_unsent_span(error.status().code());
                return Err(match error {
                    PickError::NoEndpoint(status) => Failed::unsent(status, body),
                    PickError::Limited(status) => Failed::limited(status),
                    PickError::Refused(status) => Failed::permanent(status),
                });
            }
        };
        let mut attempt = match Attempt::start(core, call, permit, body, deadline, which, now) {
            Ok(attempt) => attempt,
            Err(unsent) => {
                let rest = unsent.into_retry(core, history);
                body = rest.map_err(Failed::permanent)?;
                continue;
            }
        };
        history.on_sent(&attempt.permit);
        let head = std::future::poll_fn(|cx| attempt.exchange.poll_head(cx));
        match before_deadline(deadline, head).await {
            Ok(Ok(head)) => {
                let answered = Answered { attempt, head };
                return answered.settle(core, call, history, deadline).await;
            }
            Ok(Err(error)) => {
                body = recover(core, call, attempt, error, history, deadline).await?;
                call.on_idle();
            }
            Err(late) => {
                attempt.permit.on_deadline_exceeded(Instant::now());
                let endpoint = attempt.permit.endpoint();
                let status =
                    status::deadline_exceeded_at(core, late, "waiting for the response", endpoint);
                return Err(Failed::at(&attempt.permit, status, None));
            }
        }
    }
}

/// The reason why a call got no permit.
pub(super) enum PickError {
    /// No endpoint can take the call.
    NoEndpoint(Status),
    /// A limit on requests is reached.
    Limited(Status),
    /// The deadline has passed, or the picked endpoint would not accept the call, because the metadata is too large.
    Refused(Status),
}

impl PickError {
    fn late(core: &Core, late: Deadline) -> Self {
        let status = status::deadline_exceeded(core, late, "waiting for an endpoint");
        Self::Refused(status)
    }

    fn status(&self) -> &Status {
        match self {
            Self::NoEndpoint(status) | Self::Limited(status) | Self::Refused(status) => status,
        }
    }

    pub(super) fn into_status(self) -> Status {
        match self {
            Self::NoEndpoint(status) | Self::Limited(status) | Self::Refused(status) => status,
        }
    }
}

/// Waits for a permit on a connection that has passed the checks of [`prepare`]. If `first` is set, this permit is tried before a pick.
pub(super) async fn pick_prepared(
    core: &Core,
    call: &Call,
    mut first: Option<Permit>,
    history: &mut History,
) -> Result<Permit, PickError> {
    loop {
        let permit = if let Some(permit) = first.take() {
            permit
        } else {
            let waited = wait_for_endpoint(
                core,
                history,
                &call.pick_key,
                call.wait_for_ready,
                call.trace.as_deref(),
            )
            .await;
            waited.map_err(|unavailable| match unavailable {
                Unavailable::NoEndpoint(status) => PickError::NoEndpoint(status),
                Unavailable::Limited(status) => PickError::Limited(status),
            })?
        };
        match prepare(core, call, permit, history).await {
            Ok(Prepared::Ready(permit)) => return Ok(permit),
            Ok(Prepared::Unfit) => {}
            Err(status) => return Err(PickError::Refused(status)),
        }
    }
}

/// Handles a failure before the response head. Returns the body for a transparent retry, or the failure of the attempt.
///
/// The call itself may be the cause of the failure. Without a policy, the call is sent again only if it was certainly not processed. If the
/// peer has ended the connection with an error code, the call is sent again only on a private connection.
pub(super) async fn recover(
    core: &Core,
    call: &Call,
    attempt: Attempt,
    error: h2::Error,
    history: &mut History,
    deadline: Option<Deadline>,
) -> Result<Outgoing, Failed> {
    let Attempt {
        exchange,
        mut permit,
        kept,
    } = attempt;
    let now = Instant::now();
    if let Some(late) = deadline.filter(|_| status::is_deadline_cancellation(deadline, now))
        && status::is_cancelled(&error)
    {
        permit.on_deadline_exceeded(now);
        let status =
            status::deadline_exceeded_at(core, late, "waiting for the response", permit.endpoint());
        return Err(Failed::at(&permit, status, None));
    }
    // A call that is still in the queue of a connection whose socket has ended was never sent, and never will be. After other errors, for
    // example a protocol error, h2 may still write what it has. A private connection is made for one call, which it must not cost more
    // than once.
    let is_unsent = error.is_io()
        && is_connection_lost(&error)
        && !permit.is_private()
        && !permit.http2().has_sent(exchange.stream_id());
    let body = match kept.body() {
        Some(body) => Some(body),
        None => returned_body(exchange.into_pumped().await).map_err(Failed::permanent)?,
    };
    let blame = permit.http2().goaway_error();
    let is_unprocessed = is_unsent || is_unprocessed(&error);
    if is_connection_lost(&error) && !is_unsent && (blame.is_some() || !is_unprocessed) {
        history.on_connection_lost(blame.is_some(), permit.is_private());
    }
    match body {
        Some(body) if is_unprocessed && !history.is_to_blame() => {
            let address = permit.endpoint().address();
            tracing::debug!(%address, %error, "the call was not processed: sending it again");
            permit.on_refused();
            if is_unsent {
                history.exclude_connection(&permit, error);
            } else if error.is_go_away() {
                history.add_closed(&permit, error);
            } else {
                history.add_refused(&permit, error);
            }
            Ok(body)
        }
        body => {
            let address = permit.endpoint().address();
            let status = if permit.is_private() && is_connection_lost(&error) {
                status::private_connection_ended(
                    &core.service,
                    address,
                    call.metadata_size(),
                    error,
                )
            } else {
                status::connection_or_stream_failed(&core.service, address, error, blame)
            };
            permit.end_attempt(status.code());
            permit.on_failure(now, Blame::Connection);
            Err(Failed::at(&permit, status, body))
        }
    }
}

impl Answered {
    /// Buffers the beginning of a response for a short time. If the response breaks during this time, the call can still be retried. Does
    /// nothing without a retry policy, for a request stream, or if the head carries a failure.
    ///
    /// In gRFC A6 a call is committed when its response head is received. But servers send the head shortly before the rest, so a killed
    /// server may have sent only the head: under load, this happens in one or two of a hundred kills. While the response is buffered, the
    /// caller has not received the head, so the call can still be sent again. A stream of responses is not buffered to its end: the caller
    /// gets its first messages after a short time.
    pub(super) async fn settle(
        mut self,
        core: &Core,
        call: &Call,
        history: &mut History,
        deadline: Option<Deadline>,
    ) -> Result<Self, Failed> {
        let Some(body) = self.attempt.kept.body() else {
            return Ok(self);
        };
        if core.retry(call).is_none() || failure(&self.head).is_some() {
            return Ok(self);
        }
        let permit = &mut self.attempt.permit;
        permit.on_head(Instant::now(), status::head_blame(Head::of(&self.head)));
        let incoming = self.head.body_mut();
        let begun = std::future::poll_fn(|cx| match incoming.poll_ahead(cx) {
            Poll::Pending if !incoming.has_begun() => Poll::Pending,
            _ => Poll::Ready(()),
        });
        if timeout(HEAD_BUFFER_TIME, begun).await.is_ok() {
            let ended = std::future::poll_fn(|cx| incoming.poll_ahead(cx));
            // After the timeout, the response is handed to the caller although it has not ended.
            let _ = timeout(RESPONSE_BUFFER_TIME, ended).await;
        }
        match incoming.take_broken() {
            None => Ok(self),
            Some(Broken::Request(status)) => Err(Failed::permanent(status)),
            Some(Broken::Stream(error)) => {
                let now = Instant::now();
                if let Some(late) =
                    deadline.filter(|_| status::is_deadline_cancellation(deadline, now))
                    && status::is_cancelled(&error)
                {
                    permit.on_deadline_exceeded(now);
                    let endpoint = permit.endpoint();
                    let status =
                        status::deadline_exceeded_at(core, late, "reading the response", endpoint);
                    return Err(Failed::at(permit, status, None));
                }
                let blame = permit.http2().goaway_error();
                if is_connection_lost(&error) {
                    history.on_connection_lost(blame.is_some(), permit.is_private());
                }
                permit.on_failure(now, Blame::Connection);
                let address = permit.endpoint().address();
                let status =
                    status::connection_or_stream_failed(&core.service, address, error, blame);
                permit.end_attempt(status.code());
                Err(Failed::at(permit, status, Some(body)))
            }
        }
    }

    /// Returns the body for another attempt. Returns `None` if more of the body was sent than is kept, and an error if the caller's body
    /// yielded an error.
    pub(super) async fn take_body(&mut self) -> Result<Option<Outgoing>, Status> {
        match self.attempt.kept.body() {
            Some(body) => Ok(Some(body)),
            None => returned_body(self.head.body_mut().recall().await),
        }
    }
}

fn returned_body(pumped: Option<Pumped>) -> Result<Option<Outgoing>, Status> {
    match pumped {
        Some(Pumped::Returned(body)) => Ok(Some(body)),
        Some(Pumped::Failed(status)) => Err(status),
        Some(Pumped::Spent) | None => Ok(None),
    }
}

/// Returns the output of a future, or the deadline if the future is still pending after the deadline. This function sets no timer: the
/// [`ResponseFuture`](super::ResponseFuture) that polls it has one.
pub(super) async fn before_deadline<F: Future>(
    deadline: Option<Deadline>,
    future: F,
) -> Result<F::Output, Deadline> {
    let mut future = pin!(future);
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => match deadline {
            Some(deadline) if Instant::now() >= deadline.at() => Poll::Ready(Err(deadline)),
            _ => Poll::Pending,
        },
    })
    .await
}

/// How long a response head is buffered while no frame follows. The operating system closes the sockets of a killed process in less time.
const HEAD_BUFFER_TIME: Duration = Duration::from_millis(50);
/// How long the beginning of a response is buffered after the first frame. The time is short because it delays the first message of a
/// stream.
const RESPONSE_BUFFER_TIME: Duration = Duration::from_millis(5);
