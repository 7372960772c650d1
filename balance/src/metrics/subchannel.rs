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
    disconnections: Interned<Option<Box<dyn Counter>>>,
}

impl SubchannelMetrics {
    pub(super) fn new(scope: Arc<Scope>, zone: &str, security_level: &'static str) -> Self {
        let own = [(LOCALITY, zone), (SECURITY_LEVEL, security_level)];
        let labels = scope.labels(&own);
        let metrics = &scope.metrics;
        Self {
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
        let has_reason = self.scope.metrics.has_label(DISCONNECT_ERROR);
        let reason = if has_reason { reason } else { "" };
        let create = || {
            let own = [(LOCALITY, &*self.zone), (DISCONNECT_ERROR, reason)];
            let labels = self.scope.labels(&own);
            self.scope.metrics.counter(&DISCONNECTIONS, &labels)
        };
        if let Some(counter) = self.disconnections.get(reason, create).as_deref()
            && let Some(counter) = counter
        {
            counter.add(1);
        }
    }
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
        self.close("subchannel shutdown");
    }
}

/// Limit on the reasons for disconnections. HTTP/2 has 14 error codes; a peer may send further ones.
const MAX_REASONS: usize = 40;
