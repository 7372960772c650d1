//! HTTP/2 connections, directly on the `h2` crate. One task drives each connection. Calls send and read in the task of their caller.
//!
//! This module contains no endpoint states, picks or retries. It reports what happened on a connection, and whether a peer may have
//! processed a call.

mod activity;
pub(crate) mod connect;
pub(crate) mod connection_task;
pub(crate) mod deadline;
pub(crate) mod exchange;
mod frames;
pub(crate) mod h2_error;
pub(crate) mod health_client;
pub(crate) mod http2;
mod pinger;
pub(crate) mod request_body;
pub(crate) mod response_body;
mod sent_streams;
pub(crate) mod stall_detection;
#[cfg(feature = "tls")]
pub(crate) mod tls;
mod write_batch;

#[cfg(test)]
mod tests;
