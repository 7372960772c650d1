//! Reacts to a server that closes a connection because the client has sent too many PINGs (`too_many_pings`, gRFC A8).

use std::time::Duration;

use super::driver::Driver;
use super::endpoint_entry::EndpointEntry;
use crate::address::Address;
use crate::balance::limits::MAX_DURATION;
use crate::balance::ready_connection::ReadyConnection;

impl Driver {
    /// If the server has closed `connection` with `too_many_pings`, doubles the keep-alive interval of later connections to the endpoint.
    /// If keep-alive is disabled, only logs a warning.
    pub(super) fn check_too_many_pings(&mut self, address: &Address, connection: &ReadyConnection) {
        if !connection.http2().has_too_many_pings() {
            return;
        }
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        if let Some(interval) = entry.on_too_many_pings() {
            tracing::warn!(%address, ?interval, "too many pings: the keep-alive interval is doubled");
        } else {
            tracing::warn!(%address, "the server has closed a connection because the client sent too many PINGs");
        }
    }
}

impl EndpointEntry {
    /// Doubles the keep-alive interval after the server has closed a connection with `too_many_pings`. Returns the new interval, or `None`
    /// if keep-alive is disabled.
    fn on_too_many_pings(&mut self) -> Option<Duration> {
        let keep_alive = self.keep_alive.as_mut()?;
        keep_alive.interval = keep_alive.interval.saturating_mul(2).min(MAX_DURATION);
        keep_alive.permit = keep_alive.permit.max(keep_alive.interval);
        Some(keep_alive.interval)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::attributes::Attributes;
    use crate::balance::endpoint::Endpoint;
    use crate::transport::stall_detection::KeepAlive;

    #[test]
    fn each_report_of_too_many_pings_doubles_the_interval_up_to_the_maximum() {
        let address = "10.0.0.5:80".parse().expect("a valid address");
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
        let keep_alive = entry.keep_alive.expect("keep-alive should be enabled");
        assert_eq!(keep_alive.permit, Duration::from_secs(40));
        for _ in 0..40 {
            entry.on_too_many_pings();
        }
        assert_eq!(entry.on_too_many_pings(), Some(MAX_DURATION));
        entry.keep_alive = None;
        assert_eq!(entry.on_too_many_pings(), None);
    }
}
