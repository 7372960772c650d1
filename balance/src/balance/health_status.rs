//! Active health checks (gRFC A17): the health that an endpoint reports about itself.
//!
//! This module performs no I/O. Its input is the events of the health watch on a connection. Its output is whether the connection takes
//! calls, and when the watch is started again.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Code, Status};

use super::connect_backoff::ConnectBackoff;
use crate::transport::health_client::ServingStatus;

/// The health of an endpoint according to its own health service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// The endpoint has not answered the health check yet.
    Unknown,
    /// The endpoint is serving, or its health is not checked.
    Serving,
    /// The endpoint is not serving, for this reason.
    NotServing(Arc<str>),
}

/// The state of the health watches on one connection. A watch is one streaming call. When it ends, the next watch is started, unless the
/// server has no health service.
#[derive(Debug)]
pub(super) struct HealthWatch {
    backoff: ConnectBackoff,
    /// The health according to the last status of the current watch; `None` before the first status of the watch.
    last_status: Option<Health>,
    /// Whether a watch shorter than [`MIN_LIFETIME`] was already followed by the next watch without a wait. Cleared by a watch that has
    /// reported a status and was not shorter.
    restarted_immediately: bool,
}

/// The action that follows the end of a watch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Restart {
    /// Start the watch again at once. The last status stays valid until the new watch reports a status or ends.
    Now,
    /// Report this health, and start the watch again after this wait.
    After(Health, Duration),
    /// Report this health, and do not start the watch again on this connection: its server has no health service.
    Never(Health),
}

impl HealthWatch {
    pub(super) fn new(max_backoff: Duration) -> Self {
        Self {
            backoff: ConnectBackoff::new(max_backoff),
            last_status: None,
            restarted_immediately: false,
        }
    }

    /// Records a status. Returns the health if it has changed.
    pub(super) fn on_status(&mut self, status: ServingStatus) -> Option<Health> {
        let health = match status {
            // If the health service has no status for this service, this does not mean that the service is down.
            ServingStatus::Serving | ServingStatus::ServiceUnknown => Health::Serving,
            ServingStatus::NotServing => not_serving("NOT_SERVING"),
            ServingStatus::Unknown => not_serving("UNKNOWN"),
        };
        let before = self.last_status.replace(health.clone());
        (before.as_ref() != Some(&health)).then_some(health)
    }

    /// Handles the end of a watch. `lasted`: the time since its start. Also called if the watch could not be started.
    pub(super) fn on_end(
        &mut self,
        why: &Status,
        lasted: Duration,
        rng: &mut fastrand::Rng,
    ) -> Restart {
        if why.code() == Code::Unimplemented {
            return Restart::Never(Health::Serving);
        }
        // Proxies limit the duration of a call, and servers limit the age of a connection. The end of a watch that has reported a status is
        // therefore no failure, however often it happens. But a server that answers each watch and then ends the watch at once must not be
        // queried in a tight loop.
        if let Some(health) = self.last_status.take() {
            self.backoff.reset();
            if lasted >= MIN_LIFETIME {
                self.restarted_immediately = false;
                return Restart::Now;
            }
            if !std::mem::replace(&mut self.restarted_immediately, true) {
                return Restart::Now;
            }
            return Restart::After(health, RESTART_INTERVAL.mul_f64(0.8 + 0.4 * rng.f64()));
        }
        let health = match why.code() {
            // tonic-health returns this code for a service without a status.
            Code::NotFound => Health::Serving,
            code => not_serving(&format!("{code:?}: {}", why.message())),
        };
        Restart::After(health, self.next_wait(rng))
    }

    fn next_wait(&mut self, rng: &mut fastrand::Rng) -> Duration {
        self.backoff.next(rng).max(MIN_WAIT)
    }
}

