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

use super::answer::answer;
use super::body::ResponseBody;
use super::extension::WaitForReady;
use super::headers::{self, Headers};
use super::retry::{self, Tried};
use super::{Core, Route, status};
use crate::balance::{Pick, Ticket};
use crate::transport::deadline::{self, Deadline, GRPC_TIMEOUT};
use crate::transport::http2::OpenError;
use crate::transport::pump::{Exchange, Outgoing, Recall};

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
    /// After a wait or another try. Attempts that the server may have seen came before it.
    Later { previous: u32 },
}

/// What is left of a body after it was sent.
pub(super) enum Kept {
    Empty,
    Single(Bytes),
    /// In the hands of its pump.
    Pumped,
}

impl Kept {
    fn of(body: &Outgoing) -> Self {
        match body {
            Outgoing::Empty => Self::Empty,
            Outgoing::Single(frame) => Self::Single(frame.clone()),
            Outgoing::Stream { .. } => Self::Pumped,
        }
    }

    pub(super) fn is_pumped(&self) -> bool {
        matches!(self, Self::Pumped)
    }

    /// The body again, unless its pump has it.
    pub(super) fn body(&self) -> Option<Outgoing> {
        match self {
            Self::Empty => Some(Outgoing::Empty),
            Self::Single(frame) => Some(Outgoing::Single(frame.clone())),
            Self::Pumped => None,
        }
    }
}

impl Call {
    /// The method's path.
    pub(super) fn path(&self) -> &str {
        self.uri.path()
    }

    pub(super) fn extensions_mut(&mut self) -> &mut Extensions {
        &mut self.extensions
    }

    /// The size of the header list in bytes, as peers count it; 0 for a call without metadata.
    pub(super) fn metadata_size(&self) -> usize {
        match self.headers.size() {
            0 => 0,
            size => size + self.uri.path().len() + AUTHORITY,
        }
    }
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
            headers: Headers::new(head.headers, &core.user_agent, deadline.is_some()),
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

impl ResponseFuture {
    /// A call that has a route leaves the usual way at once.
    pub(super) fn by(core: Arc<Core>, request: Request<Body>, route: Route) -> Self {
        let mut this = Self::new(core, request);
        let state = std::mem::replace(&mut this.state, State::Done);
        if let (State::New(body), Some(core), Some(call)) =
            (state, this.core.take(), this.call.take())
        {
            let tried = Tried::by(route, core.shared().given_up());
            let deadline = this.deadline;
            let shared = Arc::clone(&core);
            let retrying = async move {
                let mut body = Some(body);
                // It is asked once, and never waits: a body that is not there yet is pumped.
                let gathered = std::future::poll_fn(|cx| {
                    Poll::Ready(Outgoing::gather(body.take().unwrap_or_default(), cx))
                });
                let body = gathered.await?;
                retry::run(shared, call, body, None, tried, deadline).await
            };
            this.state = State::Retry(core, Box::pin(retrying));
        }
        this
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
        let status = match (std::mem::replace(this.state, State::Done), this.core.take()) {
            (State::Retry(core, _), _) => {
                status::overdue(&core, deadline, "waiting for an endpoint")
            }
            (State::Sent(mut attempt), Some(core)) => {
                attempt.ticket.on_overdue(Instant::now());
                let endpoint = attempt.ticket.endpoint();
                status::overdue_at(&core, deadline, "waiting for the response", endpoint)
            }
            _ => return Poll::Pending,
        };
        Poll::Ready(Err(status))
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
                    let mut head = ready!(attempt.exchange.poll_head(cx));
                    let sent = std::mem::replace(self, Self::Done);
                    let (Self::Sent(attempt), Some(core), Some(mut call)) =
                        (sent, core.take(), call.take())
                    else {
                        return Poll::Pending;
                    };
                    let is_final = match &mut head {
                        Ok(head) => core.is_final(&call, &attempt.kept, head, cx),
                        Err(_) => false,
                    };
                    match head {
                        Ok(head) if is_final => {
                            let ticket = attempt.ticket;
                            let response = answer(core, &mut call, head, ticket, deadline);
                            return Poll::Ready(response);
                        }
                        outcome => {
                            let shared = Arc::clone(&core);
                            let retry = retry::after_first(core, call, attempt, outcome, deadline);
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
        let now = Instant::now();
        if let Some(deadline) = deadline.filter(|deadline| now >= deadline.at()) {
            return Err(status::overdue(channel, deadline, "making the call"));
        }
        if let Some(policy) = channel.hedging(request)
            && !matches!(body, Outgoing::Stream { .. })
            // Copies of a call that ends the connections it is sent on would end several.
            && request.metadata_size() <= retry::TRUSTED_METADATA
        {
            let policy = policy.clone();
            let (Some(channel), Some(request)) = (core.take(), call.take()) else {
                return Ok(Self::Done);
            };
            let (shared, kept) = (Arc::clone(&channel), Kept::of(&body));
            let hedged = retry::hedge(shared, request, kept, policy, deadline);
            return Ok(Self::Retry(channel, hedged));
        }
        let mut tried = Tried::default();
        let (body, place) = match channel.shared().pick(|_| true) {
            // The place is kept: a second pick would take a second turn.
            Pick::Taken(ticket) if !retry::is_unquestioned(channel, request, &ticket, now) => {
                (body, Some(ticket))
            }
            Pick::Taken(ticket) => {
                match Attempt::start(channel, request, ticket, body, deadline, Try::First, now) {
                    Ok(attempt) => return Ok(Self::Sent(attempt)),
                    Err(unsent) => (unsent.into_retry(channel, &mut tried)?, None),
                }
            }
            _ => (body, None),
        };
        let (Some(channel), Some(request)) = (core.take(), call.take()) else {
            return Ok(Self::Done);
        };
        let retrying = retry::run(Arc::clone(&channel), request, body, place, tried, deadline);
        Ok(Self::Retry(channel, Box::pin(retrying)))
    }
}

/// The length of an IPv4 address and its port: the authority itself is the endpoint's.
const AUTHORITY: usize = 21;
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
        now: Instant,
    ) -> Result<Self, Box<Unsent>> {
        let mut head = Request::new(());
        head.method_mut().clone_from(&call.method);
        *head.version_mut() = Version::HTTP_2;
        let uri = core.uri(&call.uri, ticket.endpoint().authority());
        *head.uri_mut() = uri.unwrap_or_else(|| call.uri.clone());
        *head.headers_mut() = call.headers.take(&core.user_agent);
        if let Try::Later { previous } = which {
            if let Some(deadline) = deadline {
                deadline.rewrite(head.headers_mut(), now);
            }
            if previous > 0 {
                head.headers_mut()
                    .insert(retry::PREVIOUS_ATTEMPTS, previous.into());
            }
        }
        let kept = Kept::of(&body);
        let recall = match &kept {
            Kept::Pumped if core.retry(call).is_some() => Recall::Possible,
            _ => Recall::Never,
        };
        match Exchange::start(ticket.connection(), head, body, recall) {
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

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}
