//! The way a Rust gRPC service finds its peers through etcd, and is found by them.
//!
//! A server is registered while it serves: [`ServeRegistered`] binds, serves, keeps a key under a lease, and takes it away before it
//! stops. A client gets a [`BalancedChannel`] from [`Registry::channel`]: it follows the keys of a service and sends calls to servers that
//! are registered *and answer*. Neither stops working because etcd does.
//!
//! # A client
//!
//! ```no_run
//! use tonic_etcd::Registry;
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let registry = Registry::connect(["127.0.0.1:2379"]).await?;
//! let channel = registry.channel("helloworld.Greeter").connect().await?;
//! // Any client that tonic has generated takes it:
//! // let mut client = GreeterClient::new(channel);
//! # drop(channel);
//! # Ok(())
//! # }
//! ```
//!
//! [`connect`](ChannelBuilder::connect) waits for the first server that answers, and fails if there is none;
//! [`connect_lazy`](ChannelBuilder::connect_lazy) does not wait. [`BalancedChannel::builder`] makes a channel without etcd, from addresses
//! or any stream of changes. Where a function wants a `tonic::transport::Channel` by name,
//! [`into_tonic_channel`](Resolver::into_tonic_channel) feeds tonic's, with the limits that it names.
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
//! └─────────────────────────┘                       └────────────▶ │ BalancedChannel: dial, pick, send    │
//!              ▲                                                   │   ▼                                  │
//!              └────────────────────  calls, HTTP/2  ───────────── │ GreeterClient                        │
//!                                                                  └──────────────────────────────────────┘
//! ```
//!
//! The key is `<prefix><service>/<instance id>`, the value JSON, unless a [`Format`] says otherwise. A [`Registration`] renews its lease at a third of the TTL,
//! and watches and reads its own key, since a renewed lease is no proof that the key is there. A [`Resolver`] that loses its watch
//! checks whether the store is still the one it knows, and resumes or lists again. A [`BalancedChannel`] keeps a connection to every
//! server and picks, by its [`LbPolicy`], among those whose peer has answered on HTTP/2. Calls never go through etcd.
//!
#![doc = include_str!("../docs/behaviour.md")]
//!
#![doc = include_str!("../docs/errors.md")]
//!
//! # Fleets that already use etcd
//!
//! [`Format`] has the keys and values of the registries in use: etcd's own for grpc-go, go-zero, kratos, kitex, go-micro, rpcx, dubbo-go and
//! others, for reading and for writing. [`coming_from_go`] shows the same lines in Go and here, and how to move over.
//!
//! # Features
//!
//! - none by default: all of the above over plaintext;
//! - `tls`: TLS to etcd and to servers, with rustls;
//! - `health`: the gRPC health service of a registered server, `RegistrationBuilder::health`;
//! - `testing`: a real etcd for tests, in the module `testing` (Unix only).
//!
//! # Requirements
//!
//! Rust 1.88 or later, and tonic 0.14. Building needs `protoc` with protobuf's include files, for `etcd-client`. etcd 3.4 or later.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[doc = include_str!("../docs/coming-from-go.md")]
pub mod coming_from_go {}
mod backoff;
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

pub use error::{EtcdError, EtcdErrorKind, RegisterError, RegistryError, ServeError};
pub use format::{Format, FormatError, InstanceFormat};
pub use instance::{Instance, KeyLocation};
pub use keyspace::{LeaseId, Revision};
pub use registration::{Registration, RegistrationBuilder, RegistrationState, ServerState};
pub use registry::{Registry, RegistryBuilder, connect};
pub use resolver::{Resolver, ResolverBuilder, ResolverFeedback, ResolverState, ResolverStatus};
pub use server::ServeRegistered;
#[cfg(feature = "__bench")]
#[doc(hidden)]
pub use tonic_balance::__bench;
#[cfg(feature = "tls")]
#[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
pub use tonic_balance::TlsConfig;
pub use tonic_balance::{
    Address, AddressError, AddressPolicy, Attributes, BalancedChannel, CallError, ChannelBuilder,
    ChannelError, EndpointSource, EndpointState, EndpointStatus, HedgingPolicy, IpNet, LbPolicy,
    OutlierDetection, ResponseBody, ResponseFuture, RetryBudget, RetryPolicy, Routing, ServedBy,
    WaitForReady,
};
