//! Load balancing: turns a stream of endpoint changes into ready connections, and picks a ready connection for each call.
//!
//! One task per channel, the *driver*, owns all subchannels. It runs even while no calls are made. It publishes an immutable *ready set*:
//! the connections that can take calls. Each call picks from this set in the task of its caller. This module does not depend on the source
//! of the changes.

mod balancer;
mod connect_backoff;
mod dial_permit;
mod driver;
mod endpoint;
#[cfg(feature = "serde")]
mod endpoint_json;
mod endpoint_requests;
mod endpoint_status;
mod estimate;
mod gauges;
mod hash_key;
mod hash_ring;
mod hashed_pick;
mod health_status;
mod latencies;
mod limits;
mod load;
mod load_weights;
mod observation;
mod options;
mod outlier;
mod peer_index;
mod permit;
mod pick_key;
mod pick_policy;
mod picker;
mod ready_connection;
mod ready_set;
mod request_limit;
mod rotation;
mod select;
mod server_load;
mod shared;
mod snapshot;
mod stream_queue;
mod subchannel;
mod subsets;
mod summary;
mod traffic_split;
mod updates;
mod wanted;
mod zone;

pub(crate) use balancer::Balancer;
pub(crate) use endpoint::{AnswerFault, Blame, Endpoint};
pub use endpoint_status::{EjectionReason, EndpointState, EndpointStatus};
pub(crate) use gauges::Gauges;
pub use hash_key::HashKey;
pub(crate) use hash_key::hash;
pub(crate) use limits::MAX_DURATION;
pub use load_weights::LoadReports;
pub(crate) use observation::AttemptObservation;
pub(crate) use options::{AddressCallback, Options, Reconfiguration};
pub use outlier::{FailurePercentageEjection, OutlierDetection, SuccessRateEjection};
pub use peer_index::PeerIndex;
pub(crate) use permit::{Permit, Reserved};
pub(crate) use pick_key::{Details, PickKey};
pub(crate) use pick_policy::ProvidedPolicy;
pub use pick_policy::{PickInfo, PickPolicy, ReadyEndpoint, ReadyEndpoints};
pub use picker::LbPolicy;
pub(crate) use picker::{Pick, SCAN_LIMIT};
pub(crate) use ready_connection::ReadyConnection;
pub(crate) use request_limit::{Place, PlaceWait};
pub use select::Select;
pub(crate) use shared::Shared;
pub(crate) use snapshot::Snapshot;
pub(crate) use stream_queue::{Awaited, Exclusions, Waiting};
pub(crate) use subchannel::StopOnDrop;
pub(crate) use subsets::SplitDraw;
pub(crate) use summary::Summary;
pub use traffic_split::TrafficSplit;
pub(crate) use updates::Updates;

#[cfg(test)]
mod tests;
