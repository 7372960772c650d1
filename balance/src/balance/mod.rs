//! Balancing: from a stream of changes to connections that are ready, and from those to a pick.
//!
//! One task per channel, the *driver*, owns every subchannel and is polled whether calls run or not. It publishes an immutable ready set;
//! a call picks from it in its caller's task. Nothing here knows where the changes come from.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio_stream::Stream;
use tower::discover::Change;
use tracing::Instrument;

use crate::address::Address;
use crate::attributes::Attributes;
use crate::transport::connect::Connector;
use crate::transport::health::HealthCheck;

mod connect_backoff;
mod dial_permit;
mod driver;
mod endpoint;
mod health;
mod load;
mod outlier;
mod permit;
mod picker;
mod ready_connection;
mod ready_set;
mod rotation;
mod shared;
#[cfg(test)]
mod simulation;
mod subchannel;
mod updates;
mod waiters;
mod zone;

pub(crate) use endpoint::{AnswerFault, Blame, Endpoint};
pub use endpoint::{EndpointState, EndpointStatus};
pub use outlier::OutlierDetection;
pub(crate) use permit::Permit;
pub use picker::LbPolicy;
pub(crate) use picker::{Pick, SCAN_LIMIT};
pub(crate) use ready_connection::ReadyConnection;
pub(crate) use shared::{Shared, Snapshot};
pub(crate) use updates::Updates;
pub(crate) use waiters::Exclusions;

use driver::Driver;
use ready_connection::ReadyEntry;
use ready_set::ReadySet;

/// The options of a balancer.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) policy: LbPolicy,
    pub(crate) seed: Option<u64>,
    pub(crate) connections_per_endpoint: usize,
    pub(crate) max_backoff: Duration,
    pub(crate) max_waiters: usize,
    pub(crate) outlier_detection: Option<OutlierDetection>,
    /// What endpoints are asked of their health, if they are.
    pub(crate) health_check: Option<HealthCheck>,
    /// How long a new endpoint takes to its full share.
    pub(crate) slow_start: Option<Duration>,
    pub(crate) on_refused: Option<OnRefused>,
    /// The zone whose endpoints are preferred.
    pub(crate) zone: Option<Box<str>>,
}

/// Whom to tell that an address, though it is announced, takes no connections. Called by the driver for each attempt, so it never waits.
#[derive(Clone)]
pub(crate) struct OnRefused(pub(crate) Arc<dyn Fn(&Address) + Send + Sync>);

impl std::fmt::Debug for OnRefused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnRefused").finish_non_exhaustive()
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            policy: LbPolicy::default(),
            seed: None,
            connections_per_endpoint: 1,
            max_backoff: MAX_BACKOFF,
            max_waiters: MAX_WAITERS,
            outlier_detection: None,
            health_check: None,
            slow_start: None,
            on_refused: None,
            zone: None,
        }
    }
}

/// The driver's task. It ends when this goes; calls in flight finish.
#[derive(Debug)]
pub(crate) struct Balancer {
    shared: Arc<Shared>,
    driver: AbortHandle,
}

impl Balancer {
    /// Starts the driver.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub(crate) fn start<S, E>(
        service: &str,
        changes: Updates<S>,
        connector: Connector,
        options: Options,
    ) -> Self
    where
        S: Stream<Item = Result<Change<Address, Attributes>, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let connector = Arc::new(connector);
        let shared = Arc::new(Shared::new(&options, Arc::clone(&connector)));
        let span = tracing::info_span!("balancer", service);
        let driver = Driver::new(Arc::clone(&shared), connector, options);
        let driver = tokio::spawn(driver.run(changes).instrument(span)).abort_handle();
        Self { shared, driver }
    }

    /// Every call fails, for this reason.
    pub(crate) fn end(&self, why: &str) {
        self.shared.end(why, &Summary::default());
        self.driver.abort();
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// One state of the set of endpoints.
#[derive(Debug, Default)]
struct Published {
    ready: ReadySet<ReadyEntry>,
    summary: Summary,
}

/// The numbers behind an error message.
#[derive(Clone, Debug, Default)]
pub(crate) struct Summary {
    /// Whether the set of endpoints is known: a first list is in.
    pub(crate) known: bool,
    pub(crate) endpoints: usize,
    pub(crate) ready: usize,
    /// Endpoints that are neither ready nor failing: a connection may be there any moment.
    pub(crate) pending: usize,
    /// Why the channel makes no calls any more, or never made one.
    pub(crate) ended: Option<Arc<str>>,
    /// What is wrong with the source of endpoints, by its own last error.
    pub(crate) source_error: Option<Arc<str>>,
    /// The last failure to connect, or loss of a connection.
    pub(crate) last_error: Option<Arc<EndpointError>>,
}

/// What happened to an endpoint's connection.
#[derive(Debug, thiserror::Error)]
#[error("endpoint {address}: {reason}")]
pub(crate) struct EndpointError {
    pub(crate) address: Address,
    /// The failure with all its causes, in one line.
    pub(crate) reason: Arc<str>,
}

/// A time to come has to fit into an `Instant`.
pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
/// gRPC's connection backoff document.
const MAX_BACKOFF: Duration = Duration::from_secs(120);
/// Each waiting call holds its request, a few kilobytes at least: more than this would be memory spent on calls that have no chance.
const MAX_WAITERS: usize = 32_768;
