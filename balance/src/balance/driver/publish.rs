//! Publishes the ready set and the summary, and keeps both up to date.

use std::sync::Arc;

use tokio::time::Instant;

use super::driver::Driver;
use super::endpoint_entry::EndpointEntry;
use super::ready_set_pair::{Placed, Standing};
use super::subchannel_table::{Class, SubchannelId};
use crate::address::Address;
use crate::balance::endpoint_status::{EjectionReason, EndpointState};
use crate::balance::health_status::Health;
use crate::balance::ready_connection::ReadyEntry;
use crate::balance::snapshot::Published;

impl Driver {
    /// Puts a connection into the right ready set. If the peer does not answer or has not reported that it is healthy, the connection is in
    /// no set. If the endpoint is ejected, in quarantine, in pushback or marked as a last resort, the connection is in the last-resort set.
    /// Otherwise it is in the primary set.
    pub(super) fn update_ready_set(&mut self, id: SubchannelId) {
        let Some((address, subchannel)) = self.subchannels.ready(id) else {
            return;
        };
        let Some(entry) = self.endpoints.get(address) else {
            return;
        };
        let ejection = self.ejection_reason(entry);
        let mut connections = entry.subchannels.iter();
        let all_stalled = connections.all(|id| {
            let ready = self.subchannels.ready(*id);
            ready.is_none_or(|(_, subchannel)| subchannel.is_stalled())
        });
        let stalled = all_stalled.then_some(EjectionReason::NoAnswer);
        entry.endpoint.set_ejection(ejection.or(stalled));
        let connection = subchannel.connection();
        if *subchannel.health() != Health::Serving || subchannel.is_stalled() {
            let connection = Arc::clone(connection);
            return self.evict(id, &connection);
        }
        let weight = self.current_weight(entry, Instant::now());
        let standing = if entry.attributes.is_last_resort() {
            Standing::LastResort
        } else {
            ejection.map_or(Standing::Ordinary, |reason| match reason {
                EjectionReason::Pushback => Standing::PushedBack,
                _ => Standing::LastResort,
            })
        };
        let ready = ReadyEntry::new(connection);
        let selected = self.selections.place(id, &ready, weight, standing);
        let placed = self.ready_sets.place(id, ready, weight, standing);
        match placed.max(selected) {
            Placed::Unchanged => {}
            // A new connection or a new weight can be batched with later changes. A move between the sets is published at once.
            Placed::Changed => self.publication.soon(),
            Placed::Moved => self.publication.now(),
        }
    }

    /// Updates the ready sets for all connections of an endpoint. Without a ready connection, updates only whether the endpoint counts as
    /// ejected.
    pub(super) fn update_ready_sets(&mut self, address: &Address) {
        let Some(entry) = self.endpoints.get(address) else {
            return;
        };
        let ids = entry.subchannels.clone();
        if ids.iter().all(|id| self.subchannels.ready(*id).is_none()) {
            entry.endpoint.set_ejection(self.ejection_reason(entry));
        }
        for id in ids {
            self.update_ready_set(id);
        }
    }

    /// Returns why an endpoint gets calls only as a last resort, apart from its attributes.
    pub(super) fn ejection_reason(&self, entry: &EndpointEntry) -> Option<EjectionReason> {
        if entry.ejection.is_ejected() {
            return Some(EjectionReason::Outlier);
        }
        let is_quarantined = self.quarantines.is_quarantined(entry.endpoint.address());
        if is_quarantined {
            return Some(EjectionReason::NotGrpc);
        }
        entry.is_pushed_back.then_some(EjectionReason::Pushback)
    }

    /// Returns the current weight of an endpoint's connections.
    pub(super) fn current_weight(&self, entry: &EndpointEntry, now: Instant) -> u32 {
        let (address, weight) = (entry.endpoint.address(), entry.attributes.weight());
        let weight = self.slow_start.current_weight(address, weight, now);
        let weight = weight.saturating_mul(self.reported_weights.factor(address));
        weight.saturating_mul(self.zones.factor(entry.attributes.zone()))
    }

    /// Computes the weights from the load reports again.
    pub(super) fn update_reported_weights(&mut self, now: Instant) {
        let ready = self.endpoints.iter();
        let ready = ready.filter(|(_, entry)| entry.class == Class::Ready);
        let ready = ready.map(|(address, entry)| {
            let ejection = self.ejection_reason(entry);
            let is_ordinary = ejection.is_none() && !entry.attributes.is_last_resort();
            (address.clone(), is_ordinary, entry.endpoint.weight_report())
        });
        let ready = ready.collect();
        for address in self.reported_weights.update(ready, now) {
            self.update_ready_sets(&address);
        }
    }

    /// Prepares the weight of an endpoint that becomes ready: if no other connection is ready, starts slow start and a blackout period of
    /// the weight from load reports.
    pub(super) fn begin_weight(&mut self, address: &Address, now: Instant) {
        self.begin_slow_start(address, now);
        let Some(entry) = self.endpoints.get(address) else {
            return;
        };
        if entry.class != Class::Ready {
            entry.endpoint.forget_weight_report();
            self.reported_weights.forget(address);
        }
    }

