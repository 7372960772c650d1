//! The wait of a call while no endpoint is ready, or while all streams of the ready endpoints are in use. If no endpoint is expected to
//! become ready, or if a limit on requests is reached, the call fails at once. With the option `wait_for_ready`, it waits instead.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Status;

use super::core::Core;
use super::history::History;
use super::status;
use crate::balance::{
    Awaited, Permit, Pick, PickKey, Place, PlaceWait, Reserved, SCAN_LIMIT, Summary, Waiting,
};
use crate::traces::CallTrace;

/// Picks a connection that the call has not tried, and waits until one is available. Returns an error if no such connection is expected to
/// become available. `trace` receives the events of the wait.
pub(super) async fn wait_for_endpoint(
    core: &Core,
    history: &mut History,
    key: &PickKey,
    wait_for_ready: bool,
    trace: Option<&CallTrace>,
) -> Result<Permit, Unavailable> {
    // Yields to the scheduler when the task's cooperative budget is used up. Otherwise, a caller that retries failing calls in a tight loop
    // would starve the channel's background task (the driver), although the calls wait for this task.
    tokio::task::coop::consume_budget().await;
    let shared = core.shared();
    if history.is_exhausted() {
        let status = history.take_status(core, &shared.summary(), "refused");
        return Err(Unavailable::NoEndpoint(status));
    }
    let mut wait = Wait::new(core, history, key, wait_for_ready, trace);
    loop {
        // Registers for notifications before the snapshot is loaded, so that no later change is missed.
        let changed = shared.changed().notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        if wait.place.is_none() && !wait.take_place()? {
            wait.for_place().await;
            continue;
        }
        let (until, awaited) = match wait.pick() {
            Picked::Permit(permit) => {
                wait.delays.on_picked();
                return Ok(permit);
            }
            Picked::Fail(summary, why) => {
                let status = wait.history.take_status(core, &summary, &why);
                return Err(Unavailable::NoEndpoint(status));
            }
            Picked::Limited => return Err(Unavailable::Limited(status::endpoints_limited(core))),
            Picked::NeedsPlace => continue,
            Picked::AwaitsSet => {
                // The pick has woken the driver, which publishes the set. The call is not in the queue in the meantime: the queue would hand
                // it a stream of any selected endpoint.
                wait.queued = None;
                wait.delays.has_waited = true;
                changed.await;
                continue;
            }
            Picked::None(until, awaited) => (until, awaited),
        };
        // Wakes the driver. If all streams of an endpoint are in use, the driver dials one more connection to it. The driver also dials the
        // resting subchannels, which wait until a call needs them.
        shared.demand();
        if wait.join(awaited).map_err(Unavailable::NoEndpoint)? {
            // From now on, the queue hands streams that become free to this call. The next iteration searches the set for streams that
            // became free earlier.
            continue;
        }
        let Some(queued) = &wait.queued else {
            continue;
        };
        tokio::select! {
            biased;
            stream = queued.stream() => {
                wait.delays.on_picked();
                return Ok(wait.use_stream(stream));
            }
            () = changed => {}
            () = sleep_until(until) => {}
        }
        wait.on_time(Instant::now());
    }
}

/// Why a call got no permit.
pub(super) enum Unavailable {
    /// No endpoint can take the call.
    NoEndpoint(Status),
    /// A limit on requests is reached. The call is not sent again.
    Limited(Status),
}

/// The wait of one call.
struct Wait<'a> {
    core: &'a Core,
    history: &'a mut History,
    key: &'a PickKey,
    waits_for_ready: bool,
    delays: Delays<'a>,
    /// The place of the call below the limit of the channel. The call has none while no endpoint is ready.
    place: Option<Place>,
    /// The wait for such a place, once the call has joined the queue for it.
    awaited_place: Option<PlaceWait>,
    /// The place of the call in the wait queue, once the call has joined it.
    queued: Option<Waiting>,
    /// Until this time, the call waits for a stream of a full endpoint instead of using an endpoint where it has failed.
    avoid_until: Option<Instant>,
    /// If a connection did not answer a check, the driver dials a second connection to its endpoint. The call waits for the second
    /// connection until this time. After this time, the call also accepts the silent connection.
    silent_until: Option<Instant>,
}

/// The result of one pick of a call that waits.
enum Picked {
    Permit(Permit),
    /// No connection is available. The call waits for a change, for a stream of these endpoints, or until this time, and then picks again.
    None(Option<Instant>, Awaited),
    /// An endpoint has become ready, so the call must take a place, and then picks again.
    NeedsPlace,
    /// The call waits until the set of its selection is published, and then picks again.
    AwaitsSet,
    /// The call fails for this reason.
    Fail(Summary, Arc<str>),
    /// The call fails because all endpoints have as many requests as their limit allows.
    Limited,
}

