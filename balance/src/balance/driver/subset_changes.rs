//! Applies changes of the subset: adds the endpoints that have become part of it, and removes those that no longer are.

use tokio::time::Instant;

use super::driver::Driver;
use super::subchannel_table::Class;
use super::subset::EndpointSubset;

impl Driver {
    /// Computes the subset again, and applies the difference. Does nothing if the channel has no subset.
    pub(super) fn update_subset(&mut self) {
        let Some(subset) = &mut self.subset else {
            return;
        };
        let changes = subset.update(Instant::now());
        let listed = subset.listed();
        let before = self.endpoints.len();
        // New endpoints are added first, so that calls find a pending endpoint at any time.
        for (address, attributes) in changes.inserted {
            self.insert(&address, attributes);
        }
        let added = self.endpoints.len() - before;
        let removed = changes.removed.len();
        for address in changes.removed {
            self.remove(&address);
        }
        if added > 0 || removed > 0 {
            let size = self.endpoints.len();
            tracing::debug!(size, listed, added, removed, "the subset has changed");
        }
    }

    /// Updates the subset if an endpoint of it has become ready or has failed, or if an endpoint has been failing for too long.
    pub(super) fn update_due_subset(&mut self) {
        let next = self.subset.as_ref().and_then(EndpointSubset::next);
        if next.is_some_and(|at| at <= Instant::now()) {
            self.update_subset();
        }
    }

    /// Sets the size of the subset. `None`: the channel connects to all endpoints.
    pub(super) fn set_subset_size(&mut self, size: Option<usize>) {
        let Some(size) = size else {
            let unused = self.subset.take().map(EndpointSubset::into_unused);
            for (address, attributes) in unused.into_iter().flatten() {
                self.insert(&address, attributes);
            }
            return;
        };
        if let Some(subset) = &mut self.subset {
            subset.set_size(size);
        } else {
            let seed = self.options.seed.unwrap_or_else(|| fastrand::u64(..));
            let peer = self.peers.current();
            let endpoints = self.endpoints.iter().map(|(address, entry)| {
                let attributes = entry.attributes.clone();
                let class = if self.quarantines.is_doubted(address) {
                    Class::Failing
                } else {
                    entry.class
                };
                (address.clone(), attributes, class)
            });
            let subset = EndpointSubset::new(size, seed, peer, endpoints, Instant::now());
            self.subset = Some(subset);
        }
        self.update_subset();
    }

    /// Applies a new index of the client among its peers.
    pub(super) fn on_peers(&mut self) {
        let peer = self.peers.current();
        tracing::debug!(?peer, "the index among the peers changes");
        if let Some(subset) = &mut self.subset {
            subset.set_peer(peer);
        }
        self.update_subset();
    }
}
