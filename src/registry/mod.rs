//! The registry: one etcd cluster, and the location of services in it.

mod builder;
mod channel;
pub(crate) mod channel_status;
mod peers;
mod registry;
#[cfg(feature = "serde")]
mod status_json;
mod target;
mod tonic_channel;

pub use builder::RegistryBuilder;
pub use channel::connect;
pub use registry::Registry;
