//! A call off the usual way: waiting for an endpoint, and sending again what was certainly not processed.

use std::sync::Arc;
use std::time::Duration;

use http::Response;
use tokio::time::Instant;
use tonic::Status;

use super::body::ResponseBody;
use super::call::{Attempt, Call, Kept, Retrying, Try, answer};
use super::{Core, status};
use crate::address::Address;
use crate::balance::{Blame, Endpoint, Member, Pick, Summary, Ticket};
use crate::transport::deadline::Deadline;
use crate::transport::http2::is_unprocessed;
use crate::transport::pump::{Outgoing, Pumped};

/// Where a call has been without being processed.
#[derive(Default)]
pub(super) struct Tried {
    endpoints: Vec<Arc<Endpoint>>,
    connections: Vec<Arc<Member>>,
    last: Option<Failure>,
}

/// How a try ended.
struct Failure {
    address: Address,
    error: h2::Error,
}

impl Tried {
    /// Notes a connection that took no more streams when the call came: nothing against its endpoint.
    pub(super) fn add_gone(&mut self, ticket: &Ticket, error: h2::Error) {
        self.connections.push(Arc::clone(ticket.member()));
        self.last = Some(Failure {
            address: ticket.endpoint().address().clone(),
            error,
        });
    }

    /// Notes an endpoint that has refused the call after it was sent.
    fn add_refused(&mut self, ticket: &Ticket, error: h2::Error) {
        self.endpoints.push(Arc::clone(ticket.endpoint()));
        self.add_gone(ticket, error);
    }

    fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    fn is_exhausted(&self) -> bool {
        self.endpoints.len() > REPLAYS
    }

    /// Whether the connection that was tried last stays in the ready set, so that waiting for the next set is in vain.
    fn is_refusal_final(&self) -> bool {
        self.last.as_ref().is_some_and(|last| last.error.is_reset())
    }

    fn pick(&self, core: &Core, summary: &Summary) -> Pick<Ticket> {
        let shared = core.shared();
        let not_tried = |member: &Arc<Member>| {
            !self
                .connections
                .iter()
                .any(|tried| Arc::ptr_eq(tried, member))
        };
        let elsewhere = |member: &Arc<Member>| {
            not_tried(member)
                && !self
                    .endpoints
                    .iter()
                    .any(|tried| tried.address() == member.endpoint().address())
        };
        match shared.pick(elsewhere) {
            // Where every endpoint has been tried, another connection to one of them is another server more often than not.
            Pick::Excluded if self.endpoints.len() >= summary.endpoints => shared.pick(not_tried),
            pick => pick,
        }
    }

    fn into_status(self, core: &Core, summary: &Summary, why: &str) -> Status {
        match self.last {
            Some(Failure { address, error }) => status::broken(&core.service, &address, error),
            None => status::unready(core, summary, why),
        }
    }
}

/// Goes on after the first try has failed before its response's head.
pub(super) fn after_failure(
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
pub(super) async fn run(
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
            ticket.on_failure(Instant::now(), Blame::Connection);
            Err(status)
        }
    }
}

/// Waits for a place on a connection that was not tried, as long as there is reason to.
async fn wait(core: &Core, tried: Tried, wait_for_ready: bool) -> Result<(Ticket, Tried), Status> {
    let shared = core.shared();
    let mut place = None;
    loop {
        // Registered before the look, so that nothing that happens after it is missed.
        let changed = shared.changed().notified();
        let freed = shared.waiters().freed().notified();
        tokio::pin!(changed, freed);
        changed.as_mut().enable();
        if tried.is_empty() {
            freed.as_mut().enable();
        }
        let summary = shared.summary();
        let verdict = match tried.pick(core, &summary) {
            Pick::Taken(ticket) => return Ok((ticket, tried)),
            Pick::Full => {
                shared.demand();
                Verdict::Wait(None)
            }
            Pick::Excluded if tried.is_refusal_final() => Verdict::Fail("refused"),
            Pick::Excluded => Verdict::Wait(None),
            Pick::Empty => Verdict::without_ready(core, &summary, wait_for_ready),
        };
        let until = match verdict {
            Verdict::Fail(why) => return Err(tried.into_status(core, &summary, why)),
            Verdict::Wait(until) => until,
        };
        if place.is_none() {
            let waiters = shared.waiters();
            let joined = waiters.join();
            place = Some(joined.ok_or_else(|| status::crowded(core, waiters.limit()))?);
            // Whoever gives a place up from now on sees us; what was given up before, we look for once more.
            continue;
        }
        // A place that becomes free may be of no use to a call that has been there, and is not to be announced to it in vain.
        let recheck = (!tried.is_empty()).then(|| Instant::now() + RECHECK);
        let until = until.into_iter().chain(recheck).min();
        tokio::select! {
            () = changed => {}
            () = freed, if tried.is_empty() => {}
            () = sleep_until(until) => {}
        }
    }
}

/// Waits until a call would find an endpoint.
pub(super) async fn ready(core: &Core) -> Result<(), Status> {
    let shared = core.shared();
    let give_up = Instant::now() + core.start_up_bound;
    loop {
        let changed = shared.changed().notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let summary = shared.summary();
        if summary.ready > 0 {
            return Ok(());
        }
        let until = match Verdict::without_ready(core, &summary, core.wait_for_ready) {
            Verdict::Fail(why) => return Err(status::unready(core, &summary, why)),
            Verdict::Wait(until) => until.unwrap_or(give_up),
        };
        if Instant::now() >= give_up {
            return Err(status::unready(
                core,
                &summary,
                "no endpoint within the start-up bound",
            ));
        }
        tokio::select! {
            () = changed => {}
            () = tokio::time::sleep_until(until) => {}
        }
    }
}

/// What a call without a connection is to do.
enum Verdict {
    /// Wait for a change, or look again at this time.
    Wait(Option<Instant>),
    Fail(&'static str),
}

impl Verdict {
    /// The case that nothing is ready.
    fn without_ready(core: &Core, summary: &Summary, wait_for_ready: bool) -> Self {
        let bound = core.shared().started() + core.start_up_bound;
        match summary {
            _ if wait_for_ready => Self::Wait(None),
            Summary { known: false, .. } if Instant::now() < bound => Self::Wait(Some(bound)),
            Summary {
                known: false,
                endpoints: 0,
                ..
            } => Self::Fail("the registry has not answered within the start-up bound"),
            Summary { endpoints: 0, .. } => Self::Fail("nothing is registered"),
            // A connection may be there any moment, or the attempt's timeout will tell.
            Summary { pending: 1.., .. } => Self::Wait(None),
            _ => Self::Fail("no endpoint can be reached"),
        }
    }
}

async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// How often a call is sent again at most.
const REPLAYS: usize = 3;
/// How often a call that was refused looks for a free place elsewhere.
const RECHECK: Duration = Duration::from_millis(10);
