//! Handles silent connections, on which nothing was read for a while: a second connection is dialled beside a silent one. The first of the
//! two connections that answers is used.

use tokio::time::Instant;

use super::driver::Driver;
use super::subchannel_table::SubchannelId;
use crate::address::Address;
use crate::balance::endpoint::UNCHECKED_SILENCE;

impl Driver {
    /// Dials a second connection beside a silent one. Does not dial if the endpoint already has a second connection, if the backoff since
    /// the last dial of a second connection is not over, or if the endpoint is a last resort. `has_served`: whether the silent connection
    /// has served a call. If so, the backoff ends at once.
    pub(super) fn dial_beside(&mut self, address: &Address, has_served: bool) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        entry.endpoint.forget_silence();
        if has_served {
            entry.second.reset_backoff();
        }
        self.silent.insert(address.clone());
        self.dial_second_connection(address, Instant::now());
    }

    /// Dials the second connections that are due.
    pub(super) fn dial_second_connections(&mut self, now: Instant) {
        for address in std::mem::take(&mut self.silent) {
            if self.has_silent(&address) {
                self.dial_second_connection(&address, now);
                self.silent.insert(address);
            }
        }
    }

    fn dial_second_connection(&mut self, address: &Address, now: Instant) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        if !entry.second.may_dial(now) || entry.attributes.is_last_resort() {
            return;
        }
        entry.second.on_dial(now, &mut self.rng);
        let second = self.add_subchannel(address, true);
        if let Some(entry) = self.endpoints.get_mut(address) {
            entry.second.set(second);
        }
        self.reclassify(address);
    }

    pub(super) fn has_silent(&self, address: &Address) -> bool {
        let entry = self.endpoints.get(address);
        entry.is_some_and(|entry| {
            let mut ids = entry.subchannels.iter();
            ids.any(|id| self.subchannels.is_silent(*id))
        })
    }

    /// Closes the second connection if no connection of the endpoint is silent any more. But if a regular connection has ended in the
    /// meantime, the second connection stays and becomes a regular one.
    pub(super) fn drop_second_connection(&mut self, address: &Address) {
        if self.has_silent(address) {
            return;
        }
        let regular = self.options.connections_per_endpoint;
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        let Some(second) = entry.second.take() else {
            return;
        };
        if entry.subchannels.len() <= regular {
            // A regular connection has ended in the meantime, and the second connection replaces it.
            return;
        }
        entry.subchannels.retain(|id| *id != second);
        self.dials.forget(second);
        self.resting.remove(second);
        // The second connection may already be open and wait for its first health status.
        if let Some(subchannel) = self.subchannels.remove(second) {
            self.close(second, subchannel);
        }
        self.reclassify(address);
    }

    /// Replaces the silent connections of an endpoint by the subchannel `id`, which has just become ready. Does nothing if `id` is not the
    /// second connection. Calls on the silent connections continue.
    pub(super) fn replace_silent(&mut self, address: &Address, id: SubchannelId) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        if !entry.second.take_if(id) {
            return;
        }
        let ids = entry.subchannels.clone();
        let (silent, others): (Vec<_>, Vec<_>) = ids
            .into_iter()
            .partition(|id| self.subchannels.is_silent(*id));
        if let Some(entry) = self.endpoints.get_mut(address) {
            entry.subchannels = others;
        }
        for id in silent {
            if let Some(subchannel) = self.subchannels.remove(id) {
                self.close(id, subchannel);
            }
        }
        tracing::debug!(%address, "the second connection is ready and replaces the silent one");
    }

    /// Handles the end of a silent connection. Returns true if a second connection replaces it, and false if there is no second connection.
    pub(super) fn second_connection_takes_over(
        &mut self,
        address: &Address,
        id: SubchannelId,
    ) -> bool {
        // The subchannel of the ended connection is no longer in `self.subchannels`, so only the other connections are checked.
        let others_are_silent = self.has_silent(address);
        let Some(entry) = self.endpoints.get_mut(address) else {
            return false;
        };
        if entry.second.subchannel().is_none() {
            return false;
        }
        if !others_are_silent {
            entry.second.take();
        }
        entry.subchannels.retain(|entry| *entry != id);
        true
    }

    /// If a call has found a connection dead, requests a PING on each connection of the primary set on which nothing was read for a while,
    /// but on at most [`CHECKS`] of them. Without these checks, later calls could be sent on dead connections.
    pub(super) fn check_silent(&mut self) {
        if !self.shared.take_found_dead() {
            return;
        }
        let now = Instant::now();
        let doubtful = self
            .ready_sets
            .primary()
            .map(|entry| entry.connection().http2())
            .filter(|connection| connection.silence(now) >= UNCHECKED_SILENCE);
        for connection in doubtful.take(CHECKS) {
            connection.request_check();
        }
    }
}

/// Maximum number of connections that are checked at once, to avoid a burst of PINGs.
const CHECKS: usize = 64;
