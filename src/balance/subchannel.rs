//! The lifecycle of one connection to an endpoint, as types: what cannot happen in a state is not there to be called.
//!
//! ```text
//!          connect            connected
//!   Idle ──────────▶ Connecting ──────────▶ Ready ──▶ (removed) Draining
//!    ▲ ▲                 │ failed             │ lost
//!    │ │ retry, reset    ▼                    │
//!    │ └────────── TransientFailure ◀─────────┤ again and again soon after connecting
//!    └────────────────────────────────────────┘ otherwise
//! ```

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::health::Health;
use super::member::Member;

/// A connection in the making, made, or to be made again.
#[derive(Debug)]
pub(super) struct Subchannel<S> {
    backoff: ConnectBackoff,
    /// Set by a failure and cleared by a connection that works: between two attempts an endpoint that is down still counts as down, or calls
    /// would wait for it for ever.
    failing: bool,
    /// Whether a connection that was lost young has been dialled again at once already.
    hasty: bool,
    state: S,
}

/// Not dialled yet, or not again yet.
#[derive(Debug)]
pub(super) struct Idle;

/// Being dialled. Dropping it stops the dial.
#[derive(Debug)]
pub(super) struct Connecting {
    started: Instant,
    dial: StopOnDrop,
}

/// Connected, and the peer has answered.
#[derive(Debug)]
pub(super) struct Ready {
    started: Instant,
    member: Arc<Member>,
    /// The peer has stopped answering, and the connection is there all the same.
    stalled: bool,
    health: Health,
    /// The task that asks for the health, if anybody does.
    health_watch: Option<StopOnDrop>,
}

/// Waiting for the next attempt.
#[derive(Debug)]
pub(super) struct TransientFailure {
    until: Instant,
}

/// Removed. It lives while calls do.
#[derive(Debug)]
pub(super) struct Draining {
    member: Weak<Member>,
}