impl<'a> Wait<'a> {
    fn new(
        core: &'a Core,
        history: &'a mut History,
        key: &'a PickKey,
        wait_for_ready: bool,
        trace: Option<&'a CallTrace>,
    ) -> Self {
        let now = Instant::now();
        Self {
            avoid_until: history.avoids().then(|| now + UNUSED_ENDPOINT_WAIT),
            silent_until: history.has_silent().then(|| now + SILENT_CONNECTION_WAIT),
            core,
            history,
            key,
            waits_for_ready: wait_for_ready,
            delays: Delays::new(trace),
            place: None,
            awaited_place: None,
            queued: None,
        }
    }

    fn pick(&mut self) -> Picked {
        let shared = self.core.shared();
        // A stream that became free before this call joined the queue is not handed to the call: the call must find that stream in the
        // ready set, the set of connections from which picks are made. All waiting calls share `SCAN_BUDGET`. If few calls wait, each
        // scans all slots of the ready set; if many wait, each scans a part.
        let scan_limit = if self.queued.is_some() {
            SCAN_BUDGET / shared.waiters().waiting().max(1)
        } else {
            0
        };
        let draw = self.history.draw();
        let mut snapshot = shared.snapshot(self.key, draw, scan_limit.max(SCAN_LIMIT));
        if self.place.is_none() && snapshot.summary().ready > 0 {
            return Picked::NeedsPlace;
        }
        self.delays.on_snapshot(snapshot.summary());
        let avoids = self.avoid_until.is_some();
        let mut picked = self.history.pick(&snapshot, avoids);
        if matches!(picked, Pick::Limited) && !self.waits_for_ready {
            // The call fails only if no endpoint at all is below its limit.
            snapshot.scan_all();
            picked = self.history.pick(&snapshot, avoids);
        }
        let next = match picked {
            Pick::Taken(permit) => {
                keep(&mut self.place);
                return Picked::Permit(permit);
            }
            Pick::Limited if !self.waits_for_ready => return Picked::Limited,
            _ if snapshot.awaits_set() => return Picked::AwaitsSet,
            Pick::Excluded if self.history.is_refusal_final() => Next::fail("refused"),
            Pick::Full | Pick::Limited | Pick::Excluded => {
                let last_resorts = snapshot.awaits_last_resorts();
                let again = last_resorts.then(|| Instant::now() + LAST_RESORT_POLL);
                let until = [self.avoid_until, self.silent_until, again];
                Next::Wait(until.into_iter().flatten().min())
            }
            Pick::Empty => {
                // Calls to other endpoints may need the place.
                if shared.request_limit().is_some() {
                    self.place = None;
                    self.queued = None;
                }
                let (_, pending) = snapshot.endpoints_and_pending();
                let summary = Summary {
                    pending,
                    ..snapshot.summary().clone()
                };
                match Next::without_ready(self.core, &summary, self.waits_for_ready) {
                    Next::Fail(why) if summary.has_endpoints() => {
                        Next::Fail(snapshot.explain(|| shared.known()).map_or(why, Into::into))
                    }
                    next => next,
                }
            }
        };
        match next {
            Next::Fail(why) => Picked::Fail(snapshot.summary().clone(), why),
            Next::Wait(until) => Picked::None(until, snapshot.awaited()),
        }
    }

    /// Joins the wait queue, or changes the endpoints that the call waits for. Returns true if the call must search the ready set once more.
    fn join(&mut self, awaited: Awaited) -> Result<bool, Status> {
        if let Some(queued) = &mut self.queued {
            return Ok(queued.set_awaited(awaited));
        }
        let waiters = self.core.shared().waiters();
        let exclusions = self.history.exclusions(self.avoid_until.is_some());
        let joined = waiters.join(exclusions, awaited, self.place.is_some());
        let full = || status::wait_queue_full(self.core, waiters.limit());
        self.queued = Some(joined.ok_or_else(full)?);
        self.delays.has_waited = true;
        // Without a place, the call waits for the next publication only.
        Ok(self.place.is_some())
    }

    /// Takes a free place below the limit of the channel. Returns false if the call must wait for one. While no endpoint is ready, takes none,
    /// because the call does not need it yet, and other calls would fail.
    fn take_place(&mut self) -> Result<bool, Unavailable> {
        let shared = self.core.shared();
        let Some(limit) = shared.request_limit() else {
            self.place = Some(Place::unlimited());
            return Ok(true);
        };
        let summary = shared.summary();
        if let Some(why) = &summary.ended {
            let status = self.history.take_status(self.core, &summary, why);
            return Err(Unavailable::NoEndpoint(status));
        }
        if self.awaited_place.is_some() {
            return Ok(false);
        }
        if summary.ready == 0 {
            return Ok(true);
        }
        // A call without a place gets no stream from the wait queue, so it joins the queue again.
        self.queued = None;
        if let Some(place) = limit.place() {
            self.place = Some(place);
            return Ok(true);
        }
        if !self.waits_for_ready {
            let status = status::channel_limited(self.core, limit.max());
            return Err(Unavailable::Limited(status));
        }
        let waiters = shared.waiters();
        let room = waiters.limit().saturating_sub(waiters.waiting());
        let full = || {
            let status = status::wait_queue_full(self.core, waiters.limit());
            Unavailable::NoEndpoint(status)
        };
        self.awaited_place = Some(limit.join(room).ok_or_else(full)?);
        self.delays.has_waited = true;
        Ok(false)
    }

