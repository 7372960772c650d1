//! The gRPC service [channelz](https://github.com/grpc/proposal/blob/master/A14-channelz.md) for the channels of `tonic-balance` and
//! `tonic-etcd`: `grpcdebug` and other tools list the channels of a process, their endpoints and their connections.
//!
//! Add the channels to a [`Channelz`], and add its service to a tonic server. The service shows addresses and error texts, so serve it only
//! where operators can reach it.
//!
//! ```
//! use tonic_balance::BalancedChannel;
//! use tonic_balance_channelz::Channelz;
//!
//! # async fn run() {
//! let channel = BalancedChannel::builder().addresses(["10.0.0.5:50051"]).connect_lazy();
//! let channelz = Channelz::new();
//! channelz.add("etcd:///greeter", channel.clone());
//! let service = channelz.service();
//! // tonic::transport::Server::builder().add_service(service)
//! # }
//! ```
//!
//! | channelz | Here |
//! |---|---|
//! | channel | a [`BalancedChannel`](tonic_balance::BalancedChannel). Its counters are the sums over its endpoints. |
//! | subchannel | an endpoint. Its trace has one event, the last error, if there is one. |
//! | socket | an open connection of an endpoint, with the remote address |
//! | server | none: the service describes clients only |

mod channels;
mod service;

pub use channels::Channelz;
/// The service to add to a server: a [`Channelz`] with the encoding of gRPC.
pub use proto::channelz_server::ChannelzServer;

#[allow(
    missing_docs,
    unused_qualifications,
    unnameable_types,
    unreachable_pub,
    clippy::pedantic,
    clippy::exhaustive_structs,
    clippy::exhaustive_enums,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
mod proto {
    tonic::include_proto!("grpc.channelz.v1");
}
