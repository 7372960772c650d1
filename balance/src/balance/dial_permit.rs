//! Limits how many private connections are dialled to one endpoint at the same time. A private connection carries a single call.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

/// The right to dial a private connection for one call. The permit ends when the head of a successful response is received, and at the
/// latest [`MAX_HOLD`] after the connection is ready. Permits limit concurrent dials, not open connections, so a long call does not keep
/// its permit.
#[derive(Clone, Debug)]
pub(crate) struct DialPermit(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl DialPermit {
    pub(super) fn new(permit: Option<OwnedSemaphorePermit>) -> Self {
        Self(Arc::new(Mutex::new(permit)))
    }

    pub(super) fn end(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Starts a task that ends the permit after [`MAX_HOLD`], even if the call is still running then.
    pub(super) fn end_soon(&self) {
        let permit = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(MAX_HOLD).await;
            permit.end();
        });
    }
}

/// Maximum time for which a call holds its dial permit after its connection is ready.
const MAX_HOLD: Duration = Duration::from_millis(250);
