//! One call. The usual way, an endpoint ready and an answer on the first try, is polled here without a task, a lock or a box; every other
//! way leads to `retry`.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Extensions, Method, Request, Response, Uri, Version};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep};
use tonic::Status;
use tonic::body::Body;

use super::body::{ResponseBody, code};
use super::headers::{self, Headers};
use super::retry::{self, Tried};
use super::{Core, status};
use crate::address::Address;
use crate::balance::{Blame, Pick, Ticket};
use crate::transport::deadline::{self, Deadline, GRPC_TIMEOUT};
use crate::transport::http2::OpenError;
use crate::transport::pump::{Exchange, Incoming, Outgoing};

/// A request extension: whether this call waits for an endpoint where it would fail at once, whatever the channel's default.
///
/// The deadline still holds; without one, the call may wait for ever.
///
/// ```
/// use tonic_etcd::WaitForReady;
///
/// let mut request = tonic::Request::new("world");
/// request.extensions_mut().insert(WaitForReady::new(true));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitForReady(bool);

impl WaitForReady {
    /// Waits, or does not.
    #[must_use]
    pub const fn new(wait: bool) -> Self {
        Self(wait)
    }
}

/// A response extension: the endpoint that has served the call.
///
/// ```
/// use tonic_etcd::ServedBy;
///
/// fn log<T>(response: &tonic::Response<T>) {
///     if let Some(served_by) = response.extensions().get::<ServedBy>() {
///         println!("served by {}", served_by.address());
///     }
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedBy(Address);

impl ServedBy {
    /// The endpoint's address.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.0
    }
}

pin_project! {
    /// The future of a call's response. Dropping it cancels the call at the server.
    #[must_use = "a call is not made before its future is polled"]
    pub struct ResponseFuture {
        // Both are there until the call leaves the usual way or ends.
        core: Option<Arc<Core>>,
        call: Option<Call>,
        state: State,
        deadline: Option<Deadline>,
        #[pin]
        timer: Option<Sleep>,
    }
}

/// How far the call is.
enum State {
    /// Not sent.
    New(Body),
    /// Sent for the first time.
    Sent(Attempt),
    /// Anything but the usual way.
    Retry(Arc<Core>, Retrying),
    Done,
}

pub(super) type Retrying =
    Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, Status>> + Send>>;

/// What is kept of a request for sending it, and for sending it again.
pub(super) struct Call {
    method: Method,
    uri: Uri,
    headers: Headers,
    extensions: Extensions,
    pub(super) wait_for_ready: bool,
}

/// A request on its way.
pub(super) struct Attempt {
    pub(super) exchange: Exchange,
    pub(super) ticket: Ticket,
    pub(super) kept: Kept,
}

/// Which try of a call this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Try {
    /// At once: the timeout in the headers is what is left of the deadline.
    First,
    /// After a wait or another try.
    Later,
}

/// What is left of a body after it was sent.
pub(super) enum Kept {
    Empty,
    Single(Bytes),
    /// In the hands of its pump.
    Pumped,
}

impl ResponseFuture {
    pub(super) fn new(core: Arc<Core>, request: Request<Body>) -> Self {
        let (mut head, body) = request.into_parts();
        headers::set_user_agent(&core.user_agent, &mut head.headers);
        let timeout = deadline::parse(&head.headers);
        let timeout = timeout.or_else(|| {
            let (timeout, header) = core.timeout.as_ref()?;
            head.headers.insert(GRPC_TIMEOUT, header.clone());
            Some(*timeout)
        });
        let deadline = timeout.and_then(|timeout| Deadline::after(timeout, Instant::now()));
        let wait = head.extensions.get::<WaitForReady>();
        let wait_for_ready = wait.map_or(core.wait_for_ready, |wait| wait.0);
        let call = Call {
            method: head.method,
            uri: head.uri,
            headers: Headers::new(head.headers),
            extensions: head.extensions,
            wait_for_ready,
        };
        Self {
            core: Some(core),
            call: Some(call),
            state: State::New(body),
            deadline,
            timer: None,
        }
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<ResponseBody>, Status>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let polled = this.state.poll(this.core, this.call, *this.deadline, cx);
        if polled.is_ready() {
            *this.state = State::Done;
            return polled;
        }
        let Some(deadline) = *this.deadline else {
            return Poll::Pending;
        };
        if this.timer.is_none() {
            let timer = tokio::time::sleep_until(deadline.at());
            this.timer.set(Some(timer));
        }
        let timer = this.timer.as_mut().as_pin_mut();
        if timer.is_none_or(|timer| timer.poll(cx).is_pending()) {
            return Poll::Pending;
        }
        // The attempt goes with the state, which resets the stream.
        let (core, doing) = match std::mem::replace(this.state, State::Done) {
            State::Retry(core, _) => (Some(core), "waiting for an endpoint"),
            State::Sent(mut attempt) => {
                attempt.ticket.on_overdue(Instant::now());
                (this.core.take(), "waiting for the response")
            }
            _ => (this.core.take(), "waiting for the response"),
        };
        match core {
            Some(core) => Poll::Ready(Err(status::overdue(&core, deadline, doing))),
            None => Poll::Pending,
        }
    }
}

