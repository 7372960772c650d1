//! The options and the state of a server that registers itself ([`ServeRegistered`](crate::ServeRegistered)).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio::sync::watch;

use super::registration::Started;

/// The state of a server that registers itself. It changes only in the order of the variants, and can skip a variant.
///
/// At the drain timeout, open connections are cut. A handler of an endless stream avoids the cut if it ends the stream once the server
/// [drains](Self::is_draining).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServerState {
    /// The socket is not bound yet.
    Starting,
    /// The server accepts connections. It is registered, or it is trying to register.
    Serving,
    /// The shutdown has begun: the entry is removed from etcd, so that clients select other servers. The server still accepts connections
    /// and serves calls.
    LameDuck,
    /// The listener is closed. Calls in flight may finish.
    Draining,
    /// The server has ended.
    #[non_exhaustive]
    Stopped {
        /// Number of connections that were cut, either at the drain timeout or because the server had to end at once. Connections that the
        /// drain closes early, because the client has not started HTTP, are not counted.
        connections_cut: usize,
    },
}

impl fmt::Display for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("starting"),
            Self::Serving => f.write_str("serving"),
            Self::LameDuck => f.write_str("lame duck"),
            Self::Draining => f.write_str("draining"),
            Self::Stopped { connections_cut } => {
                write!(f, "stopped, {connections_cut} connections cut")
            }
        }
    }
}

impl ServerState {
    /// Returns whether the server has stopped accepting connections.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        matches!(self, Self::Draining | Self::Stopped { .. })
    }

    /// Returns whether the shutdown has begun.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        !matches!(self, Self::Starting | Self::Serving)
    }
}

/// Options that only [`ServeRegistered`](crate::ServeRegistered) reads.
#[derive(Debug)]
pub(crate) struct ServeOptions {
    pub(crate) grace_period: Option<Duration>,
    pub(crate) drain_timeout: Option<Duration>,
    pub(crate) states: watch::Sender<ServerState>,
    /// Number of open connections of the server. `None` without a server.
    pub(crate) connections: Option<Arc<AtomicUsize>>,
    /// The started registration, which the handles read. `None` before the start.
    pub(crate) started: watch::Sender<Option<Started>>,
    /// Whether a handle has stopped the server.
    pub(crate) stop: watch::Sender<bool>,
    /// The source of the statuses of the health service. `None` if the server has no such service.
    #[cfg(feature = "health")]
    pub(crate) health: Option<Health>,
}

impl ServeOptions {
    pub(crate) fn grace_period(&self) -> Duration {
        self.grace_period.unwrap_or(GRACE_PERIOD)
    }

    pub(crate) fn drain_timeout(&self) -> Duration {
        self.drain_timeout.unwrap_or(DRAIN_TIMEOUT)
    }

    /// Returns the name of the first option that is set, if any. These options have no effect without a server.
    pub(super) fn first_set(&self) -> Option<&'static str> {
        #[cfg(feature = "health")]
        if let Some(health) = &self.health {
            return Some(if health.services {
                "health"
            } else {
                "health_reporter"
            });
        }
        if self.grace_period.is_some() {
            return Some("grace_period");
        }
        self.drain_timeout.map(|_| "drain_timeout")
    }
}

impl Clone for ServeOptions {
    /// Copies the options. The copy has its own senders, because a receiver of a shared sender would see a mixture of the states of two
    /// servers.
    fn clone(&self) -> Self {
        Self {
            grace_period: self.grace_period,
            drain_timeout: self.drain_timeout,
            #[cfg(feature = "health")]
            health: self.health.clone(),
            ..Self::default()
        }
    }
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            grace_period: None,
            drain_timeout: None,
            connections: None,
            states: watch::Sender::new(ServerState::Starting),
            started: watch::Sender::new(None),
            stop: watch::Sender::new(false),
            #[cfg(feature = "health")]
            health: None,
        }
    }
}

/// The source of the statuses that the health service reports while the server serves.
#[cfg(feature = "health")]
#[derive(Clone, Debug)]
pub(crate) struct Health {
    pub(crate) reporter: tonic_health::server::HealthReporter,
    /// Whether the registered services are reported as serving from the start.
    pub(crate) services: bool,
}

const GRACE_PERIOD: Duration = Duration::from_secs(1);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
