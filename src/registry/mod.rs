//! The entry point of the crate: one etcd cluster, and the location of services in it.

mod builder;
mod channel;
mod registry;
mod target;
mod tonic_channel;

pub use builder::RegistryBuilder;
pub use channel::connect;
pub use registry::Registry;
