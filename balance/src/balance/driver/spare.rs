//! A stalled connection does not prove that its server is down: a second one is dialled beside it, and the first to answer is used.
//!
//! Middleboxes forget flows while TCP still acknowledges them, and behind one address there may be several servers.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::{Driver, State, SubchannelId};
use crate::address::Address;

impl Driver {
    /// Dials beside a connection that does not answer, unless that is being done or was done a moment ago in vain.
    pub(super) fn dial_beside(&mut self, address: &Address, has_served: bool) {
        let Some(known) = self.known.get_mut(address) else {
            return;
        };
        known.endpoint.forget_silence();
        if has_served {
            known.spare_backoff.reset();
            known.spare_at = None;
        }
        if !self.stalled.contains(address) {
            self.stalled.push(address.clone());
        }
        self.dial_spare(address, Instant::now());
    }

    /// Dials beside connections whose turn has come.
    pub(super) fn dial_spares(&mut self, now: Instant) {
        for address in std::mem::take(&mut self.stalled) {
            if self.has_silent(&address) {
                self.dial_spare(&address, now);
                self.stalled.push(address);
            }
        }
    }

    fn dial_spare(&mut self, address: &Address, now: Instant) {
        let Some(known) = self.known.get_mut(address) else {
            return;
        };
        let is_early = known.spare_at.is_some_and(|at| now < at);
        if known.spare.is_some() || known.attributes.is_last_resort() || is_early {
            return;
        }
        known.spare_at = Some(now + known.spare_backoff.next(&mut self.rng));
        let spare = self.add_subchannel(address, true);
        if let Some(known) = self.known.get_mut(address) {
            known.spare = spare;
        }
        self.reclassify(address);
    }

    fn is_silent(&self, id: SubchannelId) -> bool {
        matches!(self.subchannels.get(&id), Some((_, State::Ready(ready))) if ready.is_silent())
    }

    pub(super) fn has_silent(&self, address: &Address) -> bool {
        let known = self.known.get(address);
        known.is_some_and(|known| known.subchannels.iter().any(|id| self.is_silent(*id)))
    }

    /// Drops the second connection once every other one answers again, or the endpoint was registered anew.
    pub(super) fn drop_spare(&mut self, address: &Address) {
        if self.has_silent(address) {
            return;
        }
        let regular = self.options.connections_per_endpoint;
        let Some(known) = self.known.get_mut(address) else {
            return;
        };
        let Some(spare) = known.spare.take() else {
            return;
        };
        if known.subchannels.len() <= regular {
            // One of the others has ended meanwhile, and this one stands for it.
            return;
        }
        known.subchannels.retain(|id| *id != spare);
        self.forget_dial(spare);
        self.resting.remove(&spare);
        // Dropping the state stops the dial. A connection whose health was not known yet is closed.
        if let Some((_, State::Ready(subchannel))) = self.subchannels.remove(&spare) {
            self.close(spare, subchannel);
        }
        self.reclassify(address);
    }

    /// A connection is ready. If it was dialled beside others that do not answer, it takes their place; their calls go on.
    pub(super) fn replace_stalled(&mut self, address: &Address, id: SubchannelId) {
        let Some(known) = self.known.get_mut(address) else {
            return;
        };
        if known.spare.take_if(|spare| *spare == id).is_none() {
            return;
        }
        let ids = known.subchannels.clone();
        let (silent, others): (Vec<_>, Vec<_>) =
            ids.into_iter().partition(|id| self.is_silent(*id));
        if let Some(known) = self.known.get_mut(address) {
            known.subchannels = others;
        }
        for id in silent {
            if let Some((_, State::Ready(subchannel))) = self.subchannels.remove(&id) {
                self.close(id, subchannel);
            }
        }
        tracing::debug!(%address, "connected beside a connection that does not answer");
    }

    /// Handles the end of a silent connection. Returns true if the second connection replaces it.
    pub(super) fn spare_takes_over(&mut self, address: &Address, id: SubchannelId) -> bool {
        // The one that has ended is in no state any more.
        let others_are_silent = self.has_silent(address);
        let Some(known) = self.known.get_mut(address) else {
            return false;
        };
        if known.spare.is_none() {
            return false;
        }
        if !others_are_silent {
            known.spare = None;
        }
        known.subchannels.retain(|known| *known != id);
        true
    }

    /// A call has found a connection dead after a silence: others are checked before calls are sent on them.
    pub(super) fn check_silent(&mut self) {
        if !self.shared.silent.swap(false, Ordering::Relaxed) {
            return;
        }
        let now = Instant::now();
        let doubtful = self
            .primary
            .members()
            .map(|seat| seat.member().connection())
            .filter(|connection| connection.silence(now) >= SILENCE);
        for connection in doubtful.take(CHECKS) {
            connection.check();
        }
    }
}

/// As for a call that is about to be sent.
const SILENCE: Duration = Duration::from_secs(1);
/// Limit on connections checked at once, to avoid a burst of PINGs.
const CHECKS: usize = 64;
