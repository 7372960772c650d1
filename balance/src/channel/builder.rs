//! The options of a channel.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;
use http::{HeaderValue, Uri};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::RuntimeFlavor;
use tokio_stream::{Stream, StreamExt};
use tower::discover::Change;

use super::keep_alive::KeepAliveOptions;
use super::source::{Addresses, Changes, Discover, EndpointSource, Endpoints};
use super::{BalancedChannel, ChannelError};
use crate::address::{Address, AddressPolicy};
use crate::attributes::Attributes;
use crate::balance::{self, Balancer, LbPolicy, Options, OutlierDetection, Updates};
use crate::call::Core;
use crate::call::retry::method_config::MethodConfigBuilder;
use crate::transport::connect::Connector;
use crate::transport::deadline;
use crate::transport::health::HealthCheck;
use crate::transport::http2::MAX_WINDOW;
#[cfg(feature = "tls")]
use crate::transport::tls::{Tls, TlsConfig};

/// Builds a [`BalancedChannel`].
///
/// [`BalancedChannel::builder`] returns one without a source of endpoints: `S` is `()`. [`addresses`](Self::addresses),
/// [`discover`](Self::discover) and [`source`](Self::source) set it.
#[derive(Clone, Debug)]
#[must_use = "there is no channel before `connect` or `connect_lazy`"]
pub struct ChannelBuilder<S = ()> {
    source: S,
    pub(super) config: Config,
}

/// All options of a channel but its source.
#[derive(Clone, Debug)]
pub(super) struct Config {
    service: Option<String>,
    options: Options,
    pub(super) connector: Connector,
    user_agent: Option<HeaderValue>,
    origin: Option<Uri>,
    timeout: Option<Duration>,
    wait_for_ready: bool,
    startup_timeout: Duration,
    pub(super) methods: MethodConfigBuilder,
    address_policy: Option<AddressPolicy>,
    health_check: Option<String>,
    pub(super) keep_alive: KeepAliveOptions,
    /// The first option or address that cannot be used, and why.
    invalid: Option<String>,
}

impl<S> ChannelBuilder<S> {
    /// How an endpoint is chosen. Default [`LbPolicy::Latency`].
    pub fn policy(mut self, policy: LbPolicy) -> Self {
        self.config.options.policy = policy;
        self
    }

    /// Takes endpoints that fail much more than the others out of use for a while. Off by default; that an endpoint does not answer any more
    /// is noticed in any case.
    pub fn outlier_detection(mut self, detection: OutlierDetection) -> Self {
        self.config.options.outlier_detection = Some(detection);
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
    /// use tonic_balance::BalancedChannel;
    ///
    /// # fn run() {
    /// let channel = BalancedChannel::builder()
    ///     .health_check("helloworld.Greeter")
    ///     .addresses(["10.0.0.5:50051", "10.0.0.6:50051"])
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn health_check(mut self, service: impl Into<String>) -> Self {
        self.config.health_check = Some(service.into());
        self
    }

    /// How long an endpoint that has just become ready takes to its full share: its weight grows from a tenth, as Envoy's slow start has it.
    /// Off by default: a new endpoint counts as no faster than the others, which keeps it from being flooded. For servers that are slow
    /// while they are cold.
    pub fn slow_start(mut self, window: Duration) -> Self {
        self.config.options.slow_start = (!window.is_zero()).then_some(window);
        self
    }

    /// The zone that the caller is in: endpoints that are registered with it are preferred while they can take its calls. No preference by
    /// default.
    ///
    /// How much they can take is judged by the weights of the endpoints that are ready, as if callers were spread evenly over the zones: a
    /// zone that has its part of all weights serves its callers alone; of a smaller one's, the rest goes to zones with room to spare, so
    /// that no endpoint gets more than its weight says. About one call in a thousand leaves the zone in any case.
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.config.options.zone = Some(zone.into().into());
        self
    }

