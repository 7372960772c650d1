//! Load balancing: turns a stream of changes into ready connections, and picks one of them for each call.
//!
//! One task per channel, the *driver*, owns all subchannels. It runs whether calls are made or not. It publishes an immutable ready set,
//! and a call picks from that set in the task of its caller. This module does not depend on the source of the changes.

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
    /// The health check of the endpoints, if it is enabled.
    pub(crate) health_check: Option<HealthCheck>,
    /// The time in which a new endpoint grows to its full share.
    pub(crate) slow_start: Option<Duration>,
    pub(crate) on_refused: Option<OnRefused>,
    /// The zone whose endpoints are preferred.
    pub(crate) zone: Option<Box<str>>,
}

/// Callback for an announced address that accepts no connection. The driver calls it after each failed attempt, so it must not block.
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

/// A handle to the driver's task. Dropping it stops the task; calls in flight finish.
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
    /// Panics if called outside a tokio runtime.
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

    /// Stops the driver. Every call fails with this reason.
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

/// A published state: a ready set and the matching summary.
#[derive(Debug, Default)]
struct Published {
    ready: ReadySet<ReadyEntry>,
    summary: Summary,
}

/// The state of the set of endpoints, for error messages and for calls that wait.
#[derive(Clone, Debug, Default)]
pub(crate) struct Summary {
    /// Whether the set of endpoints is known: the first list was received.
    pub(crate) known: bool,
    pub(crate) endpoints: usize,
    pub(crate) ready: usize,
    /// Endpoints that are neither ready nor failing: they may become ready at any moment.
    pub(crate) pending: usize,
    /// Why the channel makes no more calls, or why it never made one.
    pub(crate) ended: Option<Arc<str>>,
    /// The last error of the source of endpoints.
    pub(crate) source_error: Option<Arc<str>>,
    /// The last failed attempt to connect, or the last lost connection.
    pub(crate) last_error: Option<Arc<EndpointError>>,
}

/// An error of an endpoint's connection.
#[derive(Debug, thiserror::Error)]
#[error("endpoint {address}: {reason}")]
pub(crate) struct EndpointError {
    pub(crate) address: Address,
    /// The error with all its causes, in one line.
    pub(crate) reason: Arc<str>,
}

/// Limit on configured durations: the sum of an instant and a duration must fit into an `Instant`.
pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
/// Limit on the connect backoff, from gRPC's connection backoff document.
const MAX_BACKOFF: Duration = Duration::from_secs(120);
/// Limit on waiting calls. Each of them holds its request, at least a few kilobytes: a higher limit would spend memory on calls that have
/// no chance.
const MAX_WAITERS: usize = 32_768;