/// A watch that has reported a status and lasted at least this long is followed by the next watch without a wait, whichever side ended it.
const MIN_LIFETIME: Duration = Duration::from_secs(1);
/// Wait after a watch that has reported a status and ended within [`MIN_LIFETIME`]. Of several such watches in a row, the first is followed
/// by the next without a wait. A random jitter of ±20 % is applied.
const RESTART_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum wait after a watch that reported no status, even if the channel's maximum backoff is shorter. It prevents queries in a tight
/// loop.
const MIN_WAIT: Duration = Duration::from_millis(10);

fn not_serving(status: &str) -> Health {
    Health::NotServing(format!("its health check reports {status}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch() -> (HealthWatch, fastrand::Rng) {
        let watch = HealthWatch::new(Duration::from_secs(120));
        (watch, fastrand::Rng::with_seed(7))
    }

    #[test]
    fn only_changes_of_the_serving_status_are_reported() {
        let (mut watch, _) = watch();
        for (status, serves) in [
            (ServingStatus::NotServing, Some(false)),
            (ServingStatus::NotServing, None),
            (ServingStatus::Serving, Some(true)),
            (ServingStatus::ServiceUnknown, None),
            (ServingStatus::Unknown, Some(false)),
        ] {
            let health = watch.on_status(status);
            assert_eq!(health.map(|health| health == Health::Serving), serves);
        }
    }

    #[test]
    fn a_server_without_the_health_service_is_not_watched_again() {
        let (mut watch, mut rng) = watch();
        let why = Status::unimplemented("no such service");
        let end = watch.on_end(&why, Duration::ZERO, &mut rng);
        assert_eq!(end, Restart::Never(Health::Serving));
    }

    #[test]
    fn a_server_that_does_not_know_the_service_is_used_and_watched_again() {
        let (mut watch, mut rng) = watch();
        let why = Status::not_found("service not registered");
        let Restart::After(health, wait) = watch.on_end(&why, Duration::ZERO, &mut rng) else {
            unreachable!("the watch must be restarted after a wait");
        };
        assert_eq!(health, Health::Serving);
        assert!(wait > Duration::from_millis(700));
    }

    #[test]
    fn a_watch_without_any_response_is_retried_with_growing_waits() {
        let (mut watch, mut rng) = watch();
        let ended = Status::unavailable("the stream ended");
        let mut last = Duration::ZERO;
        for _ in 0..5 {
            let end = watch.on_end(&ended, Duration::ZERO, &mut rng);
            let Restart::After(Health::NotServing(why), wait) = end else {
                unreachable!("the watch must be restarted after a wait: {end:?}");
            };
            assert!(why.contains("the stream ended"), "{why}");
            assert!(wait > last, "{wait:?} after {last:?}");
            last = wait;
        }
    }

    #[test]
    fn a_watch_that_ends_is_restarted_at_once_but_not_in_a_loop() {
        let (mut watch, mut rng) = watch();
        let ended = Status::unavailable("the stream ended");
        let mut end_after = |lasted: u64| {
            watch.on_status(ServingStatus::Serving);
            watch.on_end(&ended, Duration::from_secs(lasted), &mut rng)
        };
        for _ in 0..5 {
            assert_eq!(end_after(300), Restart::Now);
        }
        assert_eq!(end_after(0), Restart::Now);
        for _ in 0..5 {
            let end = end_after(0);
            let stands = matches!(end, Restart::After(Health::Serving, wait) if wait > Duration::from_millis(700));
            assert!(stands, "the last health must stay valid: {end:?}");
            let Restart::After(_, wait) = end else {
                unreachable!("the watch must be restarted after a wait: {end:?}");
            };
            assert!(
                wait < Duration::from_secs(2),
                "a server that responds must not cause growing waits: {wait:?}"
            );
        }
        assert_eq!(end_after(60), Restart::Now, "a long watch must not wait");
        assert_eq!(
            end_after(0),
            Restart::Now,
            "the first short watch after a long one must not wait"
        );
    }
}
