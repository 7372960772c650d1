//! What the tasks and the views of a resolver share.

use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use tokio::sync::watch;

use super::snapshot::Snapshot;
use super::state::{Machine, Report};
use super::status::ResolverStatus;
use crate::address::Address;
use crate::format::Decoder;

/// What the tasks and the views share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) service: String,
    pub(super) decoder: Decoder,
    pub(super) shared: Mutex<Shared>,
    pub(super) status: watch::Sender<ResolverStatus>,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) snapshot: Snapshot,
    pub(super) views: Vec<Option<View>>,
    pub(super) reports: Vec<Report>,
    /// Writes that could not be read.
    pub(super) rejected: u64,
}

/// What one consumer has yet to be told. It is a set: however many changes an address sees, it is told once, of the newest.
#[derive(Debug)]
pub(super) struct View {
    pending: VecDeque<Address>,
    /// What is in `pending`.
    queued: HashSet<Address>,
    pub(super) waker: Option<Waker>,
}

impl View {
    fn tell(&mut self, address: &Address) {
        if self.queued.insert(address.clone()) {
            self.pending.push_back(address.clone());
        }
    }

    /// First come, first told: an address that changes all the time holds up no other.
    pub(super) fn next(&mut self) -> Option<Address> {
        let address = self.pending.pop_front()?;
        self.queued.remove(&address);
        Some(address)
    }
}

impl Core {
    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        // Nothing panics while it is held; and the data would be whole even then.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn open_view(&self) -> usize {
        let mut shared = self.lock();
        let pending: VecDeque<_> = shared.snapshot.addresses().cloned().collect();
        let queued = pending.iter().cloned().collect();
        let view = Some(View {
            pending,
            queued,
            waker: None,
        });
        if let Some(free) = shared.views.iter().position(Option::is_none) {
            shared.views[free] = view;
            return free;
        }
        shared.views.push(view);
        shared.views.len() - 1
    }

    /// Takes over what a machine has learned. Instances that arrive together are seen together: the lock spans the batch.
    pub(super) fn publish(&self, index: usize, machine: &mut Machine) {
        let events = machine.take_update();
        let mut shared = self.lock();
        let applied = shared
            .snapshot
            .apply(events, machine.range(), &self.decoder);
        if let Some((key, revision, error)) = &applied.first_rejected {
            tracing::warn!(%key, %revision, rejected = applied.rejected, "skipped values that cannot be read; the first of them {error}");
        }
        let mut wakers = Vec::new();
        if !applied.changed.is_empty() {
            for view in shared.views.iter_mut().flatten() {
                for address in &applied.changed {
                    view.tell(address);
                }
                wakers.extend(view.waker.take());
            }
        }
        let instances = shared.snapshot.len();
        shared.rejected += applied.rejected;
        if let Some(report) = shared.reports.get_mut(index) {
            report.clone_from(&machine.report);
        }
        drop(shared);
        self.status.send_if_modified(|status| {
            // Locked inside the status and never around it: who looks at a status may ask for the instances meanwhile.
            let shared = self.lock();
            let next = ResolverStatus::of(&shared.reports, shared.rejected, Some(status));
            drop(shared);
            if next.state != status.state {
                let error = next.last_error.as_ref().map(tracing::field::display);
                tracing::info!(state = ?next.state, instances, revision = %next.revision, error, "resolver state changed");
            }
            let modified = !next.says_the_same(status);
            *status = next;
            modified
        });
        for waker in wakers {
            waker.wake();
        }
    }
}