impl State {
    fn poll(
        &mut self,
        core: &mut Option<Arc<Core>>,
        call: &mut Option<Call>,
        deadline: Option<Deadline>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Response<ResponseBody>, Status>> {
        loop {
            *self = match self {
                Self::New(_) => {
                    let Self::New(body) = std::mem::replace(self, Self::Done) else {
                        return Poll::Pending;
                    };
                    let body = Outgoing::gather(body, cx)?;
                    Self::send(core, call, deadline, body)?
                }
                Self::Sent(attempt) => {
                    let head = ready!(attempt.exchange.poll_head(cx));
                    let sent = std::mem::replace(self, Self::Done);
                    let (Self::Sent(attempt), Some(core), Some(mut call)) =
                        (sent, core.take(), call.take())
                    else {
                        return Poll::Pending;
                    };
                    match head {
                        Ok(head) => {
                            let ticket = attempt.ticket;
                            let response = answer(core, &mut call, head, ticket, deadline);
                            return Poll::Ready(Ok(response));
                        }
                        Err(error) => {
                            let shared = Arc::clone(&core);
                            let retry = retry::after_failure(core, call, attempt, error, deadline);
                            Self::Retry(shared, retry)
                        }
                    }
                }
                Self::Retry(_, retrying) => return retrying.as_mut().poll(cx),
                Self::Done => return Poll::Pending,
            };
        }
    }

    /// The first try, if an endpoint is ready.
    fn send(
        core: &mut Option<Arc<Core>>,
        call: &mut Option<Call>,
        deadline: Option<Deadline>,
        body: Outgoing,
    ) -> Result<Self, Status> {
        let (Some(channel), Some(request)) = (core.as_ref(), call.as_mut()) else {
            return Ok(Self::Done);
        };
        let mut tried = Tried::default();
        let body = match channel.shared().pick(|_| true) {
            Pick::Taken(ticket) => {
                match Attempt::start(channel, request, ticket, body, deadline, Try::First) {
                    Ok(attempt) => return Ok(Self::Sent(attempt)),
                    Err(unsent) => unsent.into_retry(channel, &mut tried)?,
                }
            }
            _ => body,
        };
        let (Some(channel), Some(request)) = (core.take(), call.take()) else {
            return Ok(Self::Done);
        };
        let retrying = retry::run(Arc::clone(&channel), request, body, tried, deadline);
        Ok(Self::Retry(channel, Box::pin(retrying)))
    }
}

/// A request that a connection did not take.
pub(super) struct Unsent {
    ticket: Ticket,
    body: Outgoing,
    error: OpenError,
}

impl Unsent {
    /// The body for another try, which is not to go to this connection.
    pub(super) fn into_retry(self, core: &Core, tried: &mut Tried) -> Result<Outgoing, Status> {
        match self.error {
            OpenError::Malformed(error) => Err(status::malformed(&core.service, error)),
            OpenError::Gone(error) => {
                tried.add_gone(&self.ticket, error);
                Ok(self.body)
            }
        }
    }
}

impl Attempt {
    /// Sends the request on the connection that was picked. Between the pick and this nothing is awaited.
    pub(super) fn start(
        core: &Core,
        call: &mut Call,
        mut ticket: Ticket,
        body: Outgoing,
        deadline: Option<Deadline>,
        which: Try,
    ) -> Result<Self, Box<Unsent>> {
        let now = Instant::now();
        let mut head = Request::new(());
        head.method_mut().clone_from(&call.method);
        *head.version_mut() = Version::HTTP_2;
        let uri = core.uri(&call.uri, ticket.endpoint().authority());
        *head.uri_mut() = uri.unwrap_or_else(|| call.uri.clone());
        *head.headers_mut() = call.headers.take(&core.user_agent, deadline.is_some());
        if let (Some(deadline), Try::Later) = (deadline, which) {
            deadline.rewrite(head.headers_mut(), now);
        }
        let kept = match &body {
            Outgoing::Empty => Kept::Empty,
            Outgoing::Single(frame) => Kept::Single(frame.clone()),
            Outgoing::Stream { .. } => Kept::Pumped,
        };
        match Exchange::start(ticket.connection(), head, body) {
            Ok(exchange) => {
                ticket.on_sent(now);
                Ok(Self {
                    exchange,
                    ticket,
                    kept,
                })
            }
            Err((error, body)) => Err(Box::new(Unsent {
                ticket,
                body,
                error,
            })),
        }
    }
}

/// Makes the caller's response of the one that has come in.
pub(super) fn answer(
    core: Arc<Core>,
    call: &mut Call,
    response: Response<Incoming>,
    mut ticket: Ticket,
    deadline: Option<Deadline>,
) -> Response<ResponseBody> {
    let status_code = code(response.headers());
    let failure = if response.status().is_success() {
        status_code.and_then(status::blame)
    } else {
        Some(Blame::Connection)
    };
    ticket.on_head(Instant::now(), failure);
    let served_by = ServedBy(ticket.endpoint().address().clone());
    let (mut parts, incoming) = response.into_parts();
    // The request's extensions are of no use any more, but their memory is.
    std::mem::swap(&mut parts.extensions, &mut call.extensions);
    parts.extensions.clear();
    parts.extensions.insert(served_by);
    // A gRPC response that does not end with its head has its status in its trailers; h2 is asked, under its lock, about the others.
    let ended = status_code.is_some() && incoming.is_complete();
    let body = ResponseBody::new(incoming, ended, ticket, core, deadline);
    Response::from_parts(parts, body)
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}
