//! The reconciliation requests that wait for the next transaction.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::error::EtcdError;
use crate::keyspace::{ListRequest, Page};

/// The requests that wait for the next transaction.
#[derive(Default)]
pub(super) struct ReconcileBatch(Mutex<Vec<Pending>>);

pub(super) struct Pending {
    pub(super) request: ListRequest,
    /// Receives the response. If it is dropped without a response, the owner of the request sends the request alone.
    pub(super) reply: oneshot::Sender<Result<Page, EtcdError>>,
}

impl ReconcileBatch {
    /// Adds a request. Returns whether it is the first one of a batch.
    pub(super) fn push(&self, pending: Pending) -> bool {
        let mut waiting = self.lock();
        waiting.push(pending);
        waiting.len() == 1
    }

    pub(super) fn take(&self) -> Vec<Pending> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Pending>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
