//! Why a channel could not be connected.

use tonic::Status;

use crate::error::ConnectError;

/// Why a channel could not be connected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The URL is not of the form `etcd://host:port[,host:port…]/service`, nor of those of grpc-go and go-zero, or it could be of two.
    #[error("target {target:?} is not valid: {reason}; write etcd://host:port/service")]
    #[non_exhaustive]
    InvalidTarget {
        /// The URL as it was given.
        target: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An option or an address cannot be used. Nothing was dialled.
    #[error("channel for {service:?} is not valid: {reason}")]
    #[non_exhaustive]
    InvalidOption {
        /// The service.
        service: String,
        /// Which option, and what is wrong with it.
        reason: String,
    },
    /// etcd could not be reached, or refused.
    #[error("no connection to the registry: {0}")]
    Registry(#[from] ConnectError),
    /// No endpoint of the service is ready.
    #[error("no endpoint of {service:?} is ready: {}", reason.message())]
    #[non_exhaustive]
    Unready {
        /// The service.
        service: String,
        /// What a call would fail with: how many endpoints are known, and the last failure.
        #[source]
        reason: Status,
    },
}