    /// Makes the channel's choices repeatable. By default they are random.
    pub fn seed(mut self, seed: u64) -> Self {
        self.config.options.seed = Some(seed);
        self
    }

    /// The deadline of calls that name none. None by default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.config.timeout = Some(timeout);
        self
    }

    /// Whether calls wait for an endpoint where they would fail at once. Not by default; a call can say otherwise with
    /// [`WaitForReady`](crate::WaitForReady).
    pub fn wait_for_ready(mut self, wait: bool) -> Self {
        self.config.wait_for_ready = wait;
        self
    }

    /// How long after its start the channel waits for the registry's first answer. Later, calls fail at once until it has come. Default
    /// 10 s.
    pub fn startup_timeout(mut self, bound: Duration) -> Self {
        // A time to come has to fit into an `Instant`.
        self.config.startup_timeout = bound.min(balance::LONGEST);
        self
    }

    /// How many calls may wait at once for an endpoint or a free stream; further ones fail with `RESOURCE_EXHAUSTED`. Default 32 768.
    pub fn max_waiters(mut self, waiters: usize) -> Self {
        self.config.options.max_waiters = waiters;
        self
    }

    /// How many connections each endpoint gets. One more is made while every stream that an endpoint allows is in use. Default 1; 0 counts
    /// as 1. A client of few endpoints and many threads gains by more.
    pub fn connections_per_endpoint(mut self, connections: usize) -> Self {
        self.config.options.connections_per_endpoint = connections.max(1);
        self
    }

    /// How long a connection may take: TCP, TLS and the peer's first answer. Default 10 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.config.connector.timeout = timeout;
        self
    }

    /// The longest wait between two attempts to connect to an endpoint. Default 120 s, as in gRPC's connection backoff document. A fresh
    /// registration ends the wait in any case.
    pub fn max_backoff(mut self, backoff: Duration) -> Self {
        self.config.options.max_backoff = backoff;
        self
    }

    /// Sets the flow-control window of a stream: how many bytes a server may send ahead on one response. Default 1 MiB; larger values than
    /// 2^31 - 1, the HTTP/2 maximum, are reduced to it.
    pub fn initial_stream_window_size(mut self, bytes: u32) -> Self {
        self.config.connector.http2.stream_window = bytes.min(MAX_WINDOW);
        self
    }

    /// Sets the flow-control window of a connection: how many bytes a server may send ahead on all responses together. Default 2^31 - 1, the
    /// HTTP/2 maximum: the stream windows already limit the memory.
    ///
    /// Keep it many times the stream window. Once unread responses fill it, every other call on the connection stops: 64 streams of 1 MiB
    /// fill one of 64 MiB.
    pub fn initial_connection_window_size(mut self, bytes: u32) -> Self {
        self.config.connector.http2.connection_window = bytes.min(MAX_WINDOW);
        self
    }

    /// Whether HTTP/2's limits against hostile servers are in force. Off by default: within a thousand calls that were cancelled they end
    /// the connection, and with it everybody's calls.
    pub fn http2_abuse_limits(mut self, limits: bool) -> Self {
        self.config.connector.http2.http2_abuse_limits = limits;
        self
    }

    /// Speaks TLS to the endpoints. Plaintext by default. Unless the addresses are given with
    /// [`addresses`](ChannelBuilder::addresses), the configuration has to fix the servers' name.
    #[cfg(feature = "tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn tls_config(mut self, tls: TlsConfig) -> Self {
        self.config.connector.tls = Some(Tls::new(tls));
        self
    }

    /// Makes connections with a function of your own: through a proxy, in memory. TLS, if configured, goes on top.
    ///
    /// ```no_run
    /// use tokio::net::TcpStream;
    /// use tonic_balance::BalancedChannel;
    ///
    /// # fn run() {
    /// let channel = BalancedChannel::builder()
    ///     .connector(|address| async move { TcpStream::connect(("gateway", address.port())).await })
    ///     .addresses(["greeter:50051"])
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn connector<F, Fut, T>(mut self, connect: F) -> Self
    where
        F: Fn(Address) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = io::Result<T>> + Send + 'static,
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        self.config.connector.dial_with(connect);
        self
    }

    /// Sets the `user-agent` header; `tonic-balance/` and the version are appended. If the text is not a valid header value, the channel is
    /// [invalid](ChannelError::InvalidOption).
    pub fn user_agent(mut self, user_agent: impl Into<String>) -> Self {
        let user_agent = user_agent.into();
        match HeaderValue::from_str(&user_agent) {
            Ok(value) => self.config.user_agent = Some(value),
            Err(_) => self
                .config
                .refuse(format!("no header can carry the user agent {user_agent:?}")),
        }
        self
    }

    /// The scheme and authority that calls are addressed to. By default the endpoint's address, or TLS's server name.
    pub fn origin(mut self, origin: Uri) -> Self {
        self.config.origin = Some(origin);
        self
    }

    /// The service's name in messages and logs.
    pub fn service(mut self, service: impl Into<String>) -> Self {
        self.config.service = Some(service.into());
        self
    }

    /// Which addresses host names may resolve to. By default what the resolver may find, or else [`AddressPolicy::default`].
    pub fn address_policy(mut self, policy: AddressPolicy) -> Self {
        self.config.address_policy = Some(policy);
        self
    }
}

