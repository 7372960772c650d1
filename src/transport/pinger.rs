//! The one sender of PINGs on a connection, after the ready check.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

use super::activity::Activity;
use super::pings::{Action, Pings};

/// Sends what [`Pings`] decides.
pub(super) struct Pinger {
    pings: PingPong,
    decided: Pings,
    activity: Arc<Activity>,
    timer: Pin<Box<Sleep>>,
}

impl Pinger {
    pub(super) fn new(pings: PingPong, decided: Pings, activity: Arc<Activity>) -> Self {
        let at = decided.wake_at().unwrap_or_else(Instant::now);
        Self {
            pings,
            decided,
            activity,
            timer: Box::pin(tokio::time::sleep_until(at)),
        }
    }

    /// A call has taken too long. What follows of it, [`poll`](Self::poll) says.
    pub(super) fn suspect(&mut self) {
        let action = self
            .decided
            .on_suspicion(Instant::now(), self.activity.bytes());
        // A ping that cannot be sent belongs to a connection that ends by itself.
        if action == Some(Action::Ping) {
            let _ = self.pings.send_ping(Ping::opaque());
        }
    }

    /// Ready with what is to be said of the connection.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Action> {
        loop {
            if self.decided.is_outstanding()
                && self.pings.poll_pong(cx).is_ready()
                && let Some(action) = self.decided.on_pong(Instant::now())
            {
                return Poll::Ready(action);
            }
            let Some(wake_at) = self.decided.wake_at() else {
                return Poll::Pending;
            };
            if self.timer.deadline() != wake_at {
                self.timer.as_mut().reset(wake_at);
            }
            ready!(self.timer.as_mut().poll(cx));
            match self.decided.on_time(Instant::now(), self.activity.bytes()) {
                Some(Action::Ping) if self.pings.send_ping(Ping::opaque()).is_err() => {
                    return Poll::Ready(Action::Lost);
                }
                Some(Action::Ping) | None => {}
                Some(action) => return Poll::Ready(action),
            }
        }
    }
}
