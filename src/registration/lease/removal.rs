//! The removal of keys: of one service, during a pause, and for good. A value that was written by hand has no lease, so it is searched and
//! deleted separately.

use super::machine::{Found, Machine};
use super::state::{AfterRevoke, Claim, Removal, State};
use crate::error::EtcdError;

impl Machine {
    /// Removes one key for good. The removal of the last live key ends the registration.
    pub(in crate::registration) fn on_remove(&mut self, index: usize) {
        if self.live().eq([index]) {
            return self.begin_removal(AfterRevoke::Deregister);
        }
        if let Some(entry) = self.keys.get_mut(index) {
            if entry.removal == Removal::None {
                entry.removal = Removal::Requested;
            }
            // Without a current or earlier lease, no key of this registration exists.
            if self.lease.is_none() && self.unrevoked.is_empty() && !entry.by_hand {
                entry.mark_lost();
            }
        }
    }

    /// Removes the keys until [`on_resume`](Self::on_resume).
    pub(in crate::registration) fn on_pause(&mut self) {
        self.begin_removal(AfterRevoke::Pause);
    }

    /// Restores the keys after a pause.
    pub(in crate::registration) fn on_resume(&mut self) {
        if matches!(
            self.state,
            State::Paused
                | State::Leaving {
                    next: AfterRevoke::Pause,
                    ..
                }
        ) {
            // A revoke of the lease may be in flight, so the registration continues with a new lease. That revoke may also be lost, so the
            // old lease is revoked again later, once the keys are attached to the new lease.
            self.record_unrevoked();
            self.lose_lease();
            self.search = false;
            self.register();
        }
    }

    /// Removes the keys for good.
    pub(in crate::registration) fn on_deregister(&mut self) {
        self.begin_removal(AfterRevoke::Deregister);
    }

    fn begin_removal(&mut self, next: AfterRevoke) {
        let (leave_marker, next) = match self.state {
            State::Deregistered => return,
            State::Paused if next == AfterRevoke::Pause => return,
            // A pause must not turn a deregistration into a pause: a resume would then register a server that has stopped.
            State::Leaving {
                leave_marker,
                next: AfterRevoke::Deregister,
            } => (leave_marker, AfterRevoke::Deregister),
            State::Leaving { leave_marker, .. } => (leave_marker, next),
            _ => {
                self.search = self.has_written();
                (self.has_leave_marker && self.holds_keys(), next)
            }
        };
        self.not_before = None;
        for entry in &mut self.keys {
            entry.delete_at = None;
        }
        self.state = State::Leaving { leave_marker, next };
        if self.has_nothing_to_remove() {
            self.on_removed(next);
        }
    }

    /// Returns whether a live key is known to exist under the lease.
    pub(super) fn holds_keys(&self) -> bool {
        self.live_entries().any(|entry| entry.held.is_some())
    }

    /// Returns whether no key of this registration is known to exist: there is no current or earlier lease, and no key that was written by
    /// hand, and the keys need not be read to find one. A grant whose response was lost may leave a lease in etcd, but no key is attached
    /// to that lease.
    fn has_nothing_to_remove(&self) -> bool {
        self.lease.is_none()
            && self.unrevoked.is_empty()
            && !self.search
            && !self.keys.iter().any(|entry| entry.by_hand)
    }

    /// Handles the result of a read that finds values that were written by hand. The read is best effort, as the leave marker: an error does
    /// not delay the revoke.
    pub(super) fn on_searched(&mut self, answer: Result<Vec<Found>, EtcdError>) {
        self.search = false;
        for found in answer.into_iter().flatten() {
            if let Some(entry) = self.keys.get_mut(found.index) {
                entry.by_hand = false;
                if found.by_hand && entry.claim == Claim::Made {
                    entry.remove_by_hand();
                }
            }
        }
        self.end_removal();
    }

    /// Ends the removal of the keys if nothing is left to remove.
    pub(super) fn end_removal(&mut self) {
        if let State::Leaving { next, .. } = self.state
            && self.has_nothing_to_remove()
        {
            self.on_removed(next);
        }
    }

    fn on_removed(&mut self, next: AfterRevoke) {
        self.lose_lease();
        for entry in &mut self.keys {
            entry.foreign = None;
        }
        self.last_error = None;
        self.state = match next {
            AfterRevoke::Pause => State::Paused,
            AfterRevoke::Deregister => State::Deregistered,
        };
    }
}
