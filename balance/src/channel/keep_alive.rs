//! The keep-alive options of a channel.

use std::time::Duration;

use crate::transport::stall_detection::{BUSY_INTERVAL, KeepAlive};

/// The keep-alive options. They can be set in any order, so [`build`](Self::build) combines them at the end.
#[derive(Clone, Debug)]
pub(super) struct KeepAliveOptions {
    pub(super) interval: Option<Duration>,
    pub(super) timeout: Duration,
    pub(super) while_idle: bool,
    pub(super) permit: Duration,
}

impl KeepAliveOptions {
    /// Returns the keep-alive of the connections; `None` if it is disabled.
    pub(super) fn build(&self) -> Option<KeepAlive> {
        Some(KeepAlive {
            interval: self.interval?,
            timeout: self.timeout,
            while_idle: self.while_idle,
            permit: self.permit,
        })
    }

    /// Returns an error message if an option that was set has no effect.
    pub(super) fn ineffective(&self) -> Option<&'static str> {
        (self.while_idle && self.interval.is_none())
            .then_some("keep_alive_while_idle has no effect without http2_keep_alive_interval")
    }
}

impl Default for KeepAliveOptions {
    fn default() -> Self {
        Self {
            interval: None,
            timeout: TIMEOUT,
            while_idle: false,
            permit: BUSY_INTERVAL,
        }
    }
}

/// Default timeout of a keep-alive PING, from gRFC A8.
const TIMEOUT: Duration = Duration::from_secs(20);