    /// Waits until the queue has passed a place to the call, or the channel has ended. Publications do not wake the call: thousands of calls
    /// may wait.
    async fn for_place(&mut self) {
        let shared = self.core.shared();
        let ended = shared.end_signal().notified();
        tokio::pin!(ended);
        // Registers before the check, so that the end of the channel is not missed.
        ended.as_mut().enable();
        let Some(awaited) = self.awaited_place.as_mut() else {
            return;
        };
        if shared.summary().ended.is_some() {
            return;
        }
        tokio::select! {
            biased;
            place = awaited => {
                self.awaited_place = None;
                self.place = place;
            }
            () = ended => {}
        }
    }

    /// Converts a stream that the queue has handed over. If the policy picks the endpoint by data of the call, picks again. The queue hands
    /// over the first stream that becomes free, and the policy may prefer one that became free after it. The stream is kept until the pick
    /// has succeeded, so the call never waits twice.
    fn use_stream(&mut self, given: Reserved) -> Permit {
        let permit = if self.key.has_preference() {
            let shared = self.core.shared();
            let snapshot = shared.snapshot(self.key, self.history.draw(), SCAN_LIMIT);
            match self.history.pick(&snapshot, self.avoid_until.is_some()) {
                Pick::Taken(preferred) => preferred,
                _ => given.into_permit(),
            }
        } else {
            given.into_permit()
        };
        // Kept only now: the policy of the program may panic during the pick, and the place must then become free.
        keep(&mut self.place);
        permit
    }

    /// Ends the periods that are over. The call then joins the queue again, because its exclusions have changed.
    fn on_time(&mut self, now: Instant) {
        if self.avoid_until.is_some_and(|until| until <= now) {
            self.avoid_until = None;
            self.queued = None;
        }
        if self.silent_until.is_some_and(|until| until <= now) {
            self.history.trust_silent();
            self.silent_until = None;
            self.queued = None;
        }
    }
}

/// Leaves the place of a call to its permit.
fn keep(place: &mut Option<Place>) {
    if let Some(place) = place.take() {
        place.keep();
    }
}

/// Waits until an endpoint is ready. Returns an error if a call would fail instead of waiting, or after the startup timeout.
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
                "no endpoint is ready after the startup timeout",
            ));
        }
        shared.demand();
        tokio::select! {
            () = changed => {}
            () = tokio::time::sleep_until(until) => {}
        }
    }
}

/// Reports the delays of a call to its trace.
struct Delays<'a> {
    trace: Option<&'a CallTrace>,
    is_unresolved: bool,
    has_waited: bool,
}

impl<'a> Delays<'a> {
    fn new(trace: Option<&'a CallTrace>) -> Self {
        Self {
            trace,
            is_unresolved: false,
            has_waited: false,
        }
    }

    fn on_snapshot(&mut self, summary: &Summary) {
        if !summary.known {
            self.is_unresolved = true;
        } else if self.is_unresolved {
            self.on_resolved();
        }
    }

    fn on_resolved(&mut self) {
        self.is_unresolved = false;
        if let Some(trace) = self.trace {
            trace.on_resolved();
        }
    }

    fn on_picked(&mut self) {
        // The queue can hand over a permit before the call has read that the endpoints are known.
        if self.is_unresolved {
            self.on_resolved();
        }
        if let Some(trace) = self.trace
            && self.has_waited
        {
            trace.on_picked();
        }
    }
}

/// The next step of a call without a connection.
enum Next {
    /// The call waits for a change or until this time, then picks again.
    Wait(Option<Instant>),
    Fail(Arc<str>),
}

impl Next {
    fn fail(why: &str) -> Self {
        Self::Fail(why.into())
    }

    /// Returns the next step if no endpoint is ready.
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
            // A dial is in progress or due. It ends with a connection, an error or its timeout.
            Summary { pending: 1.., .. } => Self::Wait(None),
            _ => Self::fail("no endpoint can be reached"),
        }
    }
}

/// Waits until this time, or forever if it is `None`.
pub(super) async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// The number of slots that all waiting calls together scan when a ready set is published: some milliseconds of work.
const SCAN_BUDGET: usize = 200_000;
/// How long a retry waits for a free stream on an endpoint where the call has not failed. The value is about the duration of a typical
/// call.
const UNUSED_ENDPOINT_WAIT: Duration = Duration::from_millis(50);
/// How often a call looks for a free stream, in addition to the wait queue, while all endpoints that it waits for are last resorts and other
/// endpoints are ready. This is rare: all selected endpoints are ejected or in quarantine, and all their streams are in use.
const LAST_RESORT_POLL: Duration = Duration::from_millis(50);
/// How long a call waits for another connection after its connection did not answer a check. TCP repeats its first packet after about this
/// time (RFC 6298, section 2), so a dial whose first packet was lost may still succeed.
const SILENT_CONNECTION_WAIT: Duration = Duration::from_secs(1);
