//! The lifecycle of one connection to an endpoint, as types: each state has only the transitions that are valid in it.
//!
//! ```text
//!            connect            connected
//!   Idle ──────────────▶ Connecting ──────────▶ Ready ──▶ (removed) Draining
//!    ▲ ▲ ▲                  │ failed             │ ended
//!    │ │ │ retry, reset     ▼                    │
//!    │ │ └─────────── TransientFailure ◀─────────┤ broken early several times, or closed gracefully several times before it served a call
//!    │ └───────────── Resting ◀──────────────────┤ closed while no call needed it
//!    └───────────────────────────────────────────┘ otherwise
//! ```
//!
//! The end of a connection does not show that its server has failed, so a connection that served a call is dialled again at once. Unlike in
//! gRPC, the backoff is not reset as soon as a connection is ready: the connection must also serve a call, or last for [`MIN_LIFETIME`].
//! Otherwise a server that answers one PING and closes the connection would be dialled in a tight loop.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::connect_backoff::ConnectBackoff;
use super::health_status::Health;
use super::ready_connection::{ConnectionUse, ReadyConnection};

/// A connection in one of its states: idle, connecting, ready, resting, failing or draining.
#[derive(Debug)]
pub(super) struct Subchannel<S> {
    backoff: ConnectBackoff,
    /// The backoff before the next dial if the connection has ended while no call needed it.
    rest_backoff: ConnectBackoff,
    /// Number of consecutive dials that failed.
    failed: usize,
    /// Number of connections that were closed gracefully without an answered call, although calls needed them. An answered call sets the
    /// count to 0, and so does a new generation of the endpoint (another server, or the same server after a restart). A connection that
    /// ends in another way does not change the count.
    unserved: u32,
    /// The use of the previous connection, if that connection was counted in `unserved`. If a call on it is answered after its close,
    /// `unserved` is set to 0 when the next connection ends.
    last_use: Option<Arc<ConnectionUse>>,
    /// Whether the subchannel counts as failing. Calls do not wait for a failing subchannel. The flag is set by a failure. It is cleared
    /// when a connection is ready, and by a new generation of the endpoint. It stays set during the backoff and the next dial, because
    /// calls would otherwise wait during each dial to an endpoint that is down.
    failing: bool,
    /// Whether an early loss was already followed by an immediate dial. An early loss is the end of a connection within [`MIN_LIFETIME`],
    /// not gracefully, and without an answered call. If the flag is set, the next early loss leads to `TransientFailure`.
    redialled_immediately: bool,
    /// Whether calls need the next connection: a call waited when the subchannel left `Resting`, or an earlier connection was closed
    /// gracefully before it served the calls that needed it.
    wanted: bool,
    state: S,
}

/// Waiting to be dialled, for the first time or again.
#[derive(Debug)]
pub(super) struct Idle;

/// Being dialled. Dropping this state stops the dial.
#[derive(Debug)]
pub(super) struct Connecting {
    started: Instant,
    dial: StopOnDrop,
}

/// Connected, and the peer has answered the first PING.
#[derive(Debug)]
pub(super) struct Ready {
    started: Instant,
    connection: Arc<ReadyConnection>,
    silence: Silence,
    health: Health,
    /// The task that watches the health, if health checks are enabled.
    health_watch: Option<StopOnDrop>,
}

/// Not connected, because the last connection ended while no call needed it. The subchannel is dialled when a call needs a connection, or
/// after a wait.
#[derive(Debug)]
pub(super) struct Resting {
    until: Instant,
}

/// Whether the peer of an open connection seems to have stopped answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Silence {
    None,
    /// No byte was read in time, and no PING was permitted to check the connection.
    Doubtful,
    /// No byte was read in time after a PING.
    Stalled,
}

/// Backing off before the next attempt.
#[derive(Debug)]
pub(super) struct TransientFailure {
    until: Instant,
}

/// Takes no more calls, because the endpoint was removed, or because the connection was replaced or is no longer needed. The state lasts
/// until the last call on the connection ends.
#[derive(Debug)]
pub(super) struct Draining {
    connection: Weak<ReadyConnection>,
}

