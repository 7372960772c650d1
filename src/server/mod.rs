//! Serves a router that is registered in etcd, from the binding of the listener to the end of the last call.

mod connection;
#[cfg(feature = "health")]
mod health_service;
mod incoming;
mod opening;
#[cfg(feature = "health")]
mod readiness;
mod serve_registered;
mod shutdown;
mod signal;

pub use serve_registered::ServeRegistered;
