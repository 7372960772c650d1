//! What a server that registers itself ([`ServeRegistered`](crate::ServeRegistered)) takes along with its registration.

use std::time::Duration;

use tokio::sync::watch;

/// Where a server that registers itself stands. It only ever moves on, and may skip a state.
///
/// A handler of an endless stream that ends the stream when the server [drains](Self::is_draining) need not be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServerState {
    /// The socket is not bound yet.
    Starting,
    /// It accepts connections, and is registered or does everything to be.
    Serving,
    /// It was told to stop: its entry is taken out of etcd and clients learn of it. Connections are accepted and calls run as before.
    LameDuck,
    /// The listener is closed, and calls in flight are waited for.
    Draining,
    /// It has ended.
    #[non_exhaustive]
    Stopped {
        /// How many connections were cut, at the drain timeout or because the server was to end at once. Those on which no client
        /// had begun to speak by the end of the listener are not counted.
        connections_cut: usize,
    },
}

impl ServerState {
    /// Whether no new connection is accepted any more.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        matches!(self, Self::Draining | Self::Stopped { .. })
    }

    /// Whether the server is told to stop.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        !matches!(self, Self::Starting | Self::Serving)
    }
}

/// Options that only such a server reads.
#[derive(Debug)]
pub(crate) struct ServeOptions {
    pub(crate) grace_period: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) states: watch::Sender<ServerState>,
    /// What the health service answers; none without one.
    #[cfg(feature = "health")]
    pub(crate) health: Option<Health>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            grace_period: GRACE_PERIOD,
            drain_timeout: DRAIN_TIMEOUT,
            states: watch::Sender::new(ServerState::Starting),
            #[cfg(feature = "health")]
            health: None,
        }
    }
}

/// Whose word the health service passes on while the server serves.
#[cfg(feature = "health")]
#[derive(Clone, Debug)]
pub(crate) struct Health {
    pub(crate) reporter: tonic_health::server::HealthReporter,
    /// Whether the registered services, too, are reported to be serving from the start.
    pub(crate) services: bool,
}

const GRACE_PERIOD: Duration = Duration::from_secs(1);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
