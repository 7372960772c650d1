//! What a call carries besides its headers.

use crate::address::Address;

/// A request extension: whether this call waits for an endpoint where it would fail at once, whatever the channel's default.
///
/// The deadline still holds; without one, the call may wait for ever.
///
/// ```
/// use tonic_balance::WaitForReady;
///
/// let mut request = tonic::Request::new("world");
/// request.extensions_mut().insert(WaitForReady::new(true));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitForReady(pub(super) bool);

impl WaitForReady {
    /// Waits, or does not.
    #[must_use]
    pub const fn new(wait: bool) -> Self {
        Self(wait)
    }
}

/// A response extension: the endpoint that has served the call.
///
/// ```
/// use tonic_balance::ServedBy;
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
    /// The endpoint's address.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.0
    }
}
