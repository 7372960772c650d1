//! The options of a channel, and where its endpoints come from.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;
use http::{HeaderValue, Uri};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::RuntimeFlavor;
use tokio_stream::Stream;
use tower::discover::Change;

#[cfg(doc)]
use super::ChannelError;
use super::retry::Plans;
use super::{BalancedChannel, Core};
use crate::address::{Address, AddressPolicy};
use crate::balance::{self, Balancer, Feed, Options, OutlierDetection, Policy};
use crate::instance::Instance;
use crate::transport::connect::Connector;
use crate::transport::deadline;
use crate::transport::health::HealthCheck;
use crate::transport::http2::MAX_WINDOW;
use crate::transport::pings::BUSY_INTERVAL;
#[cfg(feature = "tls")]
use crate::transport::tls::{Tls, TlsConfig};

/// A [`BalancedChannel`] with options; made by [`Registry::channel`](crate::Registry::channel), where `S` is the service's
/// [`ResolverBuilder`](crate::ResolverBuilder), or by [`BalancedChannel::builder`].
#[derive(Debug)]
#[must_use = "there is no channel before it is connected or given endpoints"]
pub struct ChannelBuilder<S = ()> {
    pub(super) source: S,
    pub(super) service: Option<String>,
    pub(super) options: Options,
    pub(super) connector: Connector,
    user_agent: Option<HeaderValue>,
    origin: Option<Uri>,
    timeout: Option<Duration>,
    wait_for_ready: bool,
    start_up_bound: Duration,
    pub(super) plans: Plans,
    address_policy: Option<AddressPolicy>,
    health_check: Option<String>,
    pub(super) keep_alive_while_idle: bool,
    pub(super) keep_alive_permit_time: Duration,
    /// The first option or address that cannot be used, and why.
    pub(super) invalid: Option<String>,
}

impl<S> ChannelBuilder<S> {
    pub(super) fn new(source: S) -> Self {
        Self {
            source,
            service: None,
            options: Options::default(),
            connector: Connector::default(),
            user_agent: None,
            origin: None,
            timeout: None,
            wait_for_ready: false,
            start_up_bound: START_UP_BOUND,
            plans: Plans::default(),
            address_policy: None,
            health_check: None,
            keep_alive_while_idle: false,
            keep_alive_permit_time: BUSY_INTERVAL,
            invalid: None,
        }
    }

    /// How an endpoint is chosen. Default [`Policy::Latency`].
    pub fn policy(mut self, policy: Policy) -> Self {
        self.options.policy = policy;
        self
    }

    /// Takes endpoints that fail much more than the others out of use for a while. Off by default; that an endpoint does not answer any more
    /// is noticed in any case.
    pub fn outlier_detection(mut self, detection: OutlierDetection) -> Self {
        self.options.outlier_detection = Some(detection);
        self
    }

    /// Asks each endpoint for the health of a service, `grpc.health.v1.Health/Watch` as in gRFC A17, and calls it only while it says that it
    /// serves. The empty name asks for the server as a whole. Off by default: servers of this library leave the registry before they stop,
    /// and that an endpoint does not answer any more is noticed in any case. It is for servers that can be up and unable to serve.
    ///
    /// An endpoint is used once it has answered; within [`connect_timeout`](Self::connect_timeout) it has to. Calls that it is at work on
    /// when it says `NOT_SERVING` go on. An endpoint that has no health service counts as healthy, and, unlike in the gRFC, so does
    /// one whose health service does not know the name. Any other error counts as not healthy, and is followed by another try after a wait
    /// as for a connection. A watch that ends is begun again, at once unless it was short; until that has an answer the last one stands. Where all endpoints say that they do not
    /// serve, calls fail with `UNAVAILABLE`.
    ///
    /// It takes one stream of each connection; an endpoint that allows no more than one is not asked.
    ///
    /// ```no_run
    /// use tonic_etcd::BalancedChannel;
    ///
    /// # fn run() {
    /// let channel = BalancedChannel::builder()
    ///     .health_check("helloworld.Greeter")
    ///     .from_addresses(["10.0.0.5:50051", "10.0.0.6:50051"]);
    /// # }
    /// ```
    pub fn health_check(mut self, service: impl Into<String>) -> Self {
        self.health_check = Some(service.into());
        self
    }

    /// How long an endpoint that has just become ready takes to its full share: its weight grows from a tenth, as Envoy's slow start has it.
    /// Off by default: a new endpoint counts as no faster than the others, which keeps it from being flooded. For servers that are slow
    /// while they are cold.
    pub fn slow_start(mut self, window: Duration) -> Self {
        self.options.slow_start = (!window.is_zero()).then_some(window);
        self
    }

