//! Connections that the server closed while no call used them. They are dialled again when a call needs one.

use std::sync::atomic::Ordering;

use super::driver::{Driver, State, SubchannelId};

impl Driver {
    /// Dials every resting connection because a call waits.
    pub(super) fn wake_resting(&mut self) {
        if !self.shared.wanting.swap(false, Ordering::Relaxed) {
            return;
        }
        for id in std::mem::take(&mut self.resting) {
            self.wake(id, true);
        }
    }

    /// Dials one resting connection if calls were sent since the last scan, so that its endpoint gets its share of the traffic. Only one is
    /// dialled, since a caller with few calls needs no more.
    pub(super) fn wake_resting_for_calls(&mut self) {
        let Some(&id) = self.resting.iter().next() else {
            // Calls that were sent before the first connection rests do not count.
            self.calls_then = None;
            return;
        };
        let endpoints = self.endpoints.values().map(|entry| &entry.endpoint);
        let calls = endpoints.map(|endpoint| endpoint.calls()).sum();
        let before = self.calls_then.replace(calls);
        if before.is_some_and(|before| before != calls) {
            self.wake(id, false);
        }
    }

    /// Dials a resting connection. `wanted`: a call waits for it.
    pub(super) fn wake(&mut self, id: SubchannelId, wanted: bool) {
        self.resting.remove(&id);
        let Some((address, state)) = self.subchannels.remove(&id) else {
            return;
        };
        let state = match state {
            State::Resting(subchannel) => {
                self.enqueue(id);
                State::Idle(subchannel.wake(wanted))
            }
            state => state,
        };
        self.subchannels.insert(id, (address, state));
    }
}
