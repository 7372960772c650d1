//! Errors of connecting a channel.

use tonic::Status;

/// The reason why a channel could not be connected.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// An option or an address cannot be used. No connection was made.
    #[error("channel for {service:?} is not valid: {reason}")]
    #[non_exhaustive]
    InvalidOption {
        /// The service.
        service: String,
        /// The option or the address, and what is wrong with it.
        reason: String,
    },
    /// No endpoint of the service is ready.
    #[error("no endpoint of {service:?} is ready: {}", reason.message())]
    #[non_exhaustive]
    Unready {
        /// The service.
        service: String,
        /// The status that a call would fail with: how many endpoints are known, and the last failure.
        #[source]
        reason: Status,
    },
}