    /// Starts the growth of an endpoint's weight (slow start) if the endpoint has just become ready, unless its server is warm. A server is
    /// warm if another connection is ready. It is also warm if an earlier connection became ready, and since then no dial has failed and
    /// the server was not replaced or restarted.
    fn begin_slow_start(&mut self, address: &Address, now: Instant) {
        if !self.slow_start.is_enabled() {
            return;
        }
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        if entry.class == Class::Ready || std::mem::replace(&mut entry.is_warm, true) {
            return;
        }
        self.slow_start.start(address, now);
    }

    /// Updates the weights that still grow in slow start.
    pub(super) fn grow_weights(&mut self, now: Instant) {
        for address in self.slow_start.grow(now) {
            self.update_ready_sets(&address);
        }
    }

    /// Recomputes the factors of the zones from the weights of the connections in the primary set.
    fn update_zone_factors(&mut self) {
        if !self.zones.is_enabled() {
            return;
        }
        let ready_sets = &self.ready_sets;
        let endpoints = self.endpoints.values().map(|entry| {
            let primary = |id: &&SubchannelId| ready_sets.is_primary(**id);
            let connections = entry.subchannels.iter().filter(primary).count();
            let weight = u64::from(entry.attributes.weight()).saturating_mul(connections as u64);
            (entry.attributes.zone(), weight)
        });
        if self.zones.update(endpoints) {
            for id in self.subchannels.ids() {
                self.update_ready_set(id);
            }
        }
    }

    /// Updates the class and the state of an endpoint after a change of its subchannels.
    pub(super) fn reclassify(&mut self, address: &Address) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        let is_last_resort = entry.attributes.is_last_resort();
        let (class, state) = self
            .subchannels
            .classify(&entry.subchannels, is_last_resort);
        let (next, failed) = self.subchannels.attempts(&entry.subchannels);
        entry.endpoint.set_attempts(next, failed);
        let before = std::mem::replace(&mut entry.class, class);
        if before != class {
            let attributes = &entry.attributes;
            let (before, after) = ((attributes, before), (attributes, class));
            self.selections.recount(address, Some(before), Some(after));
        }
        // The state `Ready` means that calls can pick the endpoint, so this state is set only after the new set is published.
        if class != Class::Ready {
            entry.endpoint.set_state(state);
        }
        self.publication.on_class(address, before, class);
        if let Some(subset) = &mut self.subset {
            let mut ids = entry.subchannels.iter();
            let is_stalled = ids.any(|id| self.subchannels.is_stalled(*id));
            let is_useless =
                self.quarantines.is_doubted(address) || (is_stalled && class != Class::Ready);
            // The second connection beside a stalled one is probably not answered either, and answers that are not gRPC are of no use.
            let class = if is_useless { Class::Failing } else { class };
            let is_idle = state == EndpointState::Idle;
            subset.on_class(address, class, is_idle, Instant::now());
        }
    }

    /// Publishes the ready set and the summary.
    pub(super) fn publish(&mut self) {
        if self.shared.has_ended() {
            return self.publication.clear();
        }
        // If a factor changes, `update_zone_factors` schedules a publication. The current publication already includes the change, so the
        // scheduled one is cleared.
        self.update_zone_factors();
        self.publication.clear();
        let mut rings = self.rings.budget(Instant::now());
        let ready = self.ready_sets.freeze(&mut rings);
        let subsets = self.selections.freeze(&mut rings);
        if let Some(next) = self.rings.settle(&rings, Instant::now()) {
            self.publication.at(next);
        }
        let is_last_resort = self.ready_sets.is_last_resort();
        let summary = self.publication.summarize(ready.len(), is_last_resort);
        let picker = Arc::clone(&self.picker);
        self.shared.published.store(Arc::new(Published {
            ready,
            subsets,
            summary,
            picker,
        }));
        for address in self.publication.take_became_ready() {
            let entry = self.endpoints.get(&address);
            if let Some(entry) = entry.filter(|entry| entry.class == Class::Ready) {
                entry.endpoint.set_state(EndpointState::Ready);
            }
        }
        self.shared.changed.notify_waiters();
        for (endpoint, has_calls) in self.publication.take_removed() {
            if has_calls {
                endpoint.set_state(EndpointState::Draining);
            } else {
                self.shared.forget(&endpoint);
            }
        }
    }

    /// Removes an endpoint from the list of endpoints that the channel reports, if discovery has removed the endpoint and its last call has
    /// ended.
    pub(super) fn forget_drained(&mut self) {
        for endpoint in self.draining.take_drained() {
            let entry = self.endpoints.get(endpoint.address());
            // If the endpoint is still in the set, only one of its connections was closed, because this connection was replaced or no
            // longer needed. A removed endpoint may have other connections whose calls are still in flight.
            let is_removed = entry.is_none_or(|entry| !Arc::ptr_eq(&entry.endpoint, &endpoint));
            if is_removed && !self.draining.contains(&endpoint) {
                self.shared.forget(&endpoint);
            }
        }
    }
}
