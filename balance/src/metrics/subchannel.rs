//! The instruments of connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::instrument::{
    CONNECTIONS_FAILED, CONNECTIONS_SUCCEEDED, DISCONNECT_ERROR, DISCONNECTIONS, LOCALITY,
    OPEN_CONNECTIONS, SECURITY_LEVEL,
};
use super::interned::Interned;
use super::recorder::{Counter, UpDownCounter};
use super::scope::Scope;

/// The handles for connections to the endpoints of one zone.
pub(crate) struct SubchannelMetrics {
    scope: Arc<Scope>,
    zone: Box<str>,
    succeeded: Option<Box<dyn Counter>>,
    failed: Option<Box<dyn Counter>>,
    open: Option<Box<dyn UpDownCounter>>,
    /// The disconnections by the program. The drop of a connection must not create a handle: a connection may be dropped while the library
    /// that exports the metrics reads a gauge, under the lock that it needs for a new handle.
    shutdowns: Option<Box<dyn Counter>>,
    /// The disconnections whose reasons exceed the limit.
    unknown: Option<Box<dyn Counter>>,
    disconnections: Interned<Option<Box<dyn Counter>>>,
}

impl SubchannelMetrics {
    pub(super) fn new(scope: Arc<Scope>, zone: &str, security_level: &'static str) -> Self {
        let own = [(LOCALITY, zone), (SECURITY_LEVEL, security_level)];
        let labels = scope.labels(&own);
        let metrics = &scope.metrics;
        Self {
            shutdowns: disconnections(&scope, zone, SHUTDOWN),
            unknown: disconnections(&scope, zone, "unknown"),
            zone: zone.into(),
            succeeded: metrics.counter(&CONNECTIONS_SUCCEEDED, &labels),
            failed: metrics.counter(&CONNECTIONS_FAILED, &labels),
            open: metrics.up_down_counter(&OPEN_CONNECTIONS, &labels),
            disconnections: Interned::new(MAX_REASONS),
            scope,
        }
    }

    /// Records a failed connection attempt.
    pub(crate) fn on_failed(&self) {
        if let Some(failed) = &self.failed {
            failed.add(1);
        }
    }

    fn on_disconnected(&self, reason: &str) {
        // Without the label, all reasons have the same handle.
        let has_reason = self.scope.metrics.has_label(DISCONNECT_ERROR);
        let counter = if !has_reason || reason == SHUTDOWN {
            &self.shutdowns
        } else {
            let create = || disconnections(&self.scope, &self.zone, reason);
            let of_reason = self.disconnections.get(reason, create);
            of_reason.unwrap_or(&self.unknown)
        };
        if let Some(counter) = counter {
            counter.add(1);
        }
    }
}

fn disconnections(scope: &Scope, zone: &str, reason: &str) -> Option<Box<dyn Counter>> {
    let labels = scope.labels(&[(LOCALITY, zone), (DISCONNECT_ERROR, reason)]);
    scope.metrics.counter(&DISCONNECTIONS, &labels)
}

impl std::fmt::Debug for SubchannelMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SubchannelMetrics")
            .field("zone", &self.zone)
            .finish_non_exhaustive()
    }
}

/// The measurement of an open connection. Dropping it records the disconnection, if [`close`](Self::close) has not.
#[derive(Debug)]
pub(crate) struct ConnectionRecord {
    metrics: Arc<SubchannelMetrics>,
    is_open: AtomicBool,
}

impl ConnectionRecord {
    /// Records a successful connection attempt.
    pub(crate) fn open(metrics: Arc<SubchannelMetrics>) -> Self {
        if let Some(succeeded) = &metrics.succeeded {
            succeeded.add(1);
        }
        if let Some(open) = &metrics.open {
            open.add(1);
        }
        Self {
            metrics,
            is_open: AtomicBool::new(true),
        }
    }

    /// Records the end of the connection, with the value of `grpc.disconnect_error`.
    pub(crate) fn close(&self, reason: &str) {
        if !self.is_open.swap(false, Ordering::Relaxed) {
            return;
        }
        if let Some(open) = &self.metrics.open {
            open.add(-1);
        }
        self.metrics.on_disconnected(reason);
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        self.close(SHUTDOWN);
    }
}

/// The reason if the program closes the channel or the endpoint is removed (gRFC A94).
const SHUTDOWN: &str = "subchannel shutdown";
/// Limit on the reasons for disconnections. HTTP/2 has 14 error codes; a peer may send further ones.
const MAX_REASONS: usize = 40;
