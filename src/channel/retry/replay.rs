//! One attempt, as the policy counts: sending again what was certainly not processed.

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::Response;
use tokio::time::{Instant, timeout};
use tonic::Status;

use super::tried::Tried;
use super::verdict::failure;
use super::wait::wait;
use crate::balance::{Blame, Endpoint};
use crate::channel::call::{Attempt, Call, Try};
use crate::channel::{Core, status};
use crate::transport::deadline::Deadline;
use crate::transport::http2::is_unprocessed;
use crate::transport::incoming::{Broken, Incoming};
use crate::transport::pump::{Outgoing, Pumped};

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

    fn unsent(status: Status, body: Outgoing) -> Self {
        Self {
            status,
            endpoint: None,
            body: Some(body),
        }
    }
}

/// Picks, sends, and does it again, until there is a response or no hope of one.
pub(super) async fn send(
    core: &Core,
    call: &mut Call,
    mut body: Outgoing,
    tried: &mut Tried,
    which: Try,
    deadline: Option<Deadline>,
) -> Result<Answered, Failed> {
    loop {
        let ticket = match unless_late(deadline, wait(core, tried, call.wait_for_ready)).await {
            Ok(Ok(ticket)) => ticket,
            Ok(Err(status)) => return Err(Failed::unsent(status, body)),
            Err(late) => {
                let status = status::overdue(core, late, "waiting for an endpoint");
                return Err(Failed::for_good(status));
            }
        };
        let mut attempt = match Attempt::start(core, call, ticket, body, deadline, which) {
            Ok(attempt) => attempt,
            Err(unsent) => {
                let rest = unsent.into_retry(core, tried);
                body = rest.map_err(Failed::for_good)?;
                continue;
            }
        };
        tried.on_placed(&attempt.ticket);
        let head = std::future::poll_fn(|cx| attempt.exchange.poll_head(cx));
        match unless_late(deadline, head).await {
            Ok(Ok(head)) => {
                let answered = Answered { attempt, head };
                return answered.settle(core, call).await;
            }
            Ok(Err(error)) => body = recover(core, attempt, error, tried).await?,
            Err(late) => {
                attempt.ticket.on_overdue(Instant::now());
                let status = status::overdue(core, late, "waiting for the response");
                let endpoint = Some(Arc::clone(attempt.ticket.endpoint()));
                return Err(Failed {
                    status,
                    endpoint,
                    body: None,
                });
            }
        }
    }
}

/// After a try that has failed before its head: the body for another one, or how the attempt has ended.
pub(super) async fn recover(
    core: &Core,
    attempt: Attempt,
    error: h2::Error,
    tried: &mut Tried,
) -> Result<Outgoing, Failed> {
    let Attempt {
        exchange,
        mut ticket,
        kept,
    } = attempt;
    let body = match kept.body() {
        Some(body) => Some(body),
        None => given_back(exchange.into_pumped().await).map_err(Failed::for_good)?,
    };
    let address = ticket.endpoint().address();
    match body {
        Some(body) if is_unprocessed(&error) => {
            tracing::debug!(%address, %error, "the call was not processed: trying elsewhere");
            ticket.on_refused();
            tried.add_refused(&ticket, error);
            Ok(body)
        }
        body => {
            let status = status::broken(&core.service, address, error);
            ticket.on_failure(Instant::now(), Blame::Connection);
            Err(Failed {
                status,
                endpoint: Some(Arc::clone(ticket.endpoint())),
                body,
            })
        }
    }
}

impl Answered {
    /// Holds a response back that may be lost before it is of any use.
    ///
    /// gRPC's design has a call committed with its response's head. But a server that is killed has often sent a head and not the rest,
    /// which is all but one moment's work; of a hundred kills under load one or two hit it. Nobody has seen the head by then, so the call
    /// can still be sent again. A stream of replies is not kept waiting for its end: what it begins with is handed over soon.
    pub(super) async fn settle(mut self, core: &Core, call: &Call) -> Result<Self, Failed> {
        let Some(body) = self.attempt.kept.body() else {
            return Ok(self);
        };
        if core.retry(call).is_none() || failure(&self.head).is_some() {
            return Ok(self);
        }
        let ticket = &mut self.attempt.ticket;
        ticket.on_head(Instant::now(), status::head_blame(&self.head, None));
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
                ticket.on_failure(Instant::now(), Blame::Connection);
                let address = ticket.endpoint().address();
                Err(Failed {
                    status: status::broken(&core.service, address, error),
                    endpoint: Some(Arc::clone(ticket.endpoint())),
                    body: Some(body),
                })
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
