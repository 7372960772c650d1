//! Per-call routing: endpoints that a call avoids, and the endpoint that it was sent to.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::address::Address;
use crate::balance::ReadyConnection;

/// Routes one call: names endpoints to avoid, and reports the endpoint that the call was sent to.
///
/// It is for callers that know more about an endpoint than its connections show, for example that it has lost its quorum. Make one for each
/// call, and pass it to [`BalancedChannel::call_routed`](crate::BalancedChannel::call_routed). Clones share the result.
#[derive(Clone, Debug)]
pub struct Routing {
    avoided: Arc<[Address]>,
    /// The connection that the call was sent on last.
    connection: Arc<Mutex<Option<Arc<ReadyConnection>>>>,
}

impl Routing {
    /// Uses these endpoints only if no other is ready, the last of them last.
    #[must_use]
    pub fn avoiding(endpoints: impl Into<Arc<[Address]>>) -> Self {
        Self {
            avoided: endpoints.into(),
            connection: Arc::default(),
        }
    }

    pub(crate) fn avoided(&self) -> &[Address] {
        &self.avoided
    }

    pub(crate) fn set_connection(&self, connection: &Arc<ReadyConnection>) {
        *self.lock() = Some(Arc::clone(connection));
    }

    /// Returns the endpoint that the call was last sent to; `None` if it was not sent.
    #[must_use]
    pub fn address(&self) -> Option<Address> {
        let connection = self.lock();
        connection
            .as_ref()
            .map(|connection| connection.endpoint().address().clone())
    }

    /// Counts a failure against the endpoint, of the call or of a stream that it opened, that its connection does not show.
    ///
    /// With `silent_since`, the time since which an answer was overdue, a PING checks the connection unless something was read since.
    pub fn report_failure(&self, now: Instant, silent_since: Option<Instant>) {
        if let Some(connection) = &*self.lock() {
            connection.on_reported_failure(now, silent_since);
        }
    }

    pub(crate) fn connection(&self) -> Option<Arc<ReadyConnection>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<ReadyConnection>>> {
        // Nothing panics while it is held.
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
