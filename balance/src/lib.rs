//! A client-side balanced gRPC channel for [tonic](https://docs.rs/tonic).
//!
//! A [`BalancedChannel`] connects to every endpoint that its [source](channel::EndpointSource) reports. It sends each call to an endpoint
//! that is connected *and responds*. The channel can replace tonic's own channel: in a generated client, under an interceptor, or in a
//! tower stack.
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
//! The endpoints are given as a list of [addresses](channel::ChannelBuilder::addresses), a [stream of
//! `tower::discover::Change`](channel::ChannelBuilder::discover), or an [`EndpointSource`](channel::EndpointSource). The crate `tonic-etcd`
//! provides a source over etcd.
//!
//! # Features
//!
//! No feature is enabled by default.
//!
//! - `orca`: the load reports of a server, in the module `orca`. Channels read load reports without this feature.
//! - `service-config`: parses gRPC's service config from JSON, for `ChannelBuilder::service_config`.
//! - `serde`: the status of an endpoint as JSON;
//! - `dns-srv`: endpoints from SRV records in the DNS, `channel::DnsSrv`.
//! - `tls`: TLS to endpoints, with rustls.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod address;
mod attributes;
mod balance;
mod call;
mod causes;
pub mod channel;
pub mod deadline;
mod load_report;
pub mod metrics;
#[cfg(feature = "orca")]
#[cfg_attr(docsrs, doc(cfg(feature = "orca")))]
pub mod orca;
mod service_config;
pub mod traces;
mod transport;

/// The errors of the channel. The text of each error contains all causes, so [`source`](std::error::Error::source) returns `None`. The
/// exception is [`CallError`](crate::error::CallError): its source is the error of the connection or stream, if any.
pub mod error {
    pub use crate::address::AddressError;
    pub use crate::call::CallError;
    pub use crate::channel::error::ChannelError;
    #[cfg(feature = "service-config")]
    #[cfg_attr(docsrs, doc(cfg(feature = "service-config")))]
    pub use crate::service_config::ServiceConfigError;
}

/// Items that `tonic-etcd` uses. They are not part of the public interface.
#[doc(hidden)]
pub mod __private {
    pub use crate::address::without_password;
    pub use crate::causes::causes;
    pub use crate::transport::deadline::{GRPC_TIMEOUT, format as format_timeout};
    #[cfg(feature = "tls")]
    pub use crate::transport::tls::check as check_tls;
}

pub use address::{Address, AddressPolicy};
pub use balance::LbPolicy;
pub use call::retry::RetryPolicy;
#[doc(inline)]
pub use channel::BalancedChannel;
#[cfg(feature = "__bench")]
#[doc(hidden)]
pub use channel::bench as __bench;
pub use ipnet::IpNet;
#[cfg(feature = "tls")]
#[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
pub use transport::tls::TlsConfig;
