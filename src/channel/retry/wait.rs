//! Waiting for an endpoint, or for a free stream on one.

use std::time::Duration;

use tokio::time::Instant;
use tonic::Status;

use super::tried::Tried;
use crate::balance::{LOOK_AROUND, Pick, Summary, Ticket};
use crate::channel::{Core, status};

/// Waits for a place on a connection that was not tried, as long as there is reason to.
pub(super) async fn wait(
    core: &Core,
    tried: &mut Tried,
    wait_for_ready: bool,
) -> Result<Ticket, Status> {
    // Or a caller whose calls fail at once, and who tries again and again, would let nobody else run: not even the driver, whose connection it
    // waits for.
    tokio::task::coop::consume_budget().await;
    let shared = core.shared();
    if tried.is_exhausted() {
        return Err(tried.take_status(core, &shared.summary(), "refused"));
    }
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
        let until = {
            // Whoever waits is woken for one place that may be anywhere. Few look at all of them, many at some of them each.
            let around = if place.is_some() {
                LOOKS / shared.waiters().waiting().max(1)
            } else {
                0
            };
            let look = shared.look(around.max(LOOK_AROUND));
            let verdict = match tried.pick(&look) {
                Pick::Taken(ticket) => return Ok(ticket),
                Pick::Full => {
                    shared.demand();
                    Verdict::Wait(None)
                }
                Pick::Excluded if tried.is_refusal_final() => Verdict::Fail("refused"),
                Pick::Excluded => Verdict::Wait(None),
                Pick::Empty => Verdict::without_ready(core, look.summary(), wait_for_ready),
            };
            match verdict {
                Verdict::Fail(why) => return Err(tried.take_status(core, look.summary(), why)),
                Verdict::Wait(until) => until,
            }
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
pub(in crate::channel) async fn ready(core: &Core) -> Result<(), Status> {
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

/// Waits until then, or for ever.
pub(super) async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Places that all waiting calls together look at when a set is published: some milliseconds of work.
const LOOKS: usize = 200_000;
/// How often a call that was refused looks for a free place elsewhere.
const RECHECK: Duration = Duration::from_millis(10);
