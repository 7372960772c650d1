//! The etcd client of this crate. Outside this module, only `Registry::from_client` names the crate `etcd_client`.
//!
//! The module sends requests over channels that are balanced over all members. A member that is down, or that has stopped responding, gets
//! no requests while another member is available. Some failures do not show on the connection, for example the loss of the leader.
//! [`member_health`] records failed requests and streams, so that later requests avoid the failing member.

mod auth;
mod cluster;
mod cluster_id;
mod concurrency_limit;
mod connect;
mod decode;
mod endpoint;
mod error;
mod key_watch;
mod kv;
mod lease;
mod limits;
mod member_health;
mod members;
mod metrics;
mod reconcile;
mod reconcile_batch;
mod request_channel;
mod retry;
mod rpc;
mod token_cell;
mod token_exchange;
mod watch;
mod watch_stream;

pub(crate) use cluster::Etcd;
pub(crate) use connect::Config;
pub(crate) use key_watch::{KeyWatch, News};
pub(crate) use limits::DEADLINE;
pub(crate) use token_cell::Credentials;
pub(crate) use watch::Watch;

#[cfg(test)]
mod tests;