impl BalancedChannel {
    /// Returns a builder. Give it a source of endpoints, then connect it.
    pub fn builder() -> ChannelBuilder {
        ChannelBuilder::new()
    }
}

impl ChannelBuilder {
    fn new() -> Self {
        let config = Config {
            service: None,
            options: Options::default(),
            connector: Connector::default(),
            user_agent: None,
            origin: None,
            timeout: None,
            wait_for_ready: false,
            startup_timeout: STARTUP_TIMEOUT,
            methods: MethodConfigBuilder::default(),
            address_policy: None,
            health_check: None,
            keep_alive: KeepAliveOptions::default(),
            invalid: None,
        };
        Self { source: (), config }
    }

    /// Takes the endpoints from a source, for example a resolver.
    pub fn source<S: EndpointSource>(self, source: S) -> ChannelBuilder<S> {
        self.map_source(|()| source)
    }

    /// Takes the endpoints from a stream of changes. Its first item makes the set known. An error is logged and changes no endpoint. At its
    /// end the endpoints stay as they are.
    pub fn discover<D, A, E>(self, discover: D) -> ChannelBuilder<Discover<D>>
    where
        D: Stream<Item = Result<Change<Address, A>, E>> + Send + 'static,
        A: Into<Attributes> + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        self.map_source(|()| Discover(discover))
    }

    /// Takes fixed endpoints, each `host:port`, `http://host:port` (`https://` with TLS configured) or `unix:/path`.
    ///
    /// If an address cannot be used (another form, `http://` with TLS configured, `https://` without), the channel is
    /// [invalid](ChannelError::InvalidOption).
    pub fn addresses<I>(self, addresses: I) -> ChannelBuilder<Addresses>
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let addresses = addresses.into_iter().map(Into::into);
        self.map_source(|()| Addresses(addresses.collect()))
    }
}

impl<S> ChannelBuilder<S> {
    /// Replaces the source by what `f` returns, for example to set options of a resolver.
    pub fn map_source<T>(self, f: impl FnOnce(S) -> T) -> ChannelBuilder<T> {
        ChannelBuilder {
            source: f(self.source),
            config: self.config,
        }
    }
}

