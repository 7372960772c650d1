//! gRPC's service config: the settings that the owner of a service gives to its clients.
//!
//! The format is that of gRPC (`grpc/doc/service_config.md`), and the parser accepts what the parser of grpc-go accepts. The page
//! `docs/service-config.md` lists the fields and the differences.

mod config;
#[cfg(feature = "service-config")]
mod duration;
#[cfg(feature = "service-config")]
mod error;
#[cfg(feature = "service-config")]
mod load_balancing;
#[cfg(feature = "service-config")]
mod methods;
#[cfg(feature = "service-config")]
mod node;
#[cfg(feature = "service-config")]
mod parse;

pub use config::ServiceConfig;
#[cfg(feature = "service-config")]
pub use error::ServiceConfigError;

#[cfg(all(test, feature = "service-config"))]
mod tests;
