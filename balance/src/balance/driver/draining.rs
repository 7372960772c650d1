//! Draining connections: they take no more calls, and are closed after their last call.

use std::sync::Arc;

use crate::balance::endpoint::Endpoint;
use crate::balance::subchannel::{Draining, Subchannel};

/// The draining connections, each with its endpoint.
#[derive(Debug, Default)]
pub(super) struct DrainingConnections(Vec<(Arc<Endpoint>, Subchannel<Draining>)>);

impl DrainingConnections {
    pub(super) fn push(&mut self, endpoint: Arc<Endpoint>, subchannel: Subchannel<Draining>) {
        self.0.push((endpoint, subchannel));
    }

    /// Returns whether there are connections that [`take_drained`](Self::take_drained) has not removed yet.
    pub(super) fn is_waiting(&self) -> bool {
        !self.0.is_empty()
    }

    /// Removes the connections whose last call has ended, and returns their endpoints.
    pub(super) fn take_drained(&mut self) -> Vec<Arc<Endpoint>> {
        let drained = self
            .0
            .extract_if(.., |(_, subchannel)| subchannel.is_drained());
        drained.map(|(endpoint, _)| endpoint).collect()
    }

    /// Returns whether a connection of the endpoint is draining.
    pub(super) fn contains(&self, endpoint: &Arc<Endpoint>) -> bool {
        let mut endpoints = self.0.iter().map(|(endpoint, _)| endpoint);
        endpoints.any(|draining| Arc::ptr_eq(draining, endpoint))
    }
}
