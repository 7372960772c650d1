//! Queues a pick: waits for an endpoint, or for a free stream on one.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Status;

use super::core::Core;
use super::history::History;
use super::status;
use crate::balance::{Permit, Pick, SCAN_LIMIT, Summary};

/// Waits for a place on a connection that was not tried, as long as there is reason to.
pub(super) async fn queue_pick(
    core: &Core,
    history: &mut History,
    wait_for_ready: bool,
) -> Result<Permit, Status> {
    // Yields now and then: a caller that retries failing calls in a tight loop would otherwise starve the driver, whose connection it
    // waits for.
    tokio::task::coop::consume_budget().await;
    let shared = core.shared();
    if history.is_exhausted() {
        return Err(history.take_status(core, &shared.summary(), "refused"));
    }
    let mut waiting = None;
    // An endpoint where the call has failed is not used while another one is only full, for a moment.
    let mut fresh_until = history.avoids().then(|| Instant::now() + PREFERENCE);
    let now = Instant::now();
    // A connection that is only doubtful is better than none, and a second one was dialled when the doubt arose.
    let mut silent_until = history.has_silent().then(|| now + DISTRUST);
    loop {
        // Registered before the look, so that nothing that happens after it is missed.
        let changed = shared.changed().notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let until = {
            // A place that became free before this call has joined the queue may be anywhere. Few calls look at all of them, many at some of
            // them each; places that become free later are handed over.
            let around = if waiting.is_some() {
                LOOKS / shared.waiters().waiting().max(1)
            } else {
                0
            };
            let snapshot = shared.snapshot(around.max(SCAN_LIMIT));
            let next = match history.pick(&snapshot, fresh_until.is_some()) {
                Pick::Taken(permit) => return Ok(permit),
                Pick::Excluded if history.is_refusal_final() => Next::fail("refused"),
                Pick::Full | Pick::Excluded => {
                    Next::Wait([fresh_until, silent_until].into_iter().flatten().min())
                }
                Pick::Empty => Next::without_ready(core, snapshot.summary(), wait_for_ready),
            };
            match next {
                Next::Fail(why) => return Err(history.take_status(core, snapshot.summary(), &why)),
                Next::Wait(until) => until,
            }
        };
        // For a further connection where all are full, and for one that rests until a call wants it.
        shared.demand();
        let Some(place) = &waiting else {
            let waiters = shared.waiters();
            let joined = waiters.join(history.exclusions(fresh_until.is_some()));
            waiting = Some(joined.ok_or_else(|| status::crowded(core, waiters.limit()))?);
            // A place that becomes free from now on is handed over; what became free before, the next look finds.
            continue;
        };
        tokio::select! {
            biased;
            permit = place.place() => return Ok(permit),
            () = changed => {}
            () = sleep_until(until) => {}
        }
        if fresh_until.is_some_and(|until| until <= Instant::now()) {
            fresh_until = None;
            waiting = None;
        }
        if silent_until.is_some_and(|until| until <= Instant::now()) {
            history.trust_silent();
            silent_until = None;
            waiting = None;
        }
    }
}

/// Waits until a call would find an endpoint.
pub(crate) async fn ready(core: &Core) -> Result<(), Status> {
    let shared = core.shared();
    let give_up = Instant::now() + core.startup_timeout;
    loop {
        let changed = shared.changed().notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let summary = shared.summary();
        if summary.ready > 0 {
            return Ok(());
        }
        let until = match Next::without_ready(core, &summary, core.wait_for_ready) {
            Next::Fail(why) => return Err(status::unready(core, &summary, &why)),
            Next::Wait(until) => until.unwrap_or(give_up),
        };
        if Instant::now() >= give_up {
            return Err(status::unready(
                core,
                &summary,
                "no endpoint within the startup timeout",
            ));
        }
        shared.demand();
        tokio::select! {
            () = changed => {}
            () = tokio::time::sleep_until(until) => {}
        }
    }
}

/// What a call without a connection does next.
enum Next {
    /// It waits for a change, or until this time, and looks again.
    Wait(Option<Instant>),
    Fail(Arc<str>),
}

impl Next {
    fn fail(why: &str) -> Self {
        Self::Fail(why.into())
    }

    /// The case that nothing is ready.
    fn without_ready(core: &Core, summary: &Summary, wait_for_ready: bool) -> Self {
        let bound = core.shared().started() + core.startup_timeout;
        match summary {
            Summary {
                ended: Some(why), ..
            } => Self::Fail(Arc::clone(why)),
            _ if wait_for_ready => Self::Wait(None),
            Summary { known: false, .. } if Instant::now() < bound => Self::Wait(Some(bound)),
            Summary {
                known: false,
                endpoints: 0,
                ..
            } => Self::fail(core.unknown),
            Summary { endpoints: 0, .. } => Self::fail("nothing is registered"),
            // A connection may be there any moment, or the attempt's timeout will tell.
            Summary { pending: 1.., .. } => Self::Wait(None),
            _ => Self::fail("no endpoint can be reached"),
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
/// How long a retry waits for a place where it has not failed yet. About the time that a call takes.
const PREFERENCE: Duration = Duration::from_millis(50);
/// How long a call waits for another connection than one that did not answer its check. About the time that TCP takes to repeat its first
/// packet (RFC 6298, section 2), so that a dial that lost one still wins.
const DISTRUST: Duration = Duration::from_secs(1);
