//! The reconciliation requests that wait for the next transaction.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Id;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::error::EtcdError;
use crate::keyspace::{ListRequest, Page};

/// The requests that wait for the next transaction. Each runtime has its own batch: a runtime that is not driven at present must not delay
/// the requests of another one.
#[derive(Default)]
pub(super) struct ReconcileBatch(Mutex<State>);

#[derive(Default)]
struct State {
    waiting: HashMap<Id, Vec<Pending>>,
    /// The time until which requests are sent alone, because a transaction has failed.
    paused_until: Option<Instant>,
    /// Number of consecutive transactions that have failed.
    failures: u32,
}

pub(super) struct Pending {
    pub(super) request: ListRequest,
    /// Sends the response to the owner of the request. If this sender is dropped unused, the owner sends the request alone.
    pub(super) reply: oneshot::Sender<Result<Page, EtcdError>>,
}

impl ReconcileBatch {
    /// Adds a request. Returns whether it is the first one of a batch.
    pub(super) fn push(&self, runtime: Id, pending: Pending) -> bool {
        let mut state = self.lock();
        let batch = state.waiting.entry(runtime).or_default();
        batch.push(pending);
        batch.len() == 1
    }

    pub(super) fn take(&self, runtime: Id) -> Vec<Pending> {
        self.lock().waiting.remove(&runtime).unwrap_or_default()
    }

    /// Records that a transaction has succeeded.
    pub(super) fn on_success(&self) {
        self.lock().failures = 0;
    }

    /// Records that a transaction has failed. Requests are then sent alone for a while. A transient error may have another cause than the
    /// transaction, so the first of them has no effect.
    pub(super) fn on_failure(&self, is_transient: bool, now: Instant) {
        let mut state = self.lock();
        state.failures += 1;
        if state.failures > u32::from(is_transient) {
            state.failures = 0;
            state.paused_until = Some(now + PAUSE);
        }
    }

    pub(super) fn is_paused(&self, now: Instant) -> bool {
        self.lock().paused_until.is_some_and(|until| now < until)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time in which each request is sent alone after a failed transaction.
const PAUSE: Duration = Duration::from_secs(600);
