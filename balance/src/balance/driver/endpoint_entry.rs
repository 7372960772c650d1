//! An endpoint of the current set, as the driver stores it.

use std::sync::Arc;
use std::time::Duration;

use super::second_connection::SecondConnection;
use super::subchannel_table::{Class, SubchannelId};
use crate::attributes::Attributes;
use crate::balance::endpoint::{Endpoint, Tally};
use crate::balance::endpoint_requests::EndpointRequests;
use crate::balance::outlier::{Counts, Ejection};
use crate::balance::ready_connection::SharedRequests;
use crate::transport::stall_detection::KeepAlive;

/// An endpoint, its subchannels, and what was observed about its server.
#[derive(Debug)]
pub(super) struct EndpointEntry {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) attributes: Attributes,
    pub(super) subchannels: Vec<SubchannelId>,
    pub(super) class: Class,
    pub(super) ejection: Ejection,
    /// Whether a pushback of the server keeps ordinary calls away.
    pub(super) is_pushed_back: bool,
    /// The requests of the endpoint, if their number is limited.
    pub(super) requests: Option<SharedRequests>,
    /// The second connection, which is dialled while another connection is silent (nothing was read on it for a while). When one of the two
    /// answers, the second connection becomes a regular connection or is closed.
    pub(super) second: SecondConnection,
    /// Set when a connection becomes ready. Cleared when a dial fails, and when the server at the address is replaced or restarted. While
    /// it is set, a connection that becomes ready does not begin a slow start. Used only if slow start is enabled.
    pub(super) is_warm: bool,
    /// The keep-alive for later connections. Its interval is doubled each time the server closes a connection with `too_many_pings`. `None`
    /// if keep-alive is disabled.
    pub(super) keep_alive: Option<KeepAlive>,
    /// The counters at the last sweep. A sweep is the evaluation of all endpoints by the outlier detection, once in each interval.
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
            is_pushed_back: false,
            requests: None,
            second: SecondConnection::new(max_backoff),
            is_warm: false,
            keep_alive,
            swept: Tally::default(),
        }
    }

    /// Limits the number of requests.
    pub(super) fn with_max_requests(mut self, max: Option<u32>) -> Self {
        self.requests = max.map(|max| Arc::new(EndpointRequests::new(max)));
        self
    }

    /// Discards the observations that are not valid for another server. Called for a new generation of the endpoint: another server has the
    /// address now, or the server was restarted.
    pub(super) fn on_new_generation(&mut self) {
        self.ejection = Ejection::default();
        self.is_pushed_back = false;
        self.second.reset_backoff();
        self.is_warm = false;
        self.endpoint.forget();
        self.discard_calls();
    }

    /// Makes the next sweep ignore the calls up to now.
    pub(super) fn discard_calls(&mut self) {
        self.swept = self.endpoint.tally();
    }

    /// Returns the counts of the calls since this function was last called, and the ejection.
    pub(super) fn sweep(&mut self) -> (Counts, Ejection) {
        let tally = self.endpoint.tally();
        let before = std::mem::replace(&mut self.swept, tally);
        (tally.since(before), self.ejection)
    }
}
