//! Sends all PINGs of a connection except the first PING, which checks that a new connection is ready.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

use super::activity::Activity;
use super::stall_detection::{Action, PingCause, Pings};

/// Sends the PINGs that [`Pings`] decides on.
pub(super) struct Pinger {
    pings: PingPong,
    policy: Pings,
    activity: Arc<Activity>,
    timer: Pin<Box<Sleep>>,
}

impl Pinger {
    pub(super) fn new(pings: PingPong, policy: Pings, activity: Arc<Activity>) -> Self {
        let at = policy.wake_at().unwrap_or_else(Instant::now);
        Self {
            pings,
            policy,
            activity,
            timer: Box::pin(tokio::time::sleep_until(at)),
        }
    }

    /// Handles a request for a PING. Returns the action that must be reported at once, if any.
    pub(super) fn request(&mut self, cause: PingCause) -> Option<Action> {
        let (progress, busy) = (self.activity.progress(), self.activity.is_busy());
        let action = self
            .policy
            .on_request(cause, Instant::now(), progress, busy)?;
        if action == Action::Ping {
            // An error is ignored, because `send_ping` fails only on a connection that is already ending.
            let _ = self.pings.send_ping(Ping::opaque());
            return None;
        }
        Some(action)
    }

    /// Returns the next action that the connection's task must report.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Action> {
        loop {
            if self.policy.is_outstanding() && self.pings.poll_pong(cx).is_ready() {
                self.policy
                    .on_pong(Instant::now(), self.activity.progress());
                self.activity.on_pong();
            }
            if self.policy.is_stalled()
                && let Some(action) = self.policy.on_read(self.activity.progress())
            {
                return Poll::Ready(action);
            }
            let Some(wake_at) = self.policy.wake_at() else {
                return Poll::Pending;
            };
            if self.timer.deadline() != wake_at {
                self.timer.as_mut().reset(wake_at);
            }
            ready!(self.timer.as_mut().poll(cx));
            let (progress, busy) = (self.activity.progress(), self.activity.is_busy());
            match self.policy.on_time(Instant::now(), progress, busy) {
                Some(Action::Ping) if self.pings.send_ping(Ping::opaque()).is_err() => {
                    return Poll::Ready(Action::Lost);
                }
                Some(Action::Ping) | None => {}
                Some(action) => return Poll::Ready(action),
            }
        }
    }
}
