//! The error of a channel that is invalid or not ready.

use tonic::Status;

/// The reason why a channel could not be connected.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// An option or an address is invalid. No connection was made.
    #[error("channel for {service:?} is not valid: {reason}")]
    #[non_exhaustive]
    InvalidOption {
        /// The service's name.
        service: String,
        /// The invalid option or address, and the reason.
        reason: String,
    },
    /// No endpoint of the service is ready.
    #[error("no endpoint of {service:?} is ready: {}", reason.message())]
    #[non_exhaustive]
    Unready {
        /// The service's name.
        service: String,
        /// The status that a call would fail with. It contains the number of known endpoints and the last failure.
        reason: Status,
    },
}
