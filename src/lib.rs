//! The way a Rust gRPC service finds its peers through etcd, and is found by them.
//!
//! A server is registered while it serves: [`ServeRegistered`] binds, serves, keeps a key under a lease, and takes it away before it
//! stops. A client follows the keys of a service with a [`Resolver`], which feeds a `tonic::transport::Channel` balanced over the
//! servers there are. Neither stops working because etcd does.
//!
//! # A client
//!
//! ```no_run
//! use tonic_etcd::Registry;
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let registry = Registry::connect(["127.0.0.1:2379"]).await?;
//! let channel = registry.resolver("helloworld.Greeter").into_tonic_channel();
//! // Any client that tonic has generated takes it:
//! // let mut client = GreeterClient::new(channel);
//! # drop(channel);
//! # Ok(())
//! # }
//! ```
//!
//! # A server
//!
//! ```no_run
//! use tonic_etcd::{Registry, ServeRegistered};
//!
//! # async fn run(router: tonic::transport::server::Router) -> Result<(), Box<dyn std::error::Error>> {
//! let registry = Registry::connect(["127.0.0.1:2379"]).await?;
//! let registration = registry.registration("helloworld.Greeter");
//! // let router = Server::builder().add_service(GreeterServer::new(greeter));
//! router.serve_registered("0.0.0.0:50051".parse()?, registration).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # How it works
//!
//! ```text
//!  server process                     etcd (1..n members)                   client process
//! ┌─────────────────────────┐                                      ┌──────────────────────────────────────┐
//! │ tonic Router            │   grant, put, renew                  │ Resolver: list → watch → resume      │
//! │   .serve_registered()   │ ─────────────▶  /gRPC/<service>/     │   │   the set of Instances           │
//! │                         │                   <instance id>      │   ▼                                  │
//! │ Registration            │ ◀─────────────        │              │ Stream of Change<Address, Instance>  │
//! │   a key under a lease   │   watch, its own key  │    watch     │   ▼                                  │
//! └─────────────────────────┘                       └────────────▶ │ tonic::transport::Channel            │
//!              ▲                                                   │   ▼                                  │
//!              └────────────────────  calls, HTTP/2  ───────────── │ GreeterClient                        │
//!                                                                  └──────────────────────────────────────┘
//! ```
//!
//! The key is `<prefix><service>/<instance id>`, the value one of [`Format`]. A [`Registration`] renews its lease at a third of the TTL,
//! and watches and reads its own key, since a renewed lease is no proof that the key is there. A [`Resolver`] that loses its watch
//! checks whether the store is still the one it knows, and resumes or lists again. Calls never go through etcd.
//!
//! # What happens when
//!
//! Times are for the default TTL of 15 s ([`RegistrationBuilder::ttl`]).
//!
//! | When | What the library does | How soon |
//! |---|---|---|
//! | etcd is down | Clients keep the last set and say [`Stale`](ResolverState::Stale); servers serve on and retry. | With etcd back: watching within about 5 s, renewed within about 3 s. |
//! | etcd is wiped | Servers register again. Clients follow the store, and until then their set is smaller or empty. | About 8 s at most; clients about 5 s. |
//! | One of several members is dead or frozen | What fails there moves on to the next. | Dead: at once. Frozen: 2 s for a request, 8 s for a watch. |
//! | The watch was compacted away | Lists again and hands on the differences only. | 0.1 s |
//! | Lease lost, key deleted | The server puts its key back. | At once, or at the next renewal (5 s); after an outage up to 5 s more, at random. |
//! | Key taken by another server | It is left alone ([`Superseded`](RegistrationState::Superseded)), and claimed again when it disappears. | At once |
//! | A server is killed | Its key goes with its lease. Until then its share of the calls fails with `UNAVAILABLE`. | 10 to 15 s, and about 1 s of etcd's own |
//! | A server is told to stop | Deregisters, accepts on for a [grace period](RegistrationBuilder::grace_period), closes the listener, [drains](RegistrationBuilder::drain_timeout), cuts what is left. | At once (up to 5 s without etcd), 1 s, up to 20 s |
//! | Nothing is registered | A call on tonic's channel waits until something is, past its own deadline: put `tokio::time::timeout` around it. | No bound |
//! | All servers are down but registered | Calls fail with `UNAVAILABLE`. | At once if refused, else after 10 s |
//! | A value cannot be read | It is skipped, [counted](ResolverStatus::rejected_values) and logged; the key's last good value stays. | - |
//! | Wrong password | [`ConnectError::Credentials`] | At once |
//! | The token expires | A fresh one is fetched, and what was refused is repeated. | At once |
//!
//! # Features
//!
//! - none by default: all of the above over plaintext;
//! - `tls`: TLS to etcd, with rustls;
//! - `testing`: a real etcd for tests, in the module `testing` (Unix only).
//!
//! # Requirements
//!
//! Rust 1.88 or later, and tonic 0.14. Building needs `protoc` with protobuf's include files, for `etcd-client`. etcd 3.4 or later.
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
