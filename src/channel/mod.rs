//! Channels: where the resolver's instances meet connections.

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::uri::{Authority, Scheme};
use http::{HeaderValue, Request, Response, Uri};
use tonic::Status;
use tonic::body::Body;
use tower::Service;

use crate::balance::{Balancer, EndpointStatus, Shared};
use crate::transport::incoming::Incoming;

mod answer;
#[cfg(feature = "__bench")]
pub mod bench;
mod body;
mod builder;
mod call;
mod error;
mod extension;
mod head;
mod headers;
mod keep_alive;
mod resolved;
mod retry;
mod route;
mod sources;
mod status;
mod stock;
mod target;

pub use body::ResponseBody;
pub use builder::ChannelBuilder;
pub use call::ResponseFuture;
pub use error::ChannelError;
pub use extension::{ServedBy, WaitForReady};
pub use retry::{HedgingPolicy, RetryBudget, RetryPolicy};
pub use status::CallError;

pub(crate) use route::Route;
pub(crate) use target::{Place, Target};

use call::{Call, Kept};
use retry::Retries;

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
/// | endpoints are ready | one is chosen by the [`Policy`](crate::Policy), by its weight and by how it answers |
/// | an endpoint is down, or accepts and says nothing | it is not chosen; the others serve |
/// | the call was sent but certainly not processed (a server that shuts down) | it goes to another endpoint by itself |
/// | the connection breaks in the middle of a call | `UNAVAILABLE`: the call may have been processed. A [`RetryPolicy`] sends it again |
/// | connections are being made | the call waits for the first |
/// | nothing is registered, or no endpoint can be reached | `UNAVAILABLE` at once, with the numbers and the last cause |
/// | the registry has not answered yet | the call waits, up to a bound from the channel's start |
/// | every stream of every connection is in use | the call waits for a free one |
/// | the deadline passes, wherever the call is | `DEADLINE_EXCEEDED` |
///
/// A request with the extension [`WaitForReady`] waits where it would fail at once. Each response carries a [`ServedBy`] in its extensions.
///
/// ```no_run
/// use tonic_etcd::BalancedChannel;
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let channel = BalancedChannel::connect("etcd://127.0.0.1:2379/helloworld.Greeter").await?;
/// for endpoint in channel.endpoints() {
///     println!("{} is {:?}", endpoint.address, endpoint.state);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct BalancedChannel(Arc<Core>);

impl BalancedChannel {
    /// Connects to a service by its URL, `etcd://host:port[,host:port…]/service`, and waits for its first endpoint.
    ///
    /// The service is looked for under the default prefix, `/gRPC/`. For another prefix, a user or TLS, see
    /// [`Registry::builder`](crate::Registry::builder) and [`Registry::channel`](crate::Registry::channel).
    ///
    /// It takes go-zero's forms as well, for services that go-zero has registered: `discov://host:port/key` and
    /// `etcd:///host:port?key=key`. go-zero also writes `etcd://` for the former; that is read as the form of this library, since nothing
    /// tells them apart. For grpc-go's `etcd:///service`, which names no members, see [`Registry::channel_to`](crate::Registry::channel_to).
    ///
    /// # Errors
    ///
    /// As [`Registry::connect`](crate::Registry::connect) and [`ChannelBuilder::connect`], and if the URL is of none of these forms, or
    /// could be of two.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes what it has opened.
    pub async fn connect(target: impl AsRef<str>) -> Result<Self, ChannelError> {
        let Target { members, place } = Target::with_members(target.as_ref())?;
        let registry = crate::Registry::connect(members).await?;
        registry.channel_at(place).connect().await
    }

    /// Describes a channel over endpoints that come from anywhere.
    pub fn builder() -> ChannelBuilder {
        ChannelBuilder::new(())
    }

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
    /// not answered within the start-up bound.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn ready(&self) -> Result<(), ChannelError> {
        let outcome = retry::ready(&self.0).await;
        outcome.map_err(|reason| ChannelError::Unready {
            service: self.0.service.clone(),
            reason,
        })
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

/// What all clones of a channel, and its calls, share.
struct Core {
    balancer: Balancer,
    /// For messages.
    service: String,
    user_agent: HeaderValue,
    scheme: Scheme,
    /// In place of an endpoint's own.
    authority: Option<Authority>,
    /// The deadline of a call that names none, and the header that says so.
    timeout: Option<(Duration, HeaderValue)>,
    wait_for_ready: bool,
    start_up_bound: Duration,
    /// Why a call fails when the start-up bound has passed and no set of endpoints is known.
    unknown: &'static str,
    /// Whether the channel's tasks share one thread with its callers, and so do not run while the callers do not wait.
    is_single_threaded: bool,
    /// None without a policy, which is then all that it costs.
    retries: Option<Box<Retries>>,
    /// What ails the source of endpoints, if anything.
    trouble: Option<Box<dyn Fn() -> Option<String> + Send + Sync>>,
}

impl Core {
    fn shared(&self) -> &Arc<Shared> {
        self.balancer.shared()
    }

    /// Where a call to an endpoint is addressed to. A request with an authority of its own keeps it unless the channel has one.
    fn uri(&self, request: &Uri, endpoint: &Authority) -> Option<Uri> {
        let authority = self.authority.as_ref().or(request.authority());
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(authority.unwrap_or(endpoint).clone());
        parts.path_and_query = request.path_and_query().cloned();
        Uri::from_parts(parts).ok()
    }

    /// The policy by which a call is retried.
    fn retry(&self, call: &Call) -> Option<&RetryPolicy> {
        self.retries.as_ref()?.retry(call.path())
    }

    /// The policy by which a call is hedged.
    fn hedging(&self, call: &Call) -> Option<&HedgingPolicy> {
        self.retries.as_ref()?.hedging(call.path())
    }

    /// Whether a response is the caller's as it is; else a policy has a say in it, or the rest of it is to be waited for.
    fn is_final(
        &self,
        call: &Call,
        kept: &Kept,
        response: &mut Response<Incoming>,
        cx: &mut Context<'_>,
    ) -> bool {
        if self.retries.is_none() || self.retry(call).is_none() {
            return true;
        }
        if head::failure(response).is_some() {
            return false;
        }
        let response = response.body_mut();
        kept.is_pumped() || (response.poll_ahead(cx).is_ready() && !response.is_broken())
    }

    /// A call went well.
    fn on_success(&self) {
        if let Some(retries) = &self.retries {
            retries.on_success();
        }
    }

    fn trouble(&self) -> Option<String> {
        self.trouble.as_ref().and_then(|trouble| trouble())
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

#[cfg(all(test, feature = "helloworld"))]
mod tests;
