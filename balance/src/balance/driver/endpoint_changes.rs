//! Applies the changes that discovery reports: adds, updates and removes endpoints.

use std::sync::Arc;

use tokio::time::Instant;
use tower::discover::Change;

use super::driver::Driver;
use super::endpoint_entry::EndpointEntry;
use super::subchannel_table::{State, SubchannelId};
use crate::address::Address;
use crate::attributes::Attributes;
use crate::balance::connect_backoff::ConnectBackoff;
use crate::balance::endpoint::Endpoint;
use crate::balance::ready_connection::{ReadyConnection, TakesCalls};
use crate::balance::subchannel::{Ready, Subchannel};
use crate::balance::updates::Batch;
use crate::causes::causes;

impl Driver {
    pub(super) fn on_batch<E>(&mut self, batch: Batch<Result<Change<Address, Attributes>, E>>)
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        // If a batch has only errors, discovery may not have reported any endpoint yet. The set then does not count as known, even if
        // `batch.known` is true.
        let is_usable = batch.changes.is_empty() || batch.changes.iter().any(Result::is_ok);
        for change in batch.changes {
            match change {
                Ok(Change::Insert(address, attributes)) => {
                    self.publication.set_source_error(None);
                    match &mut self.subset {
                        Some(subset) => subset.insert(&address, attributes),
                        None => self.insert(&address, attributes),
                    }
                }
                Ok(Change::Remove(address)) => {
                    self.publication.set_source_error(None);
                    match &mut self.subset {
                        Some(subset) => subset.remove(&address),
                        None => self.remove(&address),
                    }
                }
                Err(error) => {
                    let error = causes(&*error.into());
                    tracing::warn!(%error, "discovery failed; the last known set stays in use");
                    self.publication.set_source_error(Some(error.into()));
                    self.publication.soon();
                }
            }
        }
        self.update_subset();
        if batch.known && is_usable && self.publication.set_known() {
            tracing::info!(
                endpoints = self.endpoints.len(),
                "the set of endpoints is known"
            );
            self.publication.now();
        }
    }

    /// Adds an endpoint, or applies its changed attributes.
    pub(super) fn insert(&mut self, address: &Address, attributes: Attributes) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return self.add(address, attributes);
        };
        let last_resort = attributes.is_last_resort();
        entry.endpoint.set_attributes(&attributes);
        let before = std::mem::replace(&mut entry.attributes, attributes);
        let subchannels = entry.subchannels.clone();
        // A new generation is another server, or the same server after a restart.
        let is_new_generation = before.generation() != entry.attributes.generation();
        if before != entry.attributes {
            let (before, after) = ((&before, entry.class), (&entry.attributes, entry.class));
            self.selections.recount(address, Some(before), Some(after));
            // The counts of the selections and the ring may change, even if no ready connection changes its set.
            self.publication.soon();
        }
        if before.is_last_resort() != last_resort {
            tracing::info!(%address, last_resort, "the last-resort flag of the endpoint has changed");
        }
        if is_new_generation {
            entry.on_new_generation();
            self.quarantines.forget(address);
            self.pushbacks.forget(address, Instant::now());
            self.reported_weights.forget(address);
        }
        for id in subchannels {
            if before.is_last_resort() && !last_resort {
                self.enqueue(id);
            }
            self.update(id, last_resort, is_new_generation);
        }
        self.reclassify(address);
    }

    fn add(&mut self, address: &Address, attributes: Attributes) {
        let endpoint = Arc::new(Endpoint::new(address.clone()));
        endpoint.set_attributes(&attributes);
        self.shared
            .directory()
            .insert(address.clone(), Arc::clone(&endpoint));
        tracing::info!(%address, weight = attributes.weight(), "endpoint added");
        let dial = !attributes.is_last_resort();
        let keep_alive = self.connector.http2.keep_alive;
        let max_backoff = self.options.max_backoff;
        let max_requests = self.options.max_requests_per_endpoint;
        let entry = EndpointEntry::new(endpoint, attributes, max_backoff, keep_alive)
            .with_max_requests(max_requests);
        let added = (&entry.attributes, entry.class);
        self.selections.recount(address, None, Some(added));
        self.endpoints.insert(address.clone(), entry);
        self.publication.set_endpoints(self.endpoints.len());
        self.add_subchannel(address, dial);
        self.reclassify(address);
        self.publication.soon();
    }

    pub(super) fn add_subchannel(&mut self, address: &Address, dial: bool) -> Option<SubchannelId> {
        let entry = self.endpoints.get_mut(address)?;
        let id = self.subchannels.next_id();
        entry.subchannels.push(id);
        let subchannel = Subchannel::new(ConnectBackoff::new(self.options.max_backoff));
        self.subchannels
            .insert(id, address.clone(), State::Idle(subchannel));
        if dial {
            self.enqueue(id);
        }
        Some(id)
    }

    /// Applies changed attributes to a subchannel.
    fn update(&mut self, id: SubchannelId, last_resort: bool, is_new_generation: bool) {
        let Some((address, state)) = self.subchannels.take(id) else {
            return;
        };
        let state = match state {
            State::Ready(subchannel) if is_new_generation && subchannel.is_silent() => {
                // The connection became silent (nothing was read on it for a while) under the previous generation, so it is replaced at
                // once.
                self.drop_second_connection(&address);
                State::Idle(self.replace_connection(id, &address, subchannel))
            }
            State::Resting(subchannel) if last_resort || is_new_generation => {
                self.resting.remove(id);
                if !last_resort {
                    self.enqueue(id);
                }
                State::Idle(subchannel.wake(false))
            }
            State::Connecting(subchannel) if last_resort => {
                // The dial is forgotten, so that its outcome is not mistaken for the outcome of a later dial.
                self.dials.forget(id);
                State::Idle(subchannel.cancel())
            }
            State::TransientFailure(subchannel) if last_resort => State::Idle(subchannel.retry()),
            // The subchannel is added to the regular queue, which is dialled first. It also stays in the queue of failing subchannels. When
            // its entry in that queue is reached, the subchannel is no longer idle, so the entry is skipped.
            State::Idle(subchannel)
                if is_new_generation && !last_resort && subchannel.is_failing() =>
            {
                self.enqueue(id);
                State::Idle(subchannel.refreshed())
            }
            State::Connecting(subchannel) if is_new_generation => {
                State::Connecting(subchannel.refreshed())
            }
            State::TransientFailure(subchannel) if is_new_generation => {
                tracing::debug!(%address, "new generation of the endpoint: connecting at once");
                self.enqueue(id);
                State::Idle(subchannel.reset())
            }
            state => state,
        };
        self.subchannels.insert(id, address, state);
        self.update_ready_set(id);
    }

    /// Removes an endpoint. Its connections are closed after their last calls.
    pub(super) fn remove(&mut self, address: &Address) {
        let Some(entry) = self.endpoints.remove(address) else {
            return;
        };
        tracing::info!(%address, "endpoint removed");
        let removed = (&entry.attributes, entry.class);
        self.selections.recount(address, Some(removed), None);
        self.slow_start.forget(address);
        self.quarantines.forget(address);
        self.pushbacks.forget(address, Instant::now());
        self.reported_weights.forget(address);
        let mut has_calls = false;
        for id in entry.subchannels {
            self.resting.remove(id);
            if let Some(subchannel) = self.subchannels.remove(id) {
                let connection = Arc::clone(subchannel.connection());
                self.close(id, subchannel);
                has_calls |= connection.load().in_flight() > 0;
            }
        }
        self.publication
            .on_removed(entry.endpoint, entry.class, has_calls);
        self.publication.set_endpoints(self.endpoints.len());
        self.publication.now();
    }

    /// Removes a connection from the ready sets. The connection is closed after its last call.
    pub(super) fn close(&mut self, id: SubchannelId, subchannel: Subchannel<Ready>) {
        let connection = subchannel.connection();
        self.evict(id, connection);
        let endpoint = Arc::clone(connection.endpoint());
        self.draining.push(endpoint, subchannel.drain());
    }

    /// Removes a connection from the ready sets. Waiting calls no longer get streams of this connection. Picks can find the connection
    /// until the next publication, which is due at once.
    pub(super) fn evict(&mut self, id: SubchannelId, connection: &Arc<ReadyConnection>) {
        connection.set_takes_calls(TakesCalls::Evicted);
        self.selections.remove(id);
        if self.ready_sets.remove(id) {
            self.publication.now();
        }
    }
}
