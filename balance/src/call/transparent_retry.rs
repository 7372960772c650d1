//! One attempt, as the policy counts: sending again what was certainly not processed.

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
use super::pick::queue_pick;
use super::prepare::{Prepared, prepare};
use super::request::Call;
use super::response_head::{Head, failure};
use super::status;
use crate::balance::{Blame, Endpoint, Permit};
use crate::transport::deadline::Deadline;
use crate::transport::h2_error::{is_connection_lost, is_unprocessed};
use crate::transport::request_body::{Outgoing, Pumped};
use crate::transport::response_body::{Broken, Incoming};

/// An attempt whose response's head is here, whatever it says.
pub(super) struct Answered {
    pub(super) attempt: Attempt,
    pub(super) head: Response<Incoming>,
}

/// An attempt without a response.
pub(super) struct Failed {
    pub(super) status: Status,
    /// Where, if it got anywhere.
    pub(super) endpoint: Option<Arc<Endpoint>>,
    /// For another attempt, if there can be one.
    pub(super) body: Option<Outgoing>,
}

impl Failed {
    /// No other attempt would end otherwise.
    pub(super) fn for_good(status: Status) -> Self {
        Self {
            status,
            endpoint: None,
            body: None,
        }
    }

    fn at(permit: &Permit, status: Status, body: Option<Outgoing>) -> Self {
        Self {
            status,
            endpoint: Some(Arc::clone(permit.endpoint())),
            body,
        }
    }

    fn unsent(status: Status, body: Outgoing) -> Self {
        Self {
            status,
            endpoint: None,
            body: Some(body),
        }
    }
}

/// What an attempt sends.
pub(super) struct Sending {
    pub(super) body: Outgoing,
    /// Where, if the call has been given a place already.
    pub(super) place: Option<Permit>,
    pub(super) which: Try,
    pub(super) deadline: Option<Deadline>,
}

/// Picks, sends, and does it again, until there is a response or no hope of one.
pub(super) async fn send(
    core: &Core,
    call: &mut Call,
    sending: Sending,
    history: &mut History,
) -> Result<Answered, Failed> {
    let Sending {
        mut body,
        place: mut first,
        which,
        deadline,
    } = sending;
    loop {
        let placed = place(core, call, first.take(), history);
        let permit = match unless_late(deadline, placed).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(PickError::Nowhere(status))) => return Err(Failed::unsent(status, body)),
            Ok(Err(PickError::Refused(status))) => return Err(Failed::for_good(status)),
            Err(late) => {
                let status = status::overdue(core, late, "waiting for an endpoint");
                return Err(Failed::for_good(status));
            }
        };
        let now = Instant::now();
        if let Some(late) = deadline.filter(|deadline| now >= deadline.at()) {
            let status = status::overdue(core, late, "waiting for an endpoint");
            return Err(Failed::for_good(status));
        }
        let mut attempt = match Attempt::start(core, call, permit, body, deadline, which, now) {
            Ok(attempt) => attempt,
            Err(unsent) => {
                let rest = unsent.into_retry(core, history);
                body = rest.map_err(Failed::for_good)?;
                continue;
            }
        };
        history.on_placed(&attempt.permit);
        let head = std::future::poll_fn(|cx| attempt.exchange.poll_head(cx));
        match unless_late(deadline, head).await {
            Ok(Ok(head)) => {
                let answered = Answered { attempt, head };
                return answered.settle(core, call, history, deadline).await;
            }
            Ok(Err(error)) => body = recover(core, call, attempt, error, history, deadline).await?,
            Err(late) => {
                attempt.permit.on_overdue(Instant::now());
                let endpoint = attempt.permit.endpoint();
                let status = status::overdue_at(core, late, "waiting for the response", endpoint);
                return Err(Failed::at(&attempt.permit, status, None));
            }
        }
    }
}

/// Why a call has no place.
pub(super) enum PickError {
    /// No endpoint takes calls.
    Nowhere(Status),
    /// The endpoint would not take this call.
    Refused(Status),
}

impl PickError {
    pub(super) fn into_status(self) -> Status {
        match self {
            Self::Nowhere(status) | Self::Refused(status) => status,
        }
    }
}

/// Waits for a place on a connection that is known to work; `first` is tried before any other.
pub(super) async fn place(
    core: &Core,
    call: &Call,
    mut first: Option<Permit>,
    history: &mut History,
) -> Result<Permit, PickError> {
    loop {
        let permit = if let Some(permit) = first.take() {
            permit
        } else {
            let waited = queue_pick(core, history, call.wait_for_ready).await;
            waited.map_err(PickError::Nowhere)?
        };
        match prepare(core, call, permit, history).await {
            Ok(Prepared::Ready(permit)) => return Ok(permit),
            Ok(Prepared::Unfit) => {}
            Err(status) => return Err(PickError::Refused(status)),
        }
    }
}

