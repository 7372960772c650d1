//! The way a Rust gRPC service finds its peers through etcd, and is found by them.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod address;
mod backoff;
mod balance;
mod channel;
mod error;
mod etcd;
mod format;
mod instance;
mod keyspace;
mod registration;
mod registry;
mod resolver;
mod server;
#[cfg(all(feature = "testing", unix))]
#[cfg_attr(docsrs, doc(cfg(feature = "testing")))]
pub mod testing;
mod transport;

pub use address::{Address, AddressError, AddressPolicy};
pub use balance::{EndpointState, EndpointStatus, Policy};
pub use channel::{
    BalancedChannel, ChannelBuilder, ChannelError, ResponseBody, ResponseFuture, ServedBy,
    WaitForReady,
};
pub use error::{ConnectError, Endpoints, EtcdError, EtcdErrorKind, RegisterError, ServeError};
pub use format::Format;
pub use instance::Instance;
pub use ipnet::IpNet;
pub use keyspace::{LeaseId, Revision};
pub use registration::{Registration, RegistrationBuilder, RegistrationState};
pub use registry::{Registry, RegistryBuilder};
pub use resolver::{Resolver, ResolverBuilder, ResolverState, ResolverStatus};
pub use server::ServeRegistered;
#[cfg(feature = "tls")]
#[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
pub use transport::tls::TlsConfig;
