//! Per-call routing: endpoints that a call avoids, and the endpoint that it was sent to.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::address::Address;
use crate::balance::ReadyConnection;

/// Routes one call: names endpoints to avoid, and reports the endpoint that the call was sent to.
///
/// Use it if the caller knows more about an endpoint than its connections show, for example that the endpoint has lost its quorum. Create
/// one value for each call and pass it to [`BalancedChannel::call_routed`](crate::BalancedChannel::call_routed). The clones of a value
/// share the reported endpoint.
#[derive(Clone, Debug)]
pub struct Routing {
    avoided: Arc<[Address]>,
    /// The connection that the call was last sent on.
    connection: Arc<Mutex<Option<Arc<ReadyConnection>>>>,
}

impl Routing {
    /// Creates a routing that uses these endpoints only if no other endpoint is ready. Of these endpoints, the last one in the list is used
    /// last.
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

    /// Reports a failure that only the caller can detect: a failure of the call, or of a stream that the call opened. The failure changes
    /// the latency estimate of the connection in the same way as any failed call.
    ///
    /// `silent_since` is set if the caller has waited for a response in vain: it is the time when this wait began. If nothing was read from
    /// the connection since that time, the channel sends a PING to check the connection.
    pub fn report_failure(&self, now: Instant, silent_since: Option<Instant>) {
        if let Some(connection) = &*self.lock() {
            connection.on_reported_failure(now, silent_since);
        }
    }

    pub(crate) fn connection(&self) -> Option<Arc<ReadyConnection>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<ReadyConnection>>> {
        // No code panics while the lock is held.
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
