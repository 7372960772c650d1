//! Handles what calls request from the driver:
//!
//! - to replace a connection that the caller has given up (`BalancedChannel::reconnect`);
//! - to dial *resting* connections, which were closed while no call needed them;
//! - to check *silent* connections, on which nothing was read for a while;
//! - to quarantine an endpoint whose responses are not gRPC;
//! - to keep new calls away from an endpoint whose server has sent a pushback;
//! - to add a ready set for a selection, or to change the traffic split;
//! - to add a connection to an endpoint whose streams are all in use.
//!
//! New settings of a running channel are requested in the same way.

use tokio::time::Instant;

use super::driver::Driver;
use super::subchannel_table::{State, SubchannelId};
use crate::address::Address;
use crate::balance::connect_backoff::ConnectBackoff;
use crate::balance::subchannel::{Idle, Ready, Subchannel};

impl Driver {
    pub(super) fn on_demand(&mut self) {
        self.redial_given_up();
        self.wake_resting();
        self.check_silent();
        self.quarantine_reported();
        self.add_pushbacks();
        self.reconfigure();
        self.update_selections();
        self.scaling.request(Instant::now());
    }

    /// Replaces the connections that callers have given up.
    fn redial_given_up(&mut self) {
        let given_up = self.shared.given_up();
        if given_up.is_empty() {
            return;
        }
        for connection in &given_up {
            let entry = self.endpoints.get(connection.endpoint().address());
            let id = entry.and_then(|entry| self.subchannels.find(&entry.subchannels, connection));
            if let Some(id) = id {
                self.redial(id);
            }
        }
        self.publish();
        // Calls exclude the connections in the list of given-up connections. Picks can find these connections until `publish` has returned,
        // so they stay in the list until then.
        self.shared.forget_given_up(&given_up);
    }

    /// Replaces a ready connection, even if its peer still answers.
    fn redial(&mut self, id: SubchannelId) {
        let Some((address, state)) = self.subchannels.take(id) else {
            return;
        };
        let state = match state {
            State::Ready(subchannel) => {
                State::Idle(self.replace_connection(id, &address, subchannel))
            }
            state => state,
        };
        self.subchannels.insert(id, address.clone(), state);
        // If the old connection was silent, a second connection was dialled beside it. The second connection is no longer needed, unless
        // another connection of the endpoint is silent as well.
        self.drop_second_connection(&address);
        self.reclassify(&address);
    }

    /// Closes a connection, and queues a dial for a new one in its place. Calls in flight continue until they end or the connection breaks.
    pub(super) fn replace_connection(
        &mut self,
        id: SubchannelId,
        address: &Address,
        subchannel: Subchannel<Ready>,
    ) -> Subchannel<Idle> {
        tracing::info!(%address, "closing a connection and dialling a new one");
        // An endpoint also counts as ejected while all its connections are stalled, which means that the peer does not answer. The new
        // connection is not stalled, so from now on the endpoint counts as ejected only for an ejection by the outlier detection or a
        // quarantine.
        let entry = self.endpoints.get(address);
        let ejection = entry.and_then(|entry| self.ejection_reason(entry));
        subchannel.connection().endpoint().set_ejection(ejection);
        self.close(id, subchannel);
        // The new connection takes over the subchannel's id, so later events of the old connection must not be applied to the new one.
        self.subchannels.forget_connection(id);
        self.enqueue(id);
        Subchannel::new(ConnectBackoff::new(self.options.max_backoff))
    }

    /// Dials every resting connection if a call waits.
    fn wake_resting(&mut self) {
        if self.shared.take_call_waits() {
            for id in self.resting.take() {
                self.wake(id, true);
            }
        }
    }

    /// Dials one resting connection if calls were sent on the channel since this function last ran. The endpoint of the connection then
    /// gets its share of the calls again. Only one connection is dialled each time, because a caller with few calls needs no more.
    pub(super) fn wake_resting_for_calls(&mut self) {
        let endpoints = self.endpoints.values().map(|entry| &entry.endpoint);
        let calls = || endpoints.map(|endpoint| endpoint.calls()).sum::<u64>();
        if let Some(id) = self.resting.scan(calls) {
            self.wake(id, false);
        }
    }

    /// Dials a resting connection. `wanted`: whether a call waits for it.
    fn wake(&mut self, id: SubchannelId, wanted: bool) {
        self.resting.remove(id);
        let Some((address, state)) = self.subchannels.take(id) else {
            return;
        };
        let state = match state {
            State::Resting(subchannel) => {
                self.enqueue(id);
                State::Idle(subchannel.wake(wanted))
            }
            state => state,
        };
        self.subchannels.insert(id, address, state);
    }

    /// Adds a connection to every endpoint whose streams are all in use. An endpoint gets at most one additional connection. A last resort,
    /// which gets calls only while no other endpoint is ready, gets none.
    pub(super) fn add_connections(&mut self) {
        let limit = self.options.connections_per_endpoint + 1;
        let full = self.endpoints.iter().filter(|(_, entry)| {
            !entry.attributes.is_last_resort()
                && entry.subchannels.len() < limit
                && self.subchannels.are_full(&entry.subchannels)
        });
        let full: Vec<_> = full.map(|(address, _)| address.clone()).collect();
        for address in full {
            tracing::debug!(%address, "every stream is in use: adding a connection");
            self.add_subchannel(&address, true);
            self.scaling.on_added(address, Instant::now());
        }
    }

    /// Closes additional connections that have reached their minimum lifetime and are not needed any more. An additional connection is not
    /// needed if the calls in flight to the endpoint would use at most half of the streams of its other connections.
    pub(super) fn remove_connections(&mut self, now: Instant) {
        for address in self.scaling.old(now) {
            let is_dispensable = self.endpoints.get(&address).is_none_or(|entry| {
                // A silent connection may be dead, so the additional connection may be needed as its replacement.
                !self.has_silent(&address) && self.subchannels.can_spare_one(&entry.subchannels)
            });
            if is_dispensable {
                self.scaling.forget(&address);
                self.remove_connection(&address);
            }
        }
    }

    fn remove_connection(&mut self, address: &Address) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        if entry.subchannels.len() <= self.options.connections_per_endpoint {
            return;
        }
        // A second connection that was dialled beside a silent one does not count as additional, so it is skipped.
        let second = entry.second.subchannel();
        let mut ids = entry.subchannels.iter();
        let Some(last) = ids.rposition(|id| Some(*id) != second) else {
            return;
        };
        let id = entry.subchannels.remove(last);
        tracing::debug!(%address, "removing an additional connection: its streams are no longer needed");
        self.resting.remove(id);
        if let Some(subchannel) = self.subchannels.remove(id) {
            self.close(id, subchannel);
        }
        self.reclassify(address);
    }
}
