//! The channel.

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::Service;

#[cfg(doc)]
use super::ChannelBuilder;
use super::ChannelError;
use crate::address::Address;
use crate::balance::EndpointStatus;
use crate::call::{self, Core, ResponseBody, ResponseFuture, Routing};

/// A gRPC channel that is balanced over the instances of a service that are registered *and answer*.
///
/// It goes wherever tonic's own channel goes: into a generated client, under an interceptor, into a tower stack. Cloning is a reference
/// count, and all clones share the connections. A task keeps the connections, whether calls run or not; it ends with the last clone, and
/// calls in flight finish.
///
/// What happens to a call:
///
/// | situation | outcome |
/// |---|---|
/// | endpoints are ready | one is chosen by the [`LbPolicy`](crate::LbPolicy), by its weight and by how it answers |
/// | an endpoint is down, or accepts and says nothing | it is not chosen; the others serve |
/// | the call was sent but certainly not processed (a server that shuts down) | it goes to another endpoint by itself |
/// | the connection breaks in the middle of a call | `UNAVAILABLE`: the call may have been processed. A [`RetryPolicy`](crate::RetryPolicy) sends it again |
/// | connections are being made | the call waits for the first |
/// | nothing is registered, or no endpoint can be reached | `UNAVAILABLE` at once, with the numbers and the last cause |
/// | the registry has not answered yet | the call waits, up to a bound from the channel's start |
/// | every stream of every connection is in use | the call waits for a free one |
/// | the deadline passes, wherever the call is | `DEADLINE_EXCEEDED` |
///
/// A request with the extension [`WaitForReady`](crate::WaitForReady) waits where it would fail at once. Each response carries a [`ServedBy`](crate::ServedBy) in its extensions.
///
/// ```no_run
/// use tonic_balance::BalancedChannel;
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let channel = BalancedChannel::builder().addresses(["10.0.0.5:50051", "10.0.0.6:50051"]).connect().await?;
/// for endpoint in channel.endpoints() {
///     println!("{} is {:?}", endpoint.address, endpoint.state);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct BalancedChannel(pub(super) Arc<Core>);

impl BalancedChannel {
    /// Every endpoint as it is now, sorted by address.
    #[must_use]
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        self.0.shared().endpoints()
    }

    /// Waits until an endpoint is ready.
    ///
    /// # Errors
    ///
    /// If there is none and a call would not wait for one either: nothing is registered, no endpoint can be reached, or the registry has
    /// not answered within the startup timeout.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn ready(&self) -> Result<(), ChannelError> {
        let outcome = call::ready(&self.0).await;
        outcome.map_err(|reason| ChannelError::Unready {
            service: self.0.service.clone(),
            reason,
        })
    }

    /// Makes a call with routing of its own.
    pub fn call_routed(&self, routing: &Routing, request: Request<Body>) -> ResponseFuture {
        ResponseFuture::by(Arc::clone(&self.0), request, routing.clone())
    }

    /// Replaces the connection that a routed call was sent on by a new one to the same endpoint.
    ///
    /// Calls that are open on it continue. No later routed call is sent on it.
    pub fn reconnect(&self, routing: &Routing) {
        if let Some(connection) = routing.connection() {
            self.0.shared().give_up(&connection);
        }
    }

    /// Returns whether the channel can make no more calls because its runtime has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.shared().has_ended()
    }

    /// Returns the endpoint whose connection failed last.
    #[must_use]
    pub fn last_failed_endpoint(&self) -> Option<Address> {
        let summary = self.0.shared().summary();
        summary.last_error.map(|error| error.address.clone())
    }
}

impl Service<Request<Body>> for BalancedChannel {
    type Response = Response<ResponseBody>;
    type Error = Status;
    type Future = ResponseFuture;

    /// Always ready: a call waits for its endpoint itself, so that its deadline holds while it does.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> ResponseFuture {
        ResponseFuture::new(Arc::clone(&self.0), request)
    }
}

impl fmt::Debug for BalancedChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalancedChannel")
            .field("service", &self.0.service)
            .field("summary", &self.0.shared().summary())
            .finish_non_exhaustive()
    }
}

/// Generated clients are held across awaits and shared between tasks.
const _: () = {
    const fn assert<T: Send + Sync + 'static>() {}
    const fn assert_send<T: Send + 'static>() {}
    assert::<BalancedChannel>();
    assert_send::<ResponseFuture>();
    assert_send::<ResponseBody>();
};
