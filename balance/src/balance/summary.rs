//! A summary of the state of all endpoints.

use std::sync::Arc;

use crate::address::Address;

/// A summary of the state of all endpoints, for error messages and for calls that wait.
#[derive(Clone, Debug, Default)]
pub(crate) struct Summary {
    /// Whether the set of endpoints is known, because the source has reported its first list.
    pub(crate) known: bool,
    pub(crate) endpoints: usize,
    pub(crate) ready: usize,
    /// Number of endpoints that are neither ready nor failing. They may become ready at any moment.
    pub(crate) pending: usize,
    /// Why the channel makes no calls any more, or why it never made one.
    pub(crate) ended: Option<Arc<str>>,
    /// The last error of the source of endpoints.
    pub(crate) source_error: Option<Arc<str>>,
    /// The last error of an endpoint: a failed attempt to connect, or a connection that was lost, does not answer or is not healthy.
    pub(crate) last_error: Option<Arc<EndpointError>>,
}

impl Summary {
    /// Returns whether the channel makes calls and knows endpoints.
    pub(crate) fn has_endpoints(&self) -> bool {
        self.ended.is_none() && self.known && self.endpoints > 0
    }
}

/// An error of an endpoint.
#[derive(Debug, thiserror::Error)]
#[error("endpoint {address}: {reason}")]
pub(crate) struct EndpointError {
    pub(crate) address: Address,
    /// The error with all its causes, in one line.
    pub(crate) reason: Arc<str>,
}
