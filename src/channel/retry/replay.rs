//! Sending again what was certainly not processed.

use std::sync::Arc;

use http::Response;
use tokio::time::Instant;
use tonic::Status;

use super::tried::Tried;
use super::wait::wait;
use crate::channel::body::ResponseBody;
use crate::channel::call::{Attempt, Call, Kept, Retrying, Try, answer};
use crate::channel::{Core, status};
use crate::transport::deadline::Deadline;
use crate::transport::http2::is_unprocessed;
use crate::transport::pump::{Outgoing, Pumped};

/// Goes on after the first try has failed before its response's head.
pub(in crate::channel) fn after_failure(
    core: Arc<Core>,
    call: Call,
    attempt: Attempt,
    error: h2::Error,
    deadline: Option<Deadline>,
) -> Retrying {
    Box::pin(async move {
        let mut tried = Tried::default();
        let body = recover(&core, attempt, error, &mut tried).await?;
        run(core, call, body, tried, deadline).await
    })
}

/// Picks, sends, and does it again, until there is a response or no hope of one. Who polls this keeps the deadline.
pub(in crate::channel) async fn run(
    core: Arc<Core>,
    mut call: Call,
    mut body: Outgoing,
    mut tried: Tried,
    deadline: Option<Deadline>,
) -> Result<Response<ResponseBody>, Status> {
    loop {
        if tried.is_exhausted() {
            return Err(tried.into_status(&core, &core.shared().summary(), "refused"));
        }
        let (ticket, rest) = wait(&core, tried, call.wait_for_ready).await?;
        tried = rest;
        let mut attempt = match Attempt::start(&core, &mut call, ticket, body, deadline, Try::Later)
        {
            Ok(attempt) => attempt,
            Err(unsent) => {
                body = unsent.into_retry(&core, &mut tried)?;
                continue;
            }
        };
        match std::future::poll_fn(|cx| attempt.exchange.poll_head(cx)).await {
            Ok(response) => return Ok(answer(core, &mut call, response, attempt.ticket, deadline)),
            Err(error) => body = recover(&core, attempt, error, &mut tried).await?,
        }
    }
}

/// After a try that has failed before its head: the body for another one, or what the caller is told.
async fn recover(
    core: &Core,
    attempt: Attempt,
    error: h2::Error,
    tried: &mut Tried,
) -> Result<Outgoing, Status> {
    let Attempt {
        exchange,
        mut ticket,
        kept,
    } = attempt;
    let body = match kept {
        Kept::Empty => Some(Outgoing::Empty),
        Kept::Single(frame) => Some(Outgoing::Single(frame)),
        Kept::Pumped => match exchange.into_pumped().await {
            Some(Pumped::Returned(body)) => Some(body),
            Some(Pumped::Failed(status)) => return Err(status),
            Some(Pumped::Spent) | None => None,
        },
    };
    let address = ticket.endpoint().address();
    match body {
        Some(body) if is_unprocessed(&error) => {
            tracing::debug!(%address, %error, "the call was not processed: trying elsewhere");
            ticket.on_refused();
            tried.add_refused(&ticket, error);
            Ok(body)
        }
        _ => {
            let status = status::broken(&core.service, address, error);
            ticket.on_failure(Instant::now());
            Err(status)
        }
    }
}
