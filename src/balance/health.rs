//! Active health checks: what an endpoint's own word makes of its connection. After gRFC A17.
//!
//! Pure: it is given what came of the watch on a connection, and says whether calls go there and when to ask again.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Code, Status};

use super::subchannel::ConnectBackoff;
use crate::transport::health::ServingStatus;

/// Whether an endpoint can be used, as far as it says so itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It was asked and has not answered yet.
    Unknown,
    /// It serves, or is not asked.
    Serving,
    /// It does not, and why.
    NotServing(Arc<str>),
}

/// The watch on the health of one connection.
#[derive(Debug)]
pub(super) struct HealthWatch {
    backoff: ConnectBackoff,
    /// Whether there was an answer since the last failure.
    heard: bool,
}

/// What follows the end of a watch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Ask again at once. Until then the last answer stands.
    Again,
    /// This is how it is now; ask again after a while.
    After(Health, Duration),
    /// There is nobody to be asked, on this connection and as long as it lasts.
    Never(Health),
}

impl HealthWatch {
    pub(super) fn new(max_backoff: Duration) -> Self {
        Self {
            backoff: ConnectBackoff::new(max_backoff),
            heard: false,
        }
    }

    pub(super) fn on_status(&mut self, status: ServingStatus) -> Health {
        self.heard = true;
        self.backoff.reset();
        match status {
            // A server that has never heard of the service has said nothing against itself.
            ServingStatus::Serving | ServingStatus::ServiceUnknown => Health::Serving,
            ServingStatus::NotServing => not_serving("NOT_SERVING"),
            ServingStatus::Unknown => not_serving("UNKNOWN"),
        }
    }

    /// The server has ended the watch, or the watch did not come about.
    pub(super) fn on_end(&mut self, why: &Status, rng: &mut fastrand::Rng) -> End {
        if why.code() == Code::Unimplemented {
            return End::Never(Health::Serving);
        }
        // Proxies bound how long a call may last. That says nothing of the server.
        if std::mem::take(&mut self.heard) {
            return End::Again;
        }
        let health = match why.code() {
            // So tonic-health says that it does not know the service.
            Code::NotFound => Health::Serving,
            code => not_serving(&format!("{code:?}: {}", why.message())),
        };
        End::After(health, self.backoff.next(rng))
    }
}

fn not_serving(said: &str) -> Health {
    Health::NotServing(format!("its health check says {said}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch() -> (HealthWatch, fastrand::Rng) {
        let watch = HealthWatch::new(Duration::from_secs(120));
        (watch, fastrand::Rng::with_seed(7))
    }

    #[test]
    fn only_a_server_that_says_so_is_not_used() {
        let (mut watch, _) = watch();
        for (status, serves) in [
            (ServingStatus::Serving, true),
            (ServingStatus::ServiceUnknown, true),
            (ServingStatus::NotServing, false),
            (ServingStatus::Unknown, false),
        ] {
            assert_eq!(watch.on_status(status) == Health::Serving, serves);
        }
    }

    #[test]
    fn a_server_without_the_health_service_is_never_asked_again() {
        let (mut watch, mut rng) = watch();
        let end = watch.on_end(&Status::unimplemented("no such service"), &mut rng);
        assert_eq!(end, End::Never(Health::Serving));
    }

    #[test]
    fn a_server_that_does_not_know_the_service_is_used_and_asked_again() {
        let (mut watch, mut rng) = watch();
        let end = watch.on_end(&Status::not_found("service not registered"), &mut rng);
        let End::After(health, wait) = end else {
            unreachable!("{end:?}");
        };
        assert_eq!(health, Health::Serving);
        assert!(wait > Duration::from_millis(700));
    }

    #[test]
    fn a_watch_that_ends_is_renewed_at_once_and_one_that_never_answers_less_and_less_often() {
        let (mut watch, mut rng) = watch();
        let ended = Status::unavailable("the stream ended");
        watch.on_status(ServingStatus::Serving);
        assert_eq!(watch.on_end(&ended, &mut rng), End::Again);
        let mut last = Duration::ZERO;
        for _ in 0..5 {
            let end = watch.on_end(&ended, &mut rng);
            let End::After(Health::NotServing(why), wait) = end else {
                unreachable!("{end:?}");
            };
            assert!(why.contains("the stream ended"), "{why}");
            assert!(wait > last, "{wait:?} after {last:?}");
            last = wait;
        }
        watch.on_status(ServingStatus::NotServing);
        assert_eq!(watch.on_end(&ended, &mut rng), End::Again);
        let end = watch.on_end(&ended, &mut rng);
        assert!(matches!(end, End::After(_, wait) if wait < Duration::from_secs(2)));
    }
}
