//! The selections for which calls have requested a ready set.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::select::Criterion;

/// The criteria for which no ready set exists yet, until the driver adds the sets.
#[derive(Debug)]
pub(super) struct Wanted {
    criteria: Mutex<Vec<Criterion>>,
    /// Wakes the driver.
    demand: Arc<Notify>,
}

impl Wanted {
    pub(super) fn new(demand: Arc<Notify>) -> Self {
        Self {
            criteria: Mutex::default(),
            demand,
        }
    }

    /// Requests a ready set for a criterion. If too many are requested already, the request is ignored: later calls repeat it, and so does a
    /// call that waits, after the next publication.
    pub(super) fn push(&self, criterion: &Criterion) {
        let mut criteria = self.lock();
        if criteria.len() < MAX_WANTED && !criteria.contains(criterion) {
            criteria.push(criterion.clone());
        }
        drop(criteria);
        self.demand.notify_one();
    }

    /// Removes and returns the first criteria, at most `limit`. If others are left, wakes the driver once more.
    pub(super) fn take(&self, limit: usize) -> Vec<Criterion> {
        let mut criteria = self.lock();
        let taken = criteria.len().min(limit);
        let taken = criteria.drain(..taken).collect();
        if !criteria.is_empty() {
            self.demand.notify_one();
        }
        taken
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Criterion>> {
        // No code panics while the lock is held.
        self.criteria.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Limit on the number of requests. Each new request is compared with all of them.
const MAX_WANTED: usize = 256;