/// After a try that has failed before its head: the body for another one, or how the attempt has ended.
///
/// A call that is sent again is a suspect. Without a policy it is sent again only if it was certainly not processed; and if its connection
/// was ended with an error, which it may have caused, it goes on alone.
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
    if let Some(late) = deadline.filter(|_| status::is_deadline(deadline, now))
        && status::is_cancelled(&error)
    {
        permit.on_overdue(now);
        let status = status::overdue_at(core, late, "waiting for the response", permit.endpoint());
        return Err(Failed::at(&permit, status, None));
    }
    let body = match kept.body() {
        Some(body) => Some(body),
        None => given_back(exchange.into_pumped().await).map_err(Failed::for_good)?,
    };
    let blame = permit.http2().blame();
    if is_connection_lost(&error) && (blame.is_some() || !is_unprocessed(&error)) {
        history.on_connection_lost(blame.is_some(), permit.is_alone());
    }
    match body {
        Some(body) if is_unprocessed(&error) && !history.is_to_blame() => {
            let address = permit.endpoint().address();
            tracing::debug!(%address, %error, "the call was not processed: trying elsewhere");
            permit.on_refused();
            if error.is_go_away() {
                history.add_closed(&permit, error);
            } else {
                history.add_refused(&permit, error);
            }
            Ok(body)
        }
        body => {
            let address = permit.endpoint().address();
            let status = if permit.is_alone() && is_connection_lost(&error) {
                status::refused_alone(&core.service, address, call.metadata_size(), error)
            } else {
                status::broken(&core.service, address, error, blame)
            };
            permit.on_failure(now, Blame::Connection);
            Err(Failed::at(&permit, status, body))
        }
    }
}

impl Answered {
    /// Holds a response back that may be lost before it is of any use.
    ///
    /// gRPC's design has a call committed with its response's head. But a server that is killed has often sent a head and not the rest,
    /// which is all but one moment's work; of a hundred kills under load one or two hit it. Nobody has seen the head by then, so the call
    /// can still be sent again. A stream of replies is not kept waiting for its end: what it begins with is handed over soon.
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
        if timeout(ALONE, begun).await.is_ok() {
            let ended = std::future::poll_fn(|cx| incoming.poll_ahead(cx));
            // In either case it is the caller's now.
            let _ = timeout(UNENDED, ended).await;
        }
        match incoming.take_broken() {
            None => Ok(self),
            Some(Broken::Request(status)) => Err(Failed::for_good(status)),
            Some(Broken::Stream(error)) => {
                let now = Instant::now();
                if let Some(late) = deadline.filter(|_| status::is_deadline(deadline, now))
                    && status::is_cancelled(&error)
                {
                    permit.on_overdue(now);
                    let endpoint = permit.endpoint();
                    let status = status::overdue_at(core, late, "reading the response", endpoint);
                    return Err(Failed::at(permit, status, None));
                }
                let blame = permit.http2().blame();
                if is_connection_lost(&error) {
                    history.on_connection_lost(blame.is_some(), permit.is_alone());
                }
                permit.on_failure(now, Blame::Connection);
                let address = permit.endpoint().address();
                let status = status::broken(&core.service, address, error, blame);
                Err(Failed::at(permit, status, Some(body)))
            }
        }
    }

    /// The body for another attempt. None if it cannot be had again; the caller's own failure, if that is what became of it.
    pub(super) async fn take_body(&mut self) -> Result<Option<Outgoing>, Status> {
        match self.attempt.kept.body() {
            Some(body) => Ok(Some(body)),
            None => given_back(self.head.body_mut().recall().await),
        }
    }
}

fn given_back(pumped: Option<Pumped>) -> Result<Option<Outgoing>, Status> {
    match pumped {
        Some(Pumped::Returned(body)) => Ok(Some(body)),
        Some(Pumped::Failed(status)) => Err(status),
        Some(Pumped::Spent) | None => Ok(None),
    }
}

/// The output of a future that is ready before the deadline, or else the deadline. Who polls this has a timer for it, so that none is
/// needed here.
pub(super) async fn unless_late<F: Future>(
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

/// How long a head is held back that nothing follows: longer than it takes a killed process's sockets to be closed.
const ALONE: Duration = Duration::from_millis(50);
/// How long the beginning of a response is held back. A stream's first message is late by so much, so it is short.
const UNENDED: Duration = Duration::from_millis(5);
