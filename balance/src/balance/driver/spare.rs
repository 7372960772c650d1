//! Second connections. A silent connection does not prove that its server is down, so a second one is dialled beside it, and the first of
//! the two that answers is used.
//!
//! Middleboxes drop the state of flows while TCP still acknowledges them, and one address may belong to several servers.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::driver::{Driver, State, SubchannelId};
use crate::address::Address;

impl Driver {
    /// Dials a second connection beside a silent one, unless a second connection exists or a recent one failed.
    pub(super) fn dial_beside(&mut self, address: &Address, has_served: bool) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        entry.endpoint.forget_silence();
        if has_served {
            entry.spare_backoff.reset();
            entry.spare_at = None;
        }
        if !self.stalled.contains(address) {
            self.stalled.push(address.clone());
        }
        self.dial_spare(address, Instant::now());
    }

    /// Dials the second connections that are due.
    pub(super) fn dial_spares(&mut self, now: Instant) {
        for address in std::mem::take(&mut self.stalled) {
            if self.has_silent(&address) {
                self.dial_spare(&address, now);
                self.stalled.push(address);
            }
        }
    }

    fn dial_spare(&mut self, address: &Address, now: Instant) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        let is_early = entry.spare_at.is_some_and(|at| now < at);
        if entry.spare.is_some() || entry.attributes.is_last_resort() || is_early {
            return;
        }
        entry.spare_at = Some(now + entry.spare_backoff.next(&mut self.rng));
        let spare = self.add_subchannel(address, true);
        if let Some(entry) = self.endpoints.get_mut(address) {
            entry.spare = spare;
        }
        self.reclassify(address);
    }

    fn is_silent(&self, id: SubchannelId) -> bool {
        matches!(self.subchannels.get(&id), Some((_, State::Ready(ready))) if ready.is_silent())
    }

    pub(super) fn has_silent(&self, address: &Address) -> bool {
        let entry = self.endpoints.get(address);
        entry.is_some_and(|entry| entry.subchannels.iter().any(|id| self.is_silent(*id)))
    }

    /// Closes the second connection if no connection of the endpoint is silent any more.
    pub(super) fn drop_spare(&mut self, address: &Address) {
        if self.has_silent(address) {
            return;
        }
        let regular = self.options.connections_per_endpoint;
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        let Some(spare) = entry.spare.take() else {
            return;
        };
        if entry.subchannels.len() <= regular {
            // A regular connection has ended in the meantime, and the second connection replaces it.
            return;
        }
        entry.subchannels.retain(|id| *id != spare);
        self.forget_dial(spare);
        self.resting.remove(&spare);
        // Dropping a subchannel that is not ready stops its dial. A ready one, whose health may still be unknown, is closed.
        if let Some((_, State::Ready(subchannel))) = self.subchannels.remove(&spare) {
            self.close(spare, subchannel);
        }
        self.reclassify(address);
    }

    /// Replaces the silent connections of an endpoint by the second connection once it is ready. Calls on the silent connections continue.
    pub(super) fn replace_stalled(&mut self, address: &Address, id: SubchannelId) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        if entry.spare.take_if(|spare| *spare == id).is_none() {
            return;
        }
        let ids = entry.subchannels.clone();
        let (silent, others): (Vec<_>, Vec<_>) =
            ids.into_iter().partition(|id| self.is_silent(*id));
        if let Some(entry) = self.endpoints.get_mut(address) {
            entry.subchannels = others;
        }
        for id in silent {
            if let Some((_, State::Ready(subchannel))) = self.subchannels.remove(&id) {
                self.close(id, subchannel);
            }
        }
        tracing::debug!(%address, "the second connection is ready and replaces the silent one");
    }

    /// Handles the end of a silent connection. Returns true if the second connection replaces it.
    pub(super) fn spare_takes_over(&mut self, address: &Address, id: SubchannelId) -> bool {
        // The ended connection is no longer in `subchannels`, so only the others are checked.
        let others_are_silent = self.has_silent(address);
        let Some(entry) = self.endpoints.get_mut(address) else {
            return false;
        };
        if entry.spare.is_none() {
            return false;
        }
        if !others_are_silent {
            entry.spare = None;
        }
        entry.subchannels.retain(|entry| *entry != id);
        true
    }

    /// Checks silent connections after a call found one to be dead after a silence, before calls are sent on the others.
    pub(super) fn check_silent(&mut self) {
        if !self.shared.silent.swap(false, Ordering::Relaxed) {
            return;
        }
        let now = Instant::now();
        let doubtful = self
            .primary
            .entries()
            .map(|entry| entry.connection().http2())
            .filter(|connection| connection.silence(now) >= SILENCE);
        for connection in doubtful.take(CHECKS) {
            connection.check();
        }
    }
}

/// The same limit as for the check before a call is sent.
const SILENCE: Duration = Duration::from_secs(1);
/// Limit on connections checked at once, to avoid a burst of PINGs.
const CHECKS: usize = 64;
