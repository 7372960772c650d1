//! Extensions of requests and responses.

use crate::address::Address;

/// A request extension: sets whether the call waits for an endpoint if it would otherwise fail at once, for example because no endpoint can
/// be reached. It overrides the default of the channel.
///
/// The deadline of the call still applies. Without a deadline, the call may wait forever.
///
/// ```
/// use tonic_balance::channel::WaitForReady;
///
/// let mut request = tonic::Request::new("world");
/// request.extensions_mut().insert(WaitForReady::new(true));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitForReady(pub(super) bool);

impl WaitForReady {
    /// Creates the extension. With `true` the call waits for an endpoint. With `false` it fails at once if no endpoint is expected to
    /// become ready.
    #[must_use]
    pub const fn new(wait: bool) -> Self {
        Self(wait)
    }
}

/// A response extension: the endpoint that served the call.
///
/// ```
/// use tonic_balance::channel::ServedBy;
///
/// fn log<T>(response: &tonic::Response<T>) {
///     if let Some(served_by) = response.extensions().get::<ServedBy>() {
///         println!("served by {}", served_by.address());
///     }
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedBy(pub(super) Address);

impl ServedBy {
    /// Returns the endpoint's address.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.0
    }
}
