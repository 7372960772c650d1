//! Service discovery for gRPC services in Rust through etcd: registration of servers, and balanced channels for clients.
//!
//! A server is registered while it serves: [`ServeRegistered`] binds the address, serves, keeps a key under a lease, and deletes the key
//! before the server stops. A client gets a [`BalancedChannel`] from [`Registry::channel`]. The channel watches the keys of a service and
//! sends calls to servers that are registered *and respond*. Servers and clients continue to work while etcd is unavailable.
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
//! [`connect`](channel::ChannelBuilder::connect) waits for the first server that responds, and fails if none does.
//! [`connect_lazy`](channel::ChannelBuilder::connect_lazy) does not wait. [`BalancedChannel::builder`] creates a channel without etcd, from
//! addresses or from any stream of changes. For a function that requires a `tonic::transport::Channel`,
//! [`into_tonic_channel`](Resolver::into_tonic_channel) creates tonic's own channel from a resolver. Its documentation lists the limits of
//! that channel.
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
//! The key is `<prefix><service>/<instance id>` and the value is JSON, unless a [`Format`] defines other keys and values. A
//! [`Registration`] renews its lease every third of the TTL. It also watches and reads its own key, because a renewed lease does not prove
//! that the key exists. A [`Resolver`] that loses its watch checks whether the store is still the same, and then resumes the watch or lists
//! the keys again. A [`BalancedChannel`] keeps a connection to every server. Its [`LbPolicy`] picks among the connections on which the peer
//! has responded over HTTP/2. Calls never pass through etcd.
//!
//! [`guide::behaviour`] describes what happens in each failure. [`guide::errors`] describes what each error means, and what to do.
//!
//! # Fleets that already use etcd
//!
//! [`Format`] reads and writes the keys and values of existing registries: the format of etcd's own naming package, which grpc-go uses, and
//! those of go-zero, kratos, kitex, go-micro, rpcx, dubbo-go and others. [`guide::coming_from_go`] compares the code in Go with the code
//! for this library, and describes a migration.
//!
//! # Features
//!
//! No feature is enabled by default. Without features, everything above works, but only over plaintext connections.
//!
//! - `tls`: TLS to etcd and to servers, with rustls;
//! - `health`: the gRPC health service of a registered server, `RegistrationBuilder::health`;
//! - `orca`: the load reports of a server, in the module `orca`;
//! - `serde`: the status of a channel as JSON;
//! - `dns-srv`: endpoints from SRV records in the DNS, `channel::DnsSrv`;
//! - `testing`: a real etcd for tests, in the module `testing` (Unix only).
//!
//! # Requirements
//!
//! Rust 1.88 or later, tonic 0.14, and etcd 3.4 or later. The build requires `protoc` with protobuf's include files, for `etcd-client`.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backoff;
/// The options and the states of a [`BalancedChannel`], and the sources of its endpoints. [`LbPolicy`] and [`RetryPolicy`] are at the root
/// of the crate.
pub mod channel {
    #[doc(inline)]
    pub use crate::registry::channel_status::{BalancedChannelExt, ChannelStatus, EndpointReport};
    #[cfg(feature = "dns-srv")]
    pub use tonic_balance::channel::DnsSrv;
    pub use tonic_balance::channel::{
        Addresses, Attributes, ChannelBuilder, Discover, Dns, EjectionReason, EndpointSource,
        EndpointState, EndpointStatus, Endpoints, FailurePercentageEjection, HashKey,
        HedgingPolicy, LoadReport, LoadReports, OutlierDetection, PeerIndex, PickInfo, PickPolicy,
        ReadyEndpoint, ReadyEndpoints, ResponseBody, ResponseFuture, RetryBudget, Routing, Select,
        ServedBy, ServiceConfig, ServiceConfigMode, SourceContext, SuccessRateEjection,
        TrafficSplit, WaitForReady,
    };
}
pub use tonic_balance::deadline;
pub mod error;
mod etcd;
pub mod format;
pub mod guide;
pub mod instance;
mod keyspace;
pub mod limit;
pub mod metrics;
pub mod registration;
pub mod registry;
pub mod resolver;
mod server;
mod slots;
#[cfg(all(feature = "testing", unix))]
#[cfg_attr(docsrs, doc(cfg(feature = "testing")))]
pub mod testing;

#[doc(inline)]
pub use format::Format;
#[doc(inline)]
pub use instance::Instance;
#[doc(inline)]
pub use registration::Registration;
#[doc(inline)]
pub use registry::{Registry, connect};
#[doc(inline)]
pub use resolver::Resolver;
pub use server::ServeRegistered;
#[cfg(feature = "__bench")]
#[doc(hidden)]
pub use tonic_balance::__bench;
#[cfg(feature = "tls")]
#[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
pub use tonic_balance::TlsConfig;
#[cfg(feature = "orca")]
#[cfg_attr(docsrs, doc(cfg(feature = "orca")))]
pub use tonic_balance::orca;
pub use tonic_balance::traces;
pub use tonic_balance::{Address, AddressPolicy, BalancedChannel, IpNet, LbPolicy, RetryPolicy};
