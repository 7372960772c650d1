//! The etcd client of this crate. Outside this module, `etcd_client` is named only by `Registry::from_client`.
//!
//! The module uses channels that are balanced over all members. A member that is down gets no requests, and a member that does not respond
//! gets no further requests. For failures that a connection does not show, [`member_health`] keeps a record: later requests avoid a member
//! that failed a request or a stream.

mod auth;
mod cluster;
mod connect;
mod decode;
mod endpoint;
mod error;
mod kv;
mod lease;
mod limits;
mod member_health;
mod members;
mod request_channel;
mod retry;
mod rpc;
mod token_cell;
mod token_exchange;
mod watch;
mod watch_stream;

pub(crate) use cluster::Etcd;
pub(crate) use connect::Config;
pub(crate) use limits::DEADLINE;
pub(crate) use token_cell::{Credentials, Token};
pub(crate) use watch::Watch;

#[cfg(test)]
mod tests;
