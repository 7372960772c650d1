//! The channel and its `tower::Service`.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::Service;

#[cfg(doc)]
use super::ChannelBuilder;
use super::{ChannelError, TrafficSplit};
use crate::address::Address;
use crate::balance::EndpointStatus;
use crate::call::{self, Core, ResponseBody, ResponseFuture, Routing};

/// A gRPC channel that balances the calls to a service over those of its endpoints that *respond*.
///
/// The channel can replace tonic's own channel: in a generated client, under an interceptor, or in a tower stack. A clone only increments a
/// reference count, and all clones share the connections. A background task maintains the connections, even while no calls run. The task
/// ends when the last clone is dropped. Calls in flight continue to their end.
///
/// The outcome of a call depends on the situation:
///
/// | situation | outcome |
/// |---|---|
/// | endpoints are ready | the [`LbPolicy`](crate::LbPolicy) picks an endpoint, by default by weight, latency and load |
/// | an endpoint is down, or accepts connections and sends nothing | the endpoint is not picked; the other endpoints serve the calls |
/// | the call was sent but certainly not processed, for example because the server shuts down | the call is sent to another endpoint |
/// | the connection is lost during a call | `UNAVAILABLE`: the call may have run. A [`RetryPolicy`](crate::RetryPolicy) can send it again |
/// | connections are being made | the call waits for the first connection |
/// | nothing is registered, or no endpoint can be reached | `UNAVAILABLE` at once, with the number of endpoints and the last cause |
/// | the source has not reported its endpoints yet | the call waits, at most until the startup timeout |
/// | every stream of every connection is in use | the call waits for a free stream |
/// | the deadline passes, in any state of the call | `DEADLINE_EXCEEDED` |
///
/// A request with the extension [`WaitForReady`](crate::channel::WaitForReady) waits instead of failing at once. Each response has a
/// [`ServedBy`](crate::channel::ServedBy) in its extensions.
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
    /// Returns the current status of every endpoint, sorted by address.
    #[must_use]
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        self.0.shared().endpoints()
    }

    /// Returns the handle of the source of the endpoints, if the source has a handle of type `H`. The handle of the resolver of
    /// `tonic-etcd` is a `ResolverHandle`, which returns the resolver's status and instances.
    #[must_use]
    pub fn source_handle<H: Any>(&self) -> Option<&H> {
        self.0.source_handle.as_ref()?.downcast_ref()
    }

    /// Waits until an endpoint is ready.
    ///
    /// # Errors
    ///
    /// Returns [`ChannelError::Unready`] in each case in which a call would also fail at once: nothing is registered, no endpoint can be
    /// reached, or the source has not reported its endpoints within the startup timeout. Returns the same error if no endpoint is ready
    /// after the startup timeout for any other reason.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect on the channel.
    pub async fn wait_until_ready(&self) -> Result<(), ChannelError> {
        let outcome = call::ready(&self.0).await;
        outcome.map_err(|reason| ChannelError::Unready {
            service: self.0.service.clone(),
            reason,
        })
    }

    /// Makes a call with a [`Routing`].
    pub fn call_routed(&self, routing: &Routing, request: Request<Body>) -> ResponseFuture {
        ResponseFuture::with_routing(Arc::clone(&self.0), request, routing.clone())
    }

    /// Replaces the connection that a routed call was sent on with a new connection to the same endpoint.
    ///
    /// Open calls on the old connection continue. Later routed calls are not sent on it.
    pub fn reconnect(&self, routing: &Routing) {
        if let Some(connection) = routing.connection() {
            self.0.shared().give_up(&connection);
        }
    }

    /// Replaces the [traffic split](TrafficSplit) of the program. A split without parts ends the split. No call fails because of the change.
    /// Calls use the new split as soon as the background task of the channel has applied it, usually within a millisecond.
    ///
    /// If the service config has a split as well, the [mode](crate::channel::ServiceConfigMode) decides which one applies. If the program has
    /// none, that of the service config applies.
    ///
    /// # Errors
    ///
    /// Returns [`ChannelError::InvalidOption`] if the split is not valid: two parts with the same labels, all weights 0, or more than 64
    /// parts. The previous split then stays.
    pub fn set_split(&self, split: TrafficSplit) -> Result<(), ChannelError> {
        if let Some(reason) = split.invalid_reason() {
            let service = self.0.service.clone();
            return Err(ChannelError::InvalidOption { service, reason });
        }
        self.0.shared().set_split(split);
        Ok(())
    }

    /// Returns whether the channel can make no more calls, because its runtime has ended, its background task has panicked, or the channel
    /// is [invalid](ChannelError::InvalidOption).
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.shared().has_ended()
    }

    /// Returns the endpoint of the most recent lost connection or failed attempt to connect.
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

    /// Always ready: the future of the call waits for an endpoint, so that the call's deadline covers the wait.
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

/// Generated clients are held across awaits and shared between tasks, so the channel must be `Send` and `Sync`, and the futures and bodies
/// of its calls must be `Send`.
const _: () = {
    const fn assert<T: Send + Sync + 'static>() {}
    const fn assert_send<T: Send + 'static>() {}
    assert::<BalancedChannel>();
    assert_send::<ResponseFuture>();
    assert_send::<ResponseBody>();
};
