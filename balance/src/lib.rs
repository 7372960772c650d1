//! A client-side balanced gRPC channel for [tonic](https://docs.rs/tonic).
//!
//! A [`BalancedChannel`] connects to every endpoint that its [source](EndpointSource) reports. It sends each call to an endpoint that is
//! connected *and responds*. The channel can replace tonic's own channel: in a generated client, under an interceptor, or in a tower stack.
//!
//! ```no_run
//! use tonic_balance::BalancedChannel;
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let channel = BalancedChannel::builder()
//!     .addresses(["10.0.0.5:50051", "10.0.0.6:50051"])
//!     .connect()
//!     .await?;
//! // Any client that tonic has generated takes it:
//! // let mut client = GreeterClient::new(channel);
//! # drop(channel);
//! # Ok(())
//! # }
//! ```
//!
//! The endpoints are given as a list of [addresses](ChannelBuilder::addresses), a [stream of
//! `tower::discover::Change`](ChannelBuilder::discover), or an [`EndpointSource`]. The crate `tonic-etcd` provides a source over etcd.
//!
//! # Features
//!
//! No feature is enabled by default.
//!
//! - `tls`: TLS to endpoints, with rustls.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod address;
mod attributes;
mod balance;
mod call;
mod channel;
pub mod error;
mod transport;

pub use address::{Address, AddressError, AddressPolicy};
pub use attributes::Attributes;
pub use balance::{
    EndpointState, EndpointStatus, FailurePercentageEjection, LbPolicy, OutlierDetection,
    SuccessRateEjection,
};
pub use call::retry::{HedgingPolicy, RetryBudget, RetryPolicy};
pub use call::{CallError, ResponseBody, ResponseFuture, Routing, ServedBy, WaitForReady};
#[cfg(feature = "__bench")]
#[doc(hidden)]
pub use channel::bench as __bench;
pub use channel::{
    Addresses, BalancedChannel, ChannelBuilder, ChannelError, Discover, EndpointSource, Endpoints,
};
pub use ipnet::IpNet;
pub use transport::deadline::{GRPC_TIMEOUT, format as format_timeout};
#[cfg(feature = "tls")]
#[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
pub use transport::tls::TlsConfig;