/// Aborts a task when it is dropped.
#[derive(Debug)]
pub(crate) struct StopOnDrop(pub(crate) AbortHandle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<S> Subchannel<S> {
    pub(super) fn is_failing(&self) -> bool {
        self.failing
    }

    /// Returns the number of consecutive dials that failed.
    pub(super) fn failed_attempts(&self) -> usize {
        self.failed
    }

    fn into_state<T>(self, state: T) -> Subchannel<T> {
        Subchannel {
            backoff: self.backoff,
            rest_backoff: self.rest_backoff,
            failed: self.failed,
            unserved: self.unserved,
            last_use: self.last_use,
            failing: self.failing,
            redialled_immediately: self.redialled_immediately,
            wanted: self.wanted,
            state,
        }
    }

    /// Discards the observations of earlier connections, except for the number of failed dials. Called for a new generation of the endpoint
    /// (for example a new registration), and after a connection has served a call.
    fn forget(&mut self) {
        self.backoff.reset();
        self.rest_backoff.reset();
        self.failing = false;
        self.redialled_immediately = false;
        self.unserved = 0;
        self.last_use = None;
        self.wanted = false;
    }

    /// Discards the observations of the previous generation of the endpoint.
    pub(super) fn refreshed(mut self) -> Self {
        self.forget();
        self
    }
}

impl Subchannel<Idle> {
    pub(super) fn new(backoff: ConnectBackoff) -> Self {
        Self {
            rest_backoff: backoff.clone(),
            backoff,
            failed: 0,
            unserved: 0,
            last_use: None,
            failing: false,
            redialled_immediately: false,
            wanted: false,
            state: Idle,
        }
    }

    pub(super) fn connect(self, dial: AbortHandle, now: Instant) -> Subchannel<Connecting> {
        self.into_state(Connecting {
            started: now,
            dial: StopOnDrop(dial),
        })
    }
}

impl Subchannel<Connecting> {
    /// Moves to `Ready`. With a health watch, the connection takes no calls until its health is known.
    pub(super) fn connected(
        mut self,
        connection: Arc<ReadyConnection>,
        health_watch: Option<StopOnDrop>,
    ) -> Subchannel<Ready> {
        self.failing = false;
        self.failed = 0;
        let started = self.state.started;
        self.into_state(Ready {
            started,
            connection,
            silence: Silence::None,
            health: match health_watch {
                Some(_) => Health::Unknown,
                None => Health::Serving,
            },
            health_watch,
        })
    }

    pub(super) fn failed(
        mut self,
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Subchannel<TransientFailure> {
        self.failing = true;
        self.failed += 1;
        // gRPC's connection backoff document measures the wait from the start of the attempt, so the duration of the failed dial is part of
        // the wait.
        let until = self.state.started + self.backoff.next(rng);
        self.into_state(TransientFailure {
            until: until.max(now),
        })
    }

    /// Stops the dial.
    pub(super) fn cancel(self) -> Subchannel<Idle> {
        self.state.dial.0.abort();
        self.into_state(Idle)
    }
}

/// How a connection ended.
#[derive(Clone, Debug)]
pub(super) struct Ending {
    /// Whether the peer closed the connection gracefully.
    pub(super) graceful: bool,
    /// Whether calls were sent on the connection, and whether one was answered. This can still change, since calls in flight may be
    /// answered later.
    pub(super) used: Arc<ConnectionUse>,
}

/// The state that follows the end of a connection.
#[derive(Debug)]
pub(super) enum Lost {
    /// Dial again at once.
    Idle(Subchannel<Idle>),
    /// Dial when a call needs the connection, or after a wait.
    Resting(Subchannel<Resting>),
    /// Back off before the next attempt.
    TransientFailure(Subchannel<TransientFailure>),
}

impl Subchannel<Ready> {
    pub(super) fn connection(&self) -> &Arc<ReadyConnection> {
        &self.state.connection
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.state.silence == Silence::Stalled
    }

    pub(super) fn is_silent(&self) -> bool {
        self.state.silence != Silence::None
    }

    /// Sets the silence. Returns whether it has changed.
    pub(super) fn set_silence(&mut self, silence: Silence) -> bool {
        std::mem::replace(&mut self.state.silence, silence) != silence
    }

    pub(super) fn health(&self) -> &Health {
        &self.state.health
    }

    pub(super) fn set_health(&mut self, health: Health) {
        self.state.health = health;
    }

    /// Replaces the health watch. The health stays as it is until the new watch reports one.
    pub(super) fn set_health_watch(&mut self, watch: StopOnDrop) {
        self.state.health_watch = Some(watch);
    }

    pub(super) fn has_health_watch(&self) -> bool {
        self.state.health_watch.is_some()
    }

    /// Ends the health watch. The connection counts as healthy from then on.
    pub(super) fn end_health_watch(&mut self) {
        self.state.health_watch = None;
        self.state.health = Health::Serving;
    }

    /// Handles the end of the connection, and returns the state that follows. The backoff is reset if the connection served a call or
    /// lasted for [`MIN_LIFETIME`]. Connections that were closed gracefully without serving the calls that needed them are counted in
    /// `unserved`, even if they lasted that long.
    pub(super) fn lost(self, ending: Ending, rng: &mut fastrand::Rng, now: Instant) -> Lost {
        let started = self.state.started;
        self.ended(started, ending, rng, now)
    }

    pub(super) fn drain(self) -> Subchannel<Draining> {
        let connection = Arc::downgrade(&self.state.connection);
        self.into_state(Draining { connection })
    }
}

impl<S> Subchannel<S> {
    /// Returns the state that follows the end of a connection. `started`: when its dial started.
    fn ended(
        mut self,
        started: Instant,
        ending: Ending,
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Lost {
        if ending.used.is_answered() {
            self.forget();
            return Lost::Idle(self.into_state(Idle));
        }
        if self.last_use.take().is_some_and(|last| last.is_answered()) {
            self.unserved = 0;
        }
        let lasted = now.saturating_duration_since(started) >= MIN_LIFETIME;
        // If the connection lasted for `MIN_LIFETIME` and no call was sent on it, no call needed it after all.
        let wanted = ending.used.is_sent() || (self.wanted && !lasted);
        if lasted {
            self.backoff.reset();
            self.redialled_immediately = false;
        }
        if wanted && ending.graceful {
            self.unserved += 1;
            self.last_use = Some(ending.used);
            self.wanted = true;
            if self.unserved < MAX_UNSERVED {
                return Lost::Idle(self.into_state(Idle));
            }
            return Lost::TransientFailure(self.back_off(started, rng, now));
        }
        if !wanted && (ending.graceful || lasted) {
            self.wanted = false;
            let until = now + self.rest_backoff.next(rng);
            return Lost::Resting(self.into_state(Resting { until }));
        }
        if lasted || !std::mem::replace(&mut self.redialled_immediately, true) {
            return Lost::Idle(self.into_state(Idle));
        }
        Lost::TransientFailure(self.back_off(started, rng, now))
    }

    fn back_off(
        mut self,
        started: Instant,
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Subchannel<TransientFailure> {
        self.failing = true;
        let until = started + self.backoff.next(rng);
        self.into_state(TransientFailure {
            until: until.max(now),
        })
    }
}

impl Subchannel<Resting> {
    pub(super) fn until(&self) -> Instant {
        self.state.until
    }

    /// Leaves `Resting`, so that the subchannel can be dialled. `wanted` is true if a call waits for the connection.
    pub(super) fn wake(mut self, wanted: bool) -> Subchannel<Idle> {
        self.wanted = wanted;
        self.into_state(Idle)
    }
}

impl Subchannel<TransientFailure> {
    pub(super) fn until(&self) -> Instant {
        self.state.until
    }

    /// Ends the backoff. The subchannel still counts as failing.
    pub(super) fn retry(self) -> Subchannel<Idle> {
        self.into_state(Idle)
    }

    /// Skips the remaining backoff, and discards the observations of the previous generation of the endpoint.
    pub(super) fn reset(mut self) -> Subchannel<Idle> {
        self.forget();
        self.into_state(Idle)
    }
}

impl Subchannel<Draining> {
    /// Returns whether the last call has ended.
    pub(super) fn is_drained(&self) -> bool {
        self.state.connection.strong_count() == 0
    }
}

/// A connection that ends at least this long after the start of its dial counts as successful, even if no call used it.
const MIN_LIFETIME: Duration = Duration::from_secs(1);
/// The subchannel counts as failing when this many connections were closed gracefully without an answered call, although calls needed them.
/// An answered call resets the count.
const MAX_UNSERVED: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn idle() -> Subchannel<Idle> {
        Subchannel::new(ConnectBackoff::new(Duration::from_secs(120)))
    }

    fn connecting(idle: Subchannel<Idle>, now: Instant) -> Subchannel<Connecting> {
        idle.connect(tokio::spawn(async {}).abort_handle(), now)
    }

    #[tokio::test(start_paused = true)]
    async fn a_subchannel_is_failing_during_the_next_dial_but_not_after_a_new_generation() {
        let mut rng = fastrand::Rng::with_seed(7);
        let now = Instant::now();
        let failed = connecting(idle(), now).failed(&mut rng, now);
        assert!(failed.is_failing());
        let again = connecting(failed.retry(), now);
        assert!(again.is_failing(), "the subchannel must stay failing");
        let failed = again.failed(&mut rng, now);
        assert!(
            !failed.reset().is_failing(),
            "a new generation must end the failure"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_dial_longer_than_its_backoff_is_retried_at_once() {
        let mut rng = fastrand::Rng::with_seed(7);
        let started = Instant::now();
        let now = started + Duration::from_secs(10);
        let failed = connecting(idle(), started).failed(&mut rng, now);
        assert_eq!(failed.until(), now);
    }

    #[tokio::test(start_paused = true)]
    async fn waits_grow_with_consecutive_failures_and_a_new_generation_resets_them() {
        let mut rng = fastrand::Rng::with_seed(7);
        let now = Instant::now();
        let mut subchannel = idle();
        for _ in 0..10 {
            subchannel = connecting(subchannel, now).failed(&mut rng, now).retry();
        }
        let failed = connecting(subchannel, now).failed(&mut rng, now);
        assert!(failed.until() > now + Duration::from_secs(60));
        let failed = connecting(failed.reset(), now).failed(&mut rng, now);
        assert!(failed.until() < now + Duration::from_secs(2));
    }

    /// Returns the state after a connection that was made and ended at the time `now`.
    fn lose(
        mut subchannel: Subchannel<Idle>,
        ending: Ending,
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Lost {
        subchannel.failing = false;
        subchannel.failed = 0;
        connecting(subchannel, now).ended(now, ending, rng, now)
    }

    fn ending(graceful: bool, sent: bool, answered: bool) -> Ending {
        let used = Arc::<ConnectionUse>::default();
        if sent {
            used.on_sent();
        }
        if answered {
            used.on_answer();
        }
        Ending { graceful, used }
    }

    /// Returns a subchannel after ten failed dials, so its next backoff is about 110 s. This backoff must not delay the next dial after a
    /// connection that has served a call, or that was closed gracefully while no call needed it.
    fn after_an_outage(now: Instant, rng: &mut fastrand::Rng) -> Subchannel<Idle> {
        let mut subchannel = idle();
        for _ in 0..10 {
            subchannel = connecting(subchannel, now).failed(rng, now).retry();
        }
        subchannel
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_served_a_call_is_redialled_at_once_after_any_end() {
        let (mut rng, now) = (fastrand::Rng::with_seed(7), Instant::now());
        for graceful in [true, false] {
            let mut subchannel = after_an_outage(now, &mut rng);
            for _ in 0..100 {
                let lost = lose(subchannel, ending(graceful, true, true), &mut rng, now);
                let Lost::Idle(next) = lost else {
                    panic!("unexpected next state: {lost:?}");
                };
                assert!(!next.is_failing());
                subchannel = next;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_unused_connection_closed_gracefully_is_redialled_with_growing_waits() {
        let (mut rng, now) = (fastrand::Rng::with_seed(7), Instant::now());
        let mut subchannel = after_an_outage(now, &mut rng);
        let mut waits = Vec::new();
        for _ in 0..8 {
            let lost = lose(subchannel, ending(true, false, false), &mut rng, now);
            let Lost::Resting(resting) = lost else {
                panic!("unexpected next state: {lost:?}");
            };
            waits.push(resting.until() - now);
            subchannel = resting.wake(false);
        }
        assert!(waits[0] < Duration::from_secs(2), "{waits:?}");
        assert!(
            waits.is_sorted() && waits[0] < waits[waits.len() - 1],
            "the waits must grow: {waits:?}"
        );
        let lost = lose(subchannel, ending(true, true, true), &mut rng, now);
        let Lost::Idle(subchannel) = lost else {
            panic!("unexpected next state: {lost:?}");
        };
        let lost = lose(subchannel, ending(true, false, false), &mut rng, now);
        assert!(matches!(lost, Lost::Resting(one) if one.until() - now < Duration::from_secs(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_graceful_closes_before_any_answered_call_count_as_a_failure() {
        let (mut rng, now) = (fastrand::Rng::with_seed(7), Instant::now());
        let mut subchannel = idle();
        for _ in 1..MAX_UNSERVED {
            match lose(subchannel, ending(true, true, false), &mut rng, now) {
                Lost::Idle(next) => subchannel = next,
                lost => panic!("unexpected next state: {lost:?}"),
            }
        }
        let lost = lose(subchannel, ending(true, true, false), &mut rng, now);
        assert!(matches!(lost, Lost::TransientFailure(one) if one.is_failing()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_after_the_close_of_its_connection_counts_as_a_served_call() {
        let (mut rng, now) = (fastrand::Rng::with_seed(7), Instant::now());
        let mut subchannel = idle();
        for _ in 0..100 {
            let ending = ending(true, true, false);
            let used = Arc::clone(&ending.used);
            match lose(subchannel, ending, &mut rng, now) {
                Lost::Idle(next) => subchannel = next,
                lost => panic!("unexpected next state: {lost:?}"),
            }
            used.on_answer();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_answers_a_ping_and_disconnects_is_not_dialled_in_a_loop() {
        let (mut rng, now) = (fastrand::Rng::with_seed(7), Instant::now());
        let lost = lose(idle(), ending(false, false, false), &mut rng, now);
        let Lost::Idle(first) = lost else {
            panic!("unexpected next state: {lost:?}");
        };
        let lost = lose(first, ending(false, false, false), &mut rng, now);
        assert!(matches!(lost, Lost::TransientFailure(one) if one.until() > now));
    }

    #[tokio::test(start_paused = true)]
    async fn connections_that_last_without_a_call_lead_to_growing_waits_and_not_to_a_failure() {
        let (mut rng, now) = (fastrand::Rng::with_seed(7), Instant::now());
        let lost = lose(idle(), ending(true, false, false), &mut rng, now);
        let Lost::Resting(resting) = lost else {
            panic!("unexpected next state: {lost:?}");
        };
        let mut subchannel = resting.wake(true);
        let mut waits = Vec::new();
        for _ in 0..8 {
            // The peer closes the connection gracefully after five seconds without a call.
            let connected = connecting(subchannel, now);
            let later = now + Duration::from_secs(5);
            let lost = connected.ended(now, ending(true, false, false), &mut rng, later);
            let Lost::Resting(resting) = lost else {
                panic!("unexpected next state: {lost:?}");
            };
            assert!(!resting.is_failing());
            waits.push(resting.until() - later);
            subchannel = resting.wake(false);
        }
        assert!(
            waits.is_sorted() && waits[0] < waits[waits.len() - 1],
            "the waits must grow: {waits:?}"
        );
    }
}
