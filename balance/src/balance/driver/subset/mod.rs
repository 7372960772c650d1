//! The subset: the endpoints to which the channel connects, chosen among those that the source lists (gRFC A68).

mod endpoint_subset;
mod peer_updates;

pub(super) use endpoint_subset::EndpointSubset;
pub(super) use peer_updates::PeerUpdates;

#[cfg(test)]
mod tests;
