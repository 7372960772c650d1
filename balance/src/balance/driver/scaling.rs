//! The number of connections of an endpoint: one more is added while every stream is in use, and removed later.

use std::time::Duration;

use tokio::time::Instant;

use super::driver::{Driver, EndpointEntry, State};
use crate::address::Address;

impl Driver {
    /// Adds a connection to every endpoint whose streams are all in use.
    pub(super) fn grow(&mut self) {
        let limit = self.options.connections_per_endpoint + 1;
        let is_full = |entry: &EndpointEntry| {
            !entry.attributes.is_last_resort()
                && entry.subchannels.len() < limit
                && entry.subchannels.iter().all(|id| {
                    matches!(self.subchannels.get(id), Some((_, State::Ready(ready))) if ready.connection().is_full())
                })
        };
        let full: Vec<_> = self
            .endpoints
            .iter()
            .filter(|(_, entry)| is_full(entry))
            .map(|(address, _)| address.clone())
            .collect();
        for address in full {
            tracing::debug!(%address, "every stream is in use: adding a connection");
            self.add_subchannel(&address, true);
            self.grown.insert(address, Instant::now());
        }
    }

    /// Closes additional connections whose calls fit on the other connections with room to spare.
    pub(super) fn shrink(&mut self, now: Instant) {
        let is_old = |since: Instant| now.saturating_duration_since(since) >= GROWN;
        let old: Vec<_> = self
            .grown
            .iter()
            .filter(|(_, since)| is_old(**since))
            .map(|(address, _)| address.clone())
            .collect();
        for address in old {
            // A silent connection carries no calls, so the additional one is needed in its place.
            if !self.has_silent(&address) && self.is_dispensable(&address) {
                self.grown.remove(&address);
                self.drop_last(&address);
            }
        }
    }

    /// Returns whether the endpoint's calls take at most half of the streams of all its connections but one. Also true for a removed
    /// endpoint.
    fn is_dispensable(&self, address: &Address) -> bool {
        let Some(entry) = self.endpoints.get(address) else {
            return true;
        };
        let connections =
            entry
                .subchannels
                .iter()
                .filter_map(|id| match self.subchannels.get(id) {
                    Some((_, State::Ready(ready))) => Some(ready.connection()),
                    _ => None,
                });
        let (mut in_flight, mut room) = (0_usize, Vec::new());
        for connection in connections {
            in_flight += connection.load().in_flight() as usize;
            room.push(connection.load().limit());
        }
        room.pop();
        let room = room.into_iter().fold(0, usize::saturating_add);
        in_flight.saturating_mul(2) <= room
    }

    fn drop_last(&mut self, address: &Address) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        if entry.subchannels.len() <= self.options.connections_per_endpoint {
            return;
        }
        // The second connection beside a silent one is not the additional connection.
        let spare = entry.spare;
        let mut ids = entry.subchannels.iter();
        let Some(last) = ids.rposition(|id| Some(*id) != spare) else {
            return;
        };
        let id = entry.subchannels.remove(last);
        tracing::debug!(%address, "removing an additional connection: its streams are no longer needed");
        self.resting.remove(&id);
        if let Some((_, State::Ready(subchannel))) = self.subchannels.remove(&id) {
            self.close(id, subchannel);
        }
        self.reclassify(address);
    }
}

/// Minimum lifetime of an additional connection. With a shorter one, connections would be dialled and closed in step with bursts of calls.
const GROWN: Duration = Duration::from_secs(30);