/// A task that ends with whoever holds this.
#[derive(Debug)]
pub(super) struct StopOnDrop(pub(super) AbortHandle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<S> Subchannel<S> {
    pub(super) fn is_failing(&self) -> bool {
        self.failing
    }

    fn become_<T>(self, state: T) -> Subchannel<T> {
        Subchannel {
            backoff: self.backoff,
            failing: self.failing,
            hasty: self.hasty,
            state,
        }
    }

    /// A fresh registration: what was learned of the old server does not count for the new one.
    fn forget(&mut self) {
        self.backoff.reset();
        self.failing = false;
        self.hasty = false;
    }

    pub(super) fn refreshed(mut self) -> Self {
        self.forget();
        self
    }
}

impl Subchannel<Idle> {
    pub(super) fn new(backoff: ConnectBackoff) -> Self {
        Self {
            backoff,
            failing: false,
            hasty: false,
            state: Idle,
        }
    }

    pub(super) fn connect(self, dial: AbortHandle, now: Instant) -> Subchannel<Connecting> {
        self.become_(Connecting {
            started: now,
            dial: StopOnDrop(dial),
        })
    }
}

impl Subchannel<Connecting> {
    /// With a watch on the endpoint's health it is not used before that is known.
    pub(super) fn connected(
        mut self,
        member: Arc<Member>,
        health_watch: Option<StopOnDrop>,
    ) -> Subchannel<Ready> {
        self.failing = false;
        let started = self.state.started;
        self.become_(Ready {
            started,
            member,
            stalled: false,
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
        // The document counts the wait from the attempt's beginning: a dial that timed out has waited already.
        let until = self.state.started + self.backoff.next(rng);
        self.become_(TransientFailure {
            until: until.max(now),
        })
    }

    /// Stops the dial.
    pub(super) fn cancel(self) -> Subchannel<Idle> {
        self.state.dial.0.abort();
        self.become_(Idle)
    }
}

/// What follows a lost connection.
#[derive(Debug)]
pub(super) enum Lost {
    /// Dial again at once.
    Idle(Subchannel<Idle>),
    /// Wait.
    TransientFailure(Subchannel<TransientFailure>),
}

impl Subchannel<Ready> {
    pub(super) fn member(&self) -> &Arc<Member> {
        &self.state.member
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.state.stalled
    }

    pub(super) fn set_stalled(&mut self, stalled: bool) {
        self.state.stalled = stalled;
    }

    pub(super) fn health(&self) -> &Health {
        &self.state.health
    }

    pub(super) fn set_health(&mut self, health: Health) {
        self.state.health = health;
    }

    /// Asks for the health no more, and takes the endpoint for healthy.
    pub(super) fn end_health_watch(&mut self) {
        self.state.health_watch = None;
        self.state.health = Health::Serving;
    }

    /// The backoff is reset by health and not by a mere connect: a peer that answers once and goes would otherwise be dialled in a loop.
    pub(super) fn lost(mut self, rng: &mut fastrand::Rng, now: Instant) -> Lost {
        let age = now.saturating_duration_since(self.state.started);
        if age >= self.backoff.step() {
            self.backoff.reset();
            self.hasty = false;
            return Lost::Idle(self.become_(Idle));
        }
        if !self.hasty {
            self.hasty = true;
            return Lost::Idle(self.become_(Idle));
        }
        self.failing = true;
        let until = self.state.started + self.backoff.next(rng);
        let state = TransientFailure {
            until: until.max(now),
        };
        Lost::TransientFailure(self.become_(state))
    }

    pub(super) fn drain(self) -> Subchannel<Draining> {
        let member = Arc::downgrade(&self.state.member);
        self.become_(Draining { member })
    }
}

impl Subchannel<TransientFailure> {
    pub(super) fn until(&self) -> Instant {
        self.state.until
    }

    /// The wait is over. It goes on counting as failing.
    pub(super) fn retry(self) -> Subchannel<Idle> {
        self.become_(Idle)
    }

    /// The registry shows a fresh registration: no wait, and a clean record.
    pub(super) fn reset(mut self) -> Subchannel<Idle> {
        self.forget();
        self.become_(Idle)
    }
}

impl Subchannel<Draining> {
    /// Whether the last call has ended.
    pub(super) fn is_drained(&self) -> bool {
        self.state.member.strong_count() == 0
    }
}

/// The waits of gRPC's connection backoff document: from 1 s, 1.6 times longer each time, up to a bound, each a fifth longer or shorter.
#[derive(Clone, Debug)]
pub(super) struct ConnectBackoff {
    max: Duration,
    step: Duration,
}

impl ConnectBackoff {
    pub(super) fn new(max: Duration) -> Self {
        Self {
            max,
            step: FIRST.min(max),
        }
    }

    /// The wait to come, without its jitter.
    fn step(&self) -> Duration {
        self.step
    }

    pub(super) fn next(&mut self, rng: &mut fastrand::Rng) -> Duration {
        let step = self.step;
        self.step = step.mul_f64(FACTOR).min(self.max);
        step.mul_f64(1.0 - JITTER + 2.0 * JITTER * rng.f64())
    }

    pub(super) fn reset(&mut self) {
        self.step = FIRST.min(self.max);
    }
}

const FIRST: Duration = Duration::from_secs(1);
const FACTOR: f64 = 1.6;
const JITTER: f64 = 0.2;

#[cfg(test)]
mod tests {
    use super::*;

    fn idle() -> Subchannel<Idle> {
        Subchannel::new(ConnectBackoff::new(Duration::from_secs(120)))
    }

    fn connecting(idle: Subchannel<Idle>, now: Instant) -> Subchannel<Connecting> {
        idle.connect(tokio::spawn(async {}).abort_handle(), now)
    }

    #[test]
    fn waits_are_those_of_the_document() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut backoff = ConnectBackoff::new(Duration::from_secs(120));
        let mut step = 1.0_f64;
        for _ in 0..30 {
            let wait = backoff.next(&mut rng).as_secs_f64();
            assert!(
                (step * 0.8..=step * 1.2).contains(&wait),
                "{wait} around {step}"
            );
            step = (step * 1.6).min(120.0);
        }
        backoff.reset();
        assert!(backoff.next(&mut rng) <= Duration::from_millis(1200));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_sticks_until_a_connection_works() {
        let mut rng = fastrand::Rng::with_seed(7);
        let now = Instant::now();
        let failed = connecting(idle(), now).failed(&mut rng, now);
        assert!(failed.is_failing());
        let again = connecting(failed.retry(), now);
        assert!(again.is_failing(), "an attempt is no recovery");
        let failed = again.failed(&mut rng, now);
        assert!(!failed.reset().is_failing(), "a fresh registration is");
    }

    #[tokio::test(start_paused = true)]
    async fn a_dial_that_took_longer_than_its_wait_is_followed_at_once() {
        let mut rng = fastrand::Rng::with_seed(7);
        let started = Instant::now();
        let now = started + Duration::from_secs(10);
        let failed = connecting(idle(), started).failed(&mut rng, now);
        assert_eq!(failed.until(), now);
    }

    #[tokio::test(start_paused = true)]
    async fn each_failure_in_a_row_waits_longer_and_a_fresh_registration_does_not() {
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
}