impl<S: EndpointSource> ChannelBuilder<S> {
    /// Makes the channel, and waits until its first endpoint is ready.
    ///
    /// # Errors
    ///
    /// If an option is not valid, or if no endpoint is ready: the set is empty, no endpoint can be reached, or the source has not reported
    /// the set within [`startup_timeout`](Self::startup_timeout). With [`wait_for_ready`](Self::wait_for_ready) it waits for that bound in the
    /// first two cases as well.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connections.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(self) -> Result<BalancedChannel, ChannelError> {
        let (endpoints, config) = self.start();
        if let Some(reason) = config.invalid_reason() {
            let service = config.service.unwrap_or_default();
            return Err(ChannelError::InvalidOption { service, reason });
        }
        let channel = match endpoints {
            Some(endpoints) => config.build(endpoints),
            None => config.build(nothing()),
        };
        channel.ready().await?;
        Ok(channel)
    }

    /// Makes the channel without waiting. It starts to connect at once; calls wait for the first connection.
    ///
    /// If an option is not valid, an error is logged and every call fails with `UNAVAILABLE` and the reason.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn connect_lazy(self) -> BalancedChannel {
        let (endpoints, config) = self.start();
        match endpoints {
            Some(endpoints) => config.build(endpoints),
            None => config.build(nothing()),
        }
    }

    /// Starts the source. If it cannot be used, the config is invalid.
    fn start(self) -> (Option<Endpoints<S::Stream>>, Config) {
        let Self { source, mut config } = self;
        match source.start(config.connector.is_tls()) {
            Ok(endpoints) => (Some(endpoints), config),
            Err(reason) => {
                config.refuse(reason);
                (None, config)
            }
        }
    }
}

impl Config {
    /// Notes an option that cannot be used. Only the first one is reported.
    pub(super) fn refuse(&mut self, reason: String) {
        self.invalid.get_or_insert(reason);
    }

    fn invalid_reason(&self) -> Option<String> {
        let useless = self.keep_alive.useless();
        self.invalid.clone().or_else(|| useless.map(str::to_owned))
    }

    fn build<C, A, E>(mut self, endpoints: Endpoints<C>) -> BalancedChannel
    where
        C: Stream<Item = Result<Change<Address, A>, E>> + Send + 'static,
        A: Into<Attributes> + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let invalid = self.invalid_reason();
        let Endpoints {
            changes,
            known,
            trouble,
            on_refused,
            service,
            policy,
            own_addresses,
        } = endpoints;
        let service = self.service.take().or(service);
        let service = service.unwrap_or_else(|| "(unnamed)".to_owned());
        let unknown = if known.is_some() {
            "the registry has not answered within the startup timeout"
        } else {
            "the source of endpoints has reported none within the startup timeout"
        };
        let mut connector = self.connector;
        connector.own_addresses = own_addresses;
        connector.http2.keep_alive = self.keep_alive.build();
        if let Some(policy) = self.address_policy.or(policy) {
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
        let mut options = self.options;
        options.on_refused = on_refused;
        if let Some(service) = self.health_check {
            connector.http2.reserved_streams = 1;
            options.health_check = Some(HealthCheck {
                service,
                scheme: scheme.clone(),
                authority: authority.clone(),
                user_agent: user_agent.clone(),
            });
        }
        let changes = changes.map(|change| match change {
            Ok(Change::Insert(address, attributes)) => {
                Ok(Change::Insert(address, attributes.into()))
            }
            Ok(Change::Remove(address)) => Ok(Change::Remove(address)),
            Err(error) => Err(error),
        });
        let feed = match known {
            Some(known) => Updates::known_after(changes, known),
            None => Updates::new(changes),
        };
        let balancer = Balancer::start(&service, feed, connector, options);
        if let Some(reason) = &invalid {
            tracing::error!(
                service,
                reason,
                "the channel is not valid: all its calls fail"
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
            startup_timeout: self.startup_timeout,
            unknown,
            is_single_threaded: is_single_threaded(),
            method_config: self.methods.build(),
            trouble,
        }))
    }
}

/// The endpoints of a channel whose source cannot be used.
fn nothing() -> Endpoints<Changes> {
    Endpoints::new(tokio_stream::iter(Vec::new()))
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

const USER_AGENT: &str = concat!("tonic-balance/", env!("CARGO_PKG_VERSION"));
/// Long enough for an etcd that elects a leader, short enough for a user at a screen.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(10);
