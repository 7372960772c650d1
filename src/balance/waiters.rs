//! Calls that wait for a free place, and who tells them of one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Calls that wait for a free place.
#[derive(Debug)]
pub(crate) struct Waiters {
    waiting: AtomicUsize,
    limit: usize,
    freed: Notify,
}

impl Waiters {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            waiting: AtomicUsize::new(0),
            limit,
            freed: Notify::new(),
        }
    }

    /// Joins the waiting, unless there are too many.
    pub(crate) fn join(self: &Arc<Self>) -> Option<Waiting> {
        // SeqCst: see `Load::acquire`. A place given up after this is announced to us.
        if self.waiting.fetch_add(1, Ordering::SeqCst) >= self.limit {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            return None;
        }
        Some(Waiting(Arc::clone(self)))
    }

    /// How many there are.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    pub(crate) fn freed(&self) -> &Notify {
        &self.freed
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(super) fn on_release(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.freed.notify_one();
        }
    }
}

/// One of the waiting, until dropped.
#[derive(Debug)]
pub(crate) struct Waiting(Arc<Waiters>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
