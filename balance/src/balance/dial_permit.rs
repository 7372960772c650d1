//! The limit on connections that are dialled for a single call.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

/// Leave to make a connection for one call. It ends with the call's answer, or after a moment: it limits how many connections are made, not
/// how many calls are long.
#[derive(Clone, Debug)]
pub(crate) struct DialPermit(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl DialPermit {
    pub(super) fn new(permit: Option<OwnedSemaphorePermit>) -> Self {
        Self(Arc::new(Mutex::new(permit)))
    }

    pub(super) fn end(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Ends it after a moment, whatever the call does.
    pub(super) fn end_soon(&self) {
        let trial = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(TRIAL).await;
            trial.end();
        });
    }
}

/// How long a call may hold the leave for its connection.
const TRIAL: Duration = Duration::from_millis(250);