    /// The zone that the caller is in: endpoints that are registered with it are preferred while they can take its calls. No preference by
    /// default.
    ///
    /// How much they can take is judged by the weights of the endpoints that are ready, as if callers were spread evenly over the zones: a
    /// zone that has its part of all weights serves its callers alone; of a smaller one's, the rest goes to zones with room to spare, so
    /// that no endpoint gets more than its weight says. About one call in a thousand leaves the zone in any case.
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.options.zone = Some(zone.into().into());
        self
    }

    /// Makes the channel's choices repeatable. By default they are random.
    pub fn seed(mut self, seed: u64) -> Self {
        self.options.seed = Some(seed);
        self
    }

    /// The deadline of calls that name none. None by default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Whether calls wait for an endpoint where they would fail at once. Not by default; a call can say otherwise with
    /// [`WaitForReady`](crate::WaitForReady).
    pub fn wait_for_ready(mut self, wait: bool) -> Self {
        self.wait_for_ready = wait;
        self
    }

    /// How long after its start the channel waits for the registry's first answer. Later, calls fail at once until it has come. Default
    /// 10 s.
    pub fn start_up_bound(mut self, bound: Duration) -> Self {
        // A time to come has to fit into an `Instant`.
        self.start_up_bound = bound.min(balance::LONGEST);
        self
    }

    /// How many calls may wait at once for an endpoint or a free stream; further ones fail with `RESOURCE_EXHAUSTED`. Default 32 768.
    pub fn max_waiters(mut self, waiters: usize) -> Self {
        self.options.max_waiters = waiters;
        self
    }

    /// How many connections each endpoint gets. One more is made while every stream that an endpoint allows is in use. Default 1; 0 counts
    /// as 1. A client of few endpoints and many threads gains by more.
    pub fn connections_per_endpoint(mut self, connections: usize) -> Self {
        self.options.connections_per_endpoint = connections.max(1);
        self
    }

    /// How long a connection may take: TCP, TLS and the peer's first answer. Default 10 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connector.timeout = timeout;
        self
    }

    /// The longest wait between two attempts to connect to an endpoint. Default 120 s, as in gRPC's connection backoff document. A fresh
    /// registration ends the wait in any case.
    pub fn max_backoff(mut self, backoff: Duration) -> Self {
        self.options.max_backoff = backoff;
        self
    }

    /// Sets how many bytes a server may send ahead: on one response stream, and on a connection. Default 1 MiB per stream and
    /// 2^31 - 1 bytes, the HTTP/2 maximum, per connection; larger values are reduced to that. The stream windows already limit the memory.
    ///
    /// With a smaller connection window, unread responses stop every other call on the connection once they fill it: 64 streams of 1 MiB
    /// fill one of 64 MiB.
    pub fn windows(mut self, stream: u32, connection: u32) -> Self {
        self.connector.http2.stream_window = stream.min(MAX_WINDOW);
        self.connector.http2.connection_window = connection.min(MAX_WINDOW);
        self
    }

    /// Whether HTTP/2's limits against hostile servers are in force. Off by default: within a thousand calls that were cancelled they end
    /// the connection, and with it everybody's calls.
    pub fn abuse_limits(mut self, limits: bool) -> Self {
        self.connector.http2.abuse_limits = limits;
        self
    }

    /// Speaks TLS to the endpoints. Plaintext by default. Unless the addresses are given with
    /// [`from_addresses`](ChannelBuilder::from_addresses), the configuration has to fix the servers' name.
    #[cfg(feature = "tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn tls(mut self, tls: TlsConfig) -> Self {
        self.connector.tls = Some(Tls::new(tls));
        self
    }

    /// Makes connections with a function of your own: through a proxy, in memory. TLS, if configured, goes on top.
    ///
    /// ```no_run
    /// use tokio::net::TcpStream;
    /// use tonic_etcd::BalancedChannel;
    ///
    /// # fn run() {
    /// let channel = BalancedChannel::builder()
    ///     .connector(|address| async move { TcpStream::connect(("gateway", address.port())).await })
    ///     .from_addresses(["greeter:50051"]);
    /// # }
    /// ```
    pub fn connector<F, Fut, T>(mut self, connect: F) -> Self
    where
        F: Fn(Address) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = io::Result<T>> + Send + 'static,
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        self.connector.dial_with(connect);
        self
    }

    /// Sets the `user-agent` header; `tonic-etcd/` and the version are appended. If the text is not a valid header value, the channel is
    /// [invalid](ChannelError::InvalidOption).
    pub fn user_agent(mut self, user_agent: impl AsRef<str>) -> Self {
        let user_agent = user_agent.as_ref();
        match HeaderValue::from_str(user_agent) {
            Ok(value) => self.user_agent = Some(value),
            Err(_) => self.refuse(format!("no header can carry the user agent {user_agent:?}")),
        }
        self
    }

    /// Notes an option that cannot be used. The channel fails with the first of them when it is made, and so do its calls.
    pub(super) fn refuse(&mut self, reason: String) {
        self.invalid.get_or_insert(reason);
    }

    /// The scheme and authority that calls are addressed to. By default the endpoint's address, or TLS's server name.
    pub fn origin(mut self, origin: Uri) -> Self {
        self.origin = Some(origin);
        self
    }

    /// The service's name in messages and logs.
    pub fn service(mut self, service: impl Into<String>) -> Self {
        self.service = Some(service.into());
        self
    }

    /// Which addresses host names may resolve to. By default what the resolver may find, or else [`AddressPolicy::default`].
    pub fn address_policy(mut self, policy: AddressPolicy) -> Self {
        self.address_policy = Some(policy);
        self
    }

    pub(super) fn build<C, E>(
        self,
        changes: Feed<C>,
        trouble: Option<Box<dyn Fn() -> Option<String> + Send + Sync>>,
    ) -> BalancedChannel
    where
        C: Stream<Item = Result<Change<Address, Instance>, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let service = self.service.unwrap_or_else(|| "(unnamed)".to_owned());
        let unknown = if self.options.on_refused.is_some() {
            "the registry has not answered within the start-up bound"
        } else {
            "the source of endpoints has reported none within the start-up bound"
        };
        let mut connector = self.connector;
        if let Some(policy) = self.address_policy {
            connector.policy = policy;
        }
        // The name that was proven is the one that is called; a registry has no say in it.
        let mut scheme = if connector.is_tls() {
            Scheme::HTTPS
        } else {
            Scheme::HTTP
        };
        let name = connector.server_name();
        let mut authority = name.and_then(|name| name.parse().ok());
        if let Some(origin) = self.origin {
            let origin = origin.into_parts();
            scheme = origin.scheme.unwrap_or(scheme);
            authority = origin.authority.or(authority);
        }
        let user_agent = user_agent(self.user_agent);
        let has_keep_alive = connector.http2.keep_alive.is_some();
        let mut options = self.options;
        if let Some(service) = self.health_check {
            connector.http2.reserved_streams = 1;
            options.health_check = Some(HealthCheck {
                service,
                scheme: scheme.clone(),
                authority: authority.clone(),
                user_agent: user_agent.clone(),
            });
        }
        let balancer = Balancer::start(&service, changes, connector, options);
        let idle_only = self.keep_alive_while_idle && !has_keep_alive;
        let useless = "keep_alive_while_idle does nothing without http2_keep_alive";
        let invalid = self
            .invalid
            .or_else(|| idle_only.then(|| useless.to_owned()));
        if let Some(reason) = &invalid {
            tracing::error!(
                service,
                reason,
                "a channel that is not valid: all its calls fail"
            );
            balancer.end(&format!("the channel is not valid: {reason}"));
        }
        BalancedChannel(Arc::new(Core {
            balancer,
            service,
            user_agent,
            scheme,
            authority,
            timeout: self
                .timeout
                .map(|timeout| (timeout, deadline::format(timeout))),
            wait_for_ready: self.wait_for_ready,
            start_up_bound: self.start_up_bound,
            unknown,
            is_single_threaded: is_single_threaded(),
            retries: self.plans.build(),
            trouble,
        }))
    }
}

fn is_single_threaded() -> bool {
    let runtime = tokio::runtime::Handle::try_current();
    runtime.is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::CurrentThread)
}

/// The user's name, if any, and ours.
fn user_agent(user_agent: Option<HeaderValue>) -> HeaderValue {
    let Some(theirs) = user_agent else {
        return HeaderValue::from_static(USER_AGENT);
    };
    let both = [theirs.as_bytes(), b" ", USER_AGENT.as_bytes()].concat();
    HeaderValue::try_from(both).unwrap_or_else(|_| HeaderValue::from_static(USER_AGENT))
}

const USER_AGENT: &str = concat!("tonic-etcd/", env!("CARGO_PKG_VERSION"));
/// Long enough for an etcd that elects a leader, short enough for a user at a screen.
const START_UP_BOUND: Duration = Duration::from_secs(10);
