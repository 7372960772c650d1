//! An endpoint of the current set.

use std::sync::Arc;
use std::time::Duration;

use super::second_connection::SecondConnection;
use super::subchannels::{Class, SubchannelId};
use crate::attributes::Attributes;
use crate::balance::endpoint::{Endpoint, Tally};
use crate::balance::limits::MAX_DURATION;
use crate::balance::outlier::{Counts, Ejection};
use crate::transport::ping_policy::KeepAlive;

/// An endpoint, its subchannels, and the observations of its server.
#[derive(Debug)]
pub(super) struct EndpointEntry {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) attributes: Attributes,
    pub(super) subchannels: Vec<SubchannelId>,
    pub(super) class: Class,
    pub(super) ejection: Ejection,
    /// A second connection, dialled because the first one is silent. It ends its role when either of them answers.
    pub(super) second: SecondConnection,
    /// Whether a connection was ready since the last failed attempt or registration.
    pub(super) is_warm: bool,
    /// The keep-alive that the server tolerates.
    pub(super) keep_alive: Option<KeepAlive>,
    /// The counters at the last sweep of the outlier detection.
    swept: Tally,
}

impl EndpointEntry {
    pub(super) fn new(
        endpoint: Arc<Endpoint>,
        attributes: Attributes,
        max_backoff: Duration,
        keep_alive: Option<KeepAlive>,
    ) -> Self {
        Self {
            endpoint,
            attributes,
            subchannels: Vec::new(),
            class: Class::Failing,
            ejection: Ejection::default(),
            second: SecondConnection::new(max_backoff),
            is_warm: false,
            keep_alive,
            swept: Tally::default(),
        }
    }

    /// Forgets all observations. The server is another one, or was started again.
    pub(super) fn on_new_generation(&mut self) {
        self.ejection = Ejection::default();
        self.second.reset_backoff();
        self.is_warm = false;
        self.endpoint.forget();
    }

    /// Returns the counts of the calls since the last sweep, and the ejection.
    pub(super) fn sweep(&mut self) -> (Counts, Ejection) {
        let tally = self.endpoint.tally();
        let before = std::mem::replace(&mut self.swept, tally);
        (tally.since(before), self.ejection)
    }

    /// Doubles the keep-alive interval, because the server has closed a connection because of its PINGs (gRFC A8). Returns the new
    /// interval, if keep-alive is enabled.
    pub(super) fn on_too_many_pings(&mut self) -> Option<Duration> {
        let keep_alive = self.keep_alive.as_mut()?;
        keep_alive.interval = keep_alive.interval.saturating_mul(2).min(MAX_DURATION);
        keep_alive.permit = keep_alive.permit.max(keep_alive.interval);
        Some(keep_alive.interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_complaint_about_pings_doubles_the_interval() {
        let address = "10.0.0.5:80".parse().expect("an address");
        let keep_alive = KeepAlive {
            permit: Duration::from_secs(15),
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(20),
            while_idle: false,
        };
        let mut entry = EndpointEntry::new(
            Arc::new(Endpoint::new(address)),
            Attributes::new(),
            Duration::from_secs(120),
            Some(keep_alive),
        );
        assert_eq!(entry.on_too_many_pings(), Some(Duration::from_secs(20)));
        assert_eq!(entry.on_too_many_pings(), Some(Duration::from_secs(40)));
        let keep_alive = entry.keep_alive.expect("enabled");
        assert_eq!(keep_alive.permit, Duration::from_secs(40));
        for _ in 0..40 {
            entry.on_too_many_pings();
        }
        assert_eq!(entry.on_too_many_pings(), Some(MAX_DURATION));
        entry.keep_alive = None;
        assert_eq!(entry.on_too_many_pings(), None);
    }
}
