//! HTTP/2 connections, directly over the `h2` crate: one task drives each connection, and calls send and read in their caller's task.
//!
//! Nothing here knows of endpoints' states, of picking or of retrying; it says what happened, and whether a peer can have seen it.

mod activity;
pub(crate) mod connect;
pub(crate) mod connection_task;
pub(crate) mod deadline;
pub(crate) mod exchange;
mod frames;
pub(crate) mod h2_error;
pub(crate) mod health;
pub(crate) mod http2;
mod pinger;
pub(crate) mod pings;
pub(crate) mod request_body;
pub(crate) mod response_body;
#[cfg(feature = "tls")]
pub(crate) mod tls;

#[cfg(test)]
mod tests;
