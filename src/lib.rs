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
//! server and picks, by its [`Policy`], among those whose peer has answered on HTTP/2. Calls never go through etcd.
//!
//! # What happens when
//!
//! Times are for the default TTL of 15 s ([`RegistrationBuilder::ttl`]). Calls are those on a [`BalancedChannel`]; of the rows about etcd
//! they notice nothing unless one says so.
//!
//! | When | What the library does | How soon |
//! |---|---|---|
//! | etcd is down | Clients keep the last set and say [`Stale`](ResolverState::Stale); servers serve on and retry. | With etcd back: watching within about 5 s, renewed within about 3 s. |
//! | etcd is wiped | Servers register again. Clients follow the store, and hold what they miss there as in the next row. | About 8 s at most; clients about 5 s. |
//! | Most instances vanish from etcd at once | Those beyond half of the set are [held](ResolverBuilder::mass_removal_hold): called while nothing else is ready, over the connections that are there. Who deregisters or pauses is not held. | Until half is back, or for 30 s |
//! | etcd loses events of a watch | A comparison with a list of the keys finds it. | [5 minutes](ResolverBuilder::reconcile_interval) at most |
//! | One of several members is dead or frozen | What fails there moves on to the next. | Dead: at once. Frozen: 2 s for a request, 8 s for a watch. |
//! | The watch was compacted away | Lists again and hands on the differences only. | 0.1 s |
//! | Lease lost, key deleted | The server puts its key back. | At once, or at the next renewal (5 s); after an outage up to 5 s more, at random. |
//! | Key taken by another server | It is left alone ([`Superseded`](RegistrationState::Superseded)), and claimed again when it disappears. | At once |
//! | A server is killed | Calls in flight on it fail with `UNAVAILABLE`, or are sent again where a [policy](RetryPolicy) says so; all others go elsewhere. It is dialled again, with a backoff of 1 s to [120 s](ChannelBuilder::max_backoff). | At once. Its key goes after 10 to 15 s, and about 1 s of etcd's own. |
//! | A server is told to stop | Deregisters, accepts on for a [grace period](RegistrationBuilder::grace_period), closes the listener, [drains](RegistrationBuilder::drain_timeout), cuts what is left. Calls in flight finish; one that was sent but certainly not processed goes to another server by itself. | At once (up to 5 s without etcd), 1 s, up to 20 s |
//! | A server refuses connections, or does not answer on HTTP/2 | It is never picked. | Noticed at once, or after [10 s](ChannelBuilder::connect_timeout). |
//! | A server's packets vanish | The connection is given up (on Linux), its calls fail with `UNAVAILABLE`; a call's [deadline](ChannelBuilder::timeout) may end it before. | About 30 s with calls open, 40 s without. |
//! | A server is frozen, but its machine answers | Calls on it end with their deadline; without one they wait, unless [pings](ChannelBuilder::http2_keep_alive) are on. | New ones go elsewhere when its key is gone. |
//! | Nothing is registered | `UNAVAILABLE`, naming the service and the counts, unless the call [waits](WaitForReady). | At once |
//! | All servers are down but registered | The same, with the last cause. | At once if refused; else up to 10 s during a first attempt, then at once. |
//! | etcd has not answered since the channel's start | Calls wait, then fail with `UNAVAILABLE`. | [10 s](ChannelBuilder::start_up_bound) |
//! | Every stream that the servers allow is in use | Calls wait for a free one; above [32 768](ChannelBuilder::max_waiters) they fail with `RESOURCE_EXHAUSTED`. One more connection is made to each such server. | The deadline is the bound. |
//! | A deadline passes, wherever the call is | `DEADLINE_EXCEEDED` | At the deadline |
//! | A value cannot be read | It is skipped, [counted](ResolverStatus::rejected_values) and logged; the key's last good value stays. | - |
//! | Wrong password | [`ConnectError::Credentials`] | At once |
//! | The token expires | A fresh one is fetched, and what was refused is repeated. | At once |
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
//! - `health`: the gRPC health service of a registered server, [`RegistrationBuilder::health`];
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
#[doc = include_str!("coming_from_go.md")]
pub mod coming_from_go {}
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
pub use balance::{EndpointState, EndpointStatus, OutlierDetection, Policy};
#[cfg(feature = "__bench")]
#[doc(hidden)]
pub use channel::bench as __bench;
pub use channel::{
    BalancedChannel, ChannelBuilder, ChannelError, HedgingPolicy, ResponseBody, ResponseFuture,
    RetryBudget, RetryPolicy, ServedBy, WaitForReady,
};
pub use error::{ConnectError, Endpoints, EtcdError, EtcdErrorKind, RegisterError, ServeError};
pub use format::{Format, FormatError, InstanceFormat};
pub use instance::Instance;
pub use ipnet::IpNet;
pub use keyspace::{LeaseId, Revision};
pub use registration::{Registration, RegistrationBuilder, RegistrationState, ServerState};
pub use registry::{Registry, RegistryBuilder};
pub use resolver::{Feedback, Resolver, ResolverBuilder, ResolverState, ResolverStatus};
pub use server::ServeRegistered;
#[cfg(feature = "tls")]
#[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
pub use transport::tls::TlsConfig;
