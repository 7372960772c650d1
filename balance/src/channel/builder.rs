//! The builder of a channel and its options.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::uri::{Authority, Scheme};
use http::{HeaderValue, Uri};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::RuntimeFlavor;
use tokio_stream::{Stream, StreamExt};
use tower::BoxError;
use tower::discover::Change;

use super::dns::Dns;
use super::keep_alive::KeepAliveOptions;
use super::service_config::{
    ProgramOptions, ServiceConfigMode, ServiceConfigOptions, follow_source,
};
use super::source::{
    Addresses, Changes, Discover, EndpointSource, Endpoints, ServerName, SourceContext,
};
use super::{BalancedChannel, ChannelError};
use crate::address::{Address, AddressPolicy};
use crate::attributes::Attributes;
use crate::balance::{
    self, Balancer, Gauges, LbPolicy, LoadReports, Options, OutlierDetection, Updates,
};
use crate::call::Core;
use crate::call::method_config::{MethodTimeout, ProgramMethods};
use crate::causes::causes;
use crate::metrics::{ChannelMetrics, Metrics};
use crate::traces::Traces;
use crate::transport::connect::Connector;
use crate::transport::health_client::HealthCheck;
use crate::transport::http2::MAX_WINDOW;
#[cfg(feature = "tls")]
use crate::transport::tls::{Tls, TlsConfig};

/// Builds a [`BalancedChannel`].
///
/// [`BalancedChannel::builder`] returns a builder without a source of endpoints: `S` is `()`. [`addresses`](Self::addresses),
/// [`discover`](Self::discover) and [`source`](Self::source) set the source.
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until `connect` or `connect_lazy` is called"]
pub struct ChannelBuilder<S = ()> {
    source: S,
    pub(super) config: Config,
}

/// All options of a channel except its source.
#[derive(Clone, Debug)]
pub(super) struct Config {
    service: Option<String>,
    /// The policy, if the program has set one.
    policy: Option<LbPolicy>,
    pub(super) options: Options,
    pub(super) connector: Connector,
    user_agent: Option<HeaderValue>,
    origin: Option<Uri>,
    /// The use of load reports, if the program has enabled it.
    pub(super) load_reports: Option<LoadReports>,
    startup_timeout: Duration,
    pub(super) methods: ProgramMethods,
    pub(super) from_service: ServiceConfigOptions,
    address_policy: Option<AddressPolicy>,
    health_check: Option<String>,
    pub(super) keep_alive: KeepAliveOptions,
    metrics: Option<Metrics>,
    traces: Option<Traces>,
    /// The first invalid option or address, with the reason.
    invalid: Option<String>,
}

impl<S> ChannelBuilder<S> {
    /// Sets the policy that picks an endpoint. Default [`LbPolicy::Latency`].
    pub fn policy(mut self, policy: LbPolicy) -> Self {
        self.config.policy = Some(policy);
        self
    }

    /// Enables outlier detection: an endpoint that fails many more calls than the others is not used for a while. Disabled by default. An
    /// endpoint that no longer responds is detected in any case.
    pub fn outlier_detection(mut self, detection: OutlierDetection) -> Self {
        self.config.options.outlier_detection = Some(detection);
        self
    }

    /// Watches the health of a service on each endpoint with `grpc.health.v1.Health/Watch` (gRFC A17), and sends calls only to endpoints
    /// that report `SERVING`. The empty name stands for the server as a whole. Disabled by default for two reasons: servers of this library
    /// remove their keys from the registry before they stop, and an endpoint that no longer responds is detected in any case. Enable the
    /// health check for servers that can be up but unable to serve.
    ///
    /// An endpoint is not used before its first health status. Calls in flight continue when an endpoint reports `NOT_SERVING`. An endpoint
    /// without a health service counts as healthy. An endpoint whose health service does not have this service name also counts as healthy,
    /// unlike in the gRFC. If a watch fails for any other reason before its first status, or has no status within
    /// [`connect_timeout`](Self::connect_timeout), the endpoint counts as unhealthy. The watch is then opened again after a backoff like
    /// that of connections.
    ///
    /// If a watch ends after it has reported a status, it is opened again at once, or, if several watches in a row were short, after about a
    /// second. Until the new watch has a status, the last status applies. If all endpoints report that they do not serve, calls fail with `UNAVAILABLE`.
    ///
    /// The watch uses one stream of each connection. An endpoint that allows only one stream is not watched.
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

    /// Sets how long a new endpoint takes to reach its full share of the calls. In this time, its weight grows from a tenth to the full
    /// weight, as in Envoy's slow start. Disabled by default, because a new endpoint is not flooded with calls: until its first response,
    /// its latency counts as three quarters of the median of all endpoints. Enable slow start for servers that are slow until they have
    /// warmed up.
    pub fn slow_start(mut self, window: Duration) -> Self {
        self.config.options.slow_start = (!window.is_zero()).then_some(window);
        self
    }

    /// Sets the zone of the caller. Endpoints of the same zone are preferred while they have capacity. Default: no preference.
    ///
    /// The channel assumes that callers are spread evenly over the zones, so with `n` zones the callers of each zone make `1 / n` of all
    /// calls. The capacity of a zone is its share of the weights of all ready endpoints. If the capacity is at least `1 / n`, the zone
    /// serves all calls of its own callers. Otherwise it serves as many of them as its capacity allows, and the remaining calls are sent to
    /// zones with spare capacity. In any case, each endpoint outside the zone gets a few calls: at least a thousandth of the calls that an
    /// endpoint with the same weight in the preferred zone gets.
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.config.options.zone = Some(zone.into().into());
        self
    }

    /// Sets the seed of the random numbers, which makes the picks repeatable. By default the picks are random. Clients with the same seed
    /// choose the same [subset](Self::subset).
    pub fn seed(mut self, seed: u64) -> Self {
        self.config.options.seed = Some(seed);
        self
    }

    /// Sets the default timeout of calls. A timeout that the request itself sets takes precedence. Default: no timeout.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.config.methods.all().timeout = Some(MethodTimeout::new(timeout));
        self
    }

    /// Sets whether calls wait for an endpoint instead of failing at once. Default `false`. The extension
    /// [`WaitForReady`](crate::channel::WaitForReady) of a request overrides this setting.
    pub fn wait_for_ready(mut self, wait: bool) -> Self {
        self.config.methods.all().wait_for_ready = Some(wait);
        self
    }

    /// Sets the startup timeout, which begins when the channel starts. Until it ends, calls wait for the source to report its first set of
    /// endpoints. After that, calls fail at once until the set is known. Default 10 s.
    pub fn startup_timeout(mut self, bound: Duration) -> Self {
        // The end of the timeout must be representable as an `Instant`.
        self.config.startup_timeout = bound.min(balance::MAX_DURATION);
        self
    }

    /// Sets how many calls may wait for an endpoint or a free stream at the same time. Further calls fail with `RESOURCE_EXHAUSTED`.
    /// Default 32 768.
    pub fn max_waiters(mut self, waiters: usize) -> Self {
        self.config.options.max_waiters = waiters;
        self
    }

    /// Sets the number of connections to each endpoint. One more connection is made to an endpoint whose streams are all in use. Default 1;
    /// 0 counts as 1, and a value above 1 000 makes the channel invalid. More than one connection is useful for a client with few endpoints
    /// and many threads.
    pub fn connections_per_endpoint(mut self, connections: usize) -> Self {
        if connections > MAX_CONNECTIONS {
            let reason = format!(
                "connections_per_endpoint is {connections}; the limit is {MAX_CONNECTIONS}"
            );
            self.config.refuse(reason);
        }
        self.config.options.connections_per_endpoint = connections.clamp(1, MAX_CONNECTIONS);
        self
    }

    /// Sets the timeout of a connection attempt: name resolution, TCP, TLS and the first answer of the peer. Default 10 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.config.connector.timeout = timeout;
        self
    }

    /// Sets the limit on the wait between two attempts to connect to an endpoint, before the random variation of 20 %. Default 120 s, as in
    /// gRPC's connection backoff document. A new registration of the endpoint ends the wait in any case. 0 makes the channel invalid.
    pub fn max_backoff(mut self, backoff: Duration) -> Self {
        if backoff.is_zero() {
            let reason = "max_backoff is 0, so a failing endpoint would be dialled without a pause";
            self.config.refuse(reason.to_owned());
        }
        self.config.options.max_backoff = backoff;
        self
    }

    /// Sets the flow-control window of a stream: how many bytes of one response a server may send before the client reads them. Default 1
    /// MiB. Values above 2^31 - 1, the HTTP/2 maximum, are reduced to this maximum; 0 makes the channel invalid.
    pub fn initial_stream_window_size(mut self, bytes: u32) -> Self {
        if bytes == 0 {
            let reason = "initial_stream_window_size is 0, so no response could arrive";
            self.config.refuse(reason.to_owned());
        }
        self.config.connector.http2.stream_window = bytes.min(MAX_WINDOW);
        self
    }

    /// Sets the flow-control window of a connection: how many bytes of all responses together a server may send before the client reads
    /// them. Default 2^31 - 1, the HTTP/2 maximum, because the stream windows already limit the memory. Less than
    /// 65 535, the initial window of HTTP/2, makes the channel invalid.
    ///
    /// Keep the connection window many times larger than the stream window. Once unread responses fill the connection window, every other
    /// call on the connection stops: 64 unread streams of 1 MiB fill a window of 64 MiB.
    pub fn initial_connection_window_size(mut self, bytes: u32) -> Self {
        if bytes < MIN_CONNECTION_WINDOW {
            let reason = format!(
                "initial_connection_window_size is {bytes}; the minimum is {MIN_CONNECTION_WINDOW}, the initial window of HTTP/2"
            );
            self.config.refuse(reason);
        }
        self.config.connector.http2.connection_window = bytes.min(MAX_WINDOW);
        self
    }

    /// Sets whether the limits of the `h2` crate on reset streams and on small frames are enforced. These limits protect the client against
    /// hostile servers. They are disabled by default, because cancelled calls count as reset streams: after at most a thousand cancelled
    /// calls, `h2` closes the connection, and all calls on it fail.
    pub fn http2_abuse_limits(mut self, limits: bool) -> Self {
        self.config.connector.http2.http2_abuse_limits = limits;
        self
    }

    /// Enables TLS to the endpoints. Plaintext by default. The configuration must contain the name of the servers, unless the source of the
    /// endpoints is [`addresses`](ChannelBuilder::addresses). A name or a PEM text that is not valid makes the channel
    /// [invalid](ChannelError::InvalidOption). Files are read at each handshake, so they are not checked before.
    #[cfg(feature = "tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn tls_config(mut self, tls: TlsConfig) -> Self {
        self.config.connector.tls = Some(Tls::new(tls));
        self
    }

    /// Sets a function that opens the connections, for example through a proxy or in memory. If TLS is configured, it runs on top of these
    /// connections.
    ///
    /// ```no_run
    /// use tokio::net::TcpStream;
    /// use tonic_balance::BalancedChannel;
    ///
    /// # fn run() {
    /// let channel = BalancedChannel::builder()
    ///     .connector(|address| async move {
    ///         let port = address.port().unwrap_or(443);
    ///         TcpStream::connect(("gateway", port)).await
    ///     })
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

    /// Sets the `user-agent` header. `tonic-balance/` and the version are appended. If the text is not a valid header value, the channel is
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

    /// Sets the scheme and the authority of calls. The default scheme is `https` if TLS is configured, and `http` otherwise. The default
    /// authority is the server name of the TLS configuration, or else, for [`Dns`], its `host:port`, and for `DnsSrv` its domain, or else
    /// the authority of the request, or else the endpoint's address.
    pub fn origin(mut self, origin: Uri) -> Self {
        self.config.origin = Some(origin);
        self
    }

    /// Sets the service's name in messages and logs.
    pub fn service(mut self, service: impl Into<String>) -> Self {
        self.config.service = Some(service.into());
        self
    }

    /// Enables metrics: passes a [`Recorder`](crate::metrics::Recorder), or a [`Metrics`] that also selects the instruments. Disabled by
    /// default. The channels of a registry have the recorder of the registry.
    ///
    /// The label `grpc.target` is the target that the source of the endpoints reports: for example `etcd:////gRPC/helloworld.Greeter` for a
    /// channel of a registry, and `dns:///host:port` for [`Dns`]. If the source reports none, it is the name of the
    /// [service](Self::service).
    pub fn metrics(mut self, metrics: impl Into<Metrics>) -> Self {
        let metrics = metrics.into();
        if let Some(reason) = metrics.unknown_name() {
            self.config.refuse(format!("metrics: {reason}"));
        }
        self.config.metrics = Some(metrics);
        self
    }

    /// Enables traces: each call and each of its attempts has a span of the crate `tracing`. Disabled by default. The channels of a registry
    /// have the traces of the registry. The module [`traces`](crate::traces) describes the spans.
    pub fn traces(mut self, traces: Traces) -> Self {
        self.config.traces = Some(traces);
        self
    }

    /// Sets the policy for the addresses that host names resolve to. Default: the policy of the source, or else [`AddressPolicy::default`].
    pub fn address_policy(mut self, policy: AddressPolicy) -> Self {
        self.config.address_policy = Some(policy);
        self
    }
}

impl BalancedChannel {
    /// Returns a builder. Set a source of endpoints on it, then connect.
    pub fn builder() -> ChannelBuilder {
        ChannelBuilder::new()
    }
}

impl ChannelBuilder {
    fn new() -> Self {
        let config = Config {
            service: None,
            policy: None,
            options: Options::default(),
            connector: Connector::default(),
            user_agent: None,
            origin: None,
            load_reports: None,
            startup_timeout: STARTUP_TIMEOUT,
            methods: ProgramMethods::default(),
            from_service: ServiceConfigOptions::default(),
            address_policy: None,
            health_check: None,
            keep_alive: KeepAliveOptions::default(),
            metrics: None,
            traces: None,
            invalid: None,
        };
        Self { source: (), config }
    }

    /// Takes the endpoints from a source, for example a resolver.
    pub fn source<S: EndpointSource>(self, source: S) -> ChannelBuilder<S> {
        self.map_source(|()| source)
    }

    /// Takes the endpoints from a stream of changes. The set of endpoints is known after the first change, or after the end of the stream. An
    /// error in the stream is logged and changes no endpoint. After the end of the stream, the endpoints stay unchanged.
    pub fn discover<D, A, E>(self, discover: D) -> ChannelBuilder<Discover<D>>
    where
        D: Stream<Item = Result<Change<Address, A>, E>> + Send + 'static,
        A: Into<Attributes> + 'static,
        E: Into<BoxError> + 'static,
    {
        self.map_source(|()| Discover(discover))
    }

    /// Takes the endpoints that a name has in the DNS, in the form `host:port`. See [`Dns`] for the interval of the lookups.
    pub fn dns(self, name: impl Into<String>) -> ChannelBuilder<Dns> {
        self.map_source(|()| Dns::new(name))
    }

    /// Takes fixed endpoints, each in the form `host:port`, `http://host:port` (`https://` with TLS configured) or `unix:/path`.
    ///
    /// An address is invalid if it has another form, if it starts with `http://` and TLS is configured, or if it starts with `https://` and
    /// TLS is not configured. If an address is invalid, the channel is [invalid](ChannelError::InvalidOption).
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
    /// Replaces the source with the value that `f` returns, for example to set options of a resolver.
    pub fn map_source<T>(self, f: impl FnOnce(S) -> T) -> ChannelBuilder<T> {
        ChannelBuilder {
            source: f(self.source),
            config: self.config,
        }
    }
}

impl<S: EndpointSource> ChannelBuilder<S> {
    /// Creates the channel and waits until its first endpoint is ready.
    ///
    /// # Errors
    ///
    /// Returns an error if an option is invalid, or if no endpoint is ready: the set is empty, no endpoint can be reached, or the source
    /// has not reported the set within [`startup_timeout`](Self::startup_timeout). With [`wait_for_ready`](Self::wait_for_ready), an empty
    /// set or unreachable endpoints cause an error only after that timeout.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connections.
    ///
    /// # Panics
    ///
    /// Panics outside a tokio runtime.
    pub async fn connect(self) -> Result<BalancedChannel, ChannelError> {
        let (endpoints, config) = self.start();
        if let Some(reason) = config.invalid_reason() {
            let named = endpoints.and_then(|endpoints| endpoints.service);
            let service = config
                .service
                .or(named)
                .unwrap_or_else(|| UNNAMED.to_owned());
            return Err(ChannelError::InvalidOption { service, reason });
        }
        let channel = match endpoints {
            Some(endpoints) => config.build(endpoints),
            None => config.build(no_endpoints()),
        };
        channel.wait_until_ready().await?;
        Ok(channel)
    }

    /// Creates the channel without waiting. The channel starts to connect at once, and calls wait for the first connection.
    ///
    /// If an option is invalid, an error is logged and every call fails with `UNAVAILABLE` and the reason.
    ///
    /// # Panics
    ///
    /// Panics outside a tokio runtime.
    #[must_use]
    pub fn connect_lazy(self) -> BalancedChannel {
        let (endpoints, config) = self.start();
        match endpoints {
            Some(endpoints) => config.build(endpoints),
            None => config.build(no_endpoints()),
        }
    }

    /// Starts the source. If the source cannot be used, marks the configuration as invalid.
    fn start(self) -> (Option<Endpoints<S::Stream>>, Config) {
        let Self { source, mut config } = self;
        let context = SourceContext {
            tls: config.connector.is_tls(),
            policy: config.address_policy.clone().unwrap_or_default(),
        };
        match source.start(&context) {
            Ok(endpoints) => (Some(endpoints), config),
            Err(reason) => {
                config.refuse(causes(&*reason));
                (None, config)
            }
        }
    }
}

impl Config {
    /// Records an invalid option or address. If several are recorded, only the first is reported.
    pub(super) fn refuse(&mut self, reason: String) {
        self.invalid.get_or_insert(reason);
    }

    fn invalid_reason(&self) -> Option<String> {
        let ineffective = self.keep_alive.ineffective();
        self.invalid
            .clone()
            .or_else(|| ineffective.map(str::to_owned))
            .or_else(|| self.connector.invalid_tls())
    }

    fn build<C, A, E>(mut self, endpoints: Endpoints<C>) -> BalancedChannel
    where
        C: Stream<Item = Result<Change<Address, A>, E>> + Send + 'static,
        A: Into<Attributes> + 'static,
        E: Into<BoxError> + 'static,
    {
        let invalid = self.invalid_reason();
        let Endpoints {
            changes,
            known,
            source_error,
            on_refused,
            on_lost,
            service,
            policy,
            static_addresses,
            name,
            handle,
            target,
            service_configs,
        } = endpoints;
        let service = self.service.take().or(service);
        let service = service.unwrap_or_else(|| UNNAMED.to_owned());
        let unknown = unknown_reason(known.is_some());
        let mut connector = self.connector;
        connector.static_addresses = static_addresses;
        connector.host = name
            .as_ref()
            .map(|name| name.host.trim_end_matches('.').into());
        connector.http2.keep_alive = self.keep_alive.build();
        connector.policy = self.address_policy.or(policy).unwrap_or_default();
        let (scheme, authority) = scheme_and_authority(&connector, name.as_ref(), self.origin);
        let user_agent = user_agent(self.user_agent);
        let mut options = self.options;
        (options.on_refused, options.on_lost) = (on_refused, on_lost);
        let is_ignored = self.from_service.mode == ServiceConfigMode::Ignore;
        let service_configs = service_configs.filter(|_| !is_ignored);
        let program = ProgramOptions {
            policy: self.policy,
            hash_header: options.hash_header.take(),
            load_reports: self.load_reports,
            outlier_detection: options.outlier_detection.take(),
            subset_size: options.subset_size.take(),
            health_check: self.health_check,
            health_client: HealthCheck {
                service: String::new(),
                scheme: scheme.clone(),
                authority: authority.clone(),
                user_agent: user_agent.clone(),
            },
            methods: self.methods,
            from_service: self.from_service,
        };
        let (balancing, methods) = program.combined(None);
        // A later service config can enable the health check, and open connections keep their number of reserved streams.
        if balancing.health_check.is_some() || service_configs.is_some() {
            connector.http2.reserved_streams = 1;
        }
        options.splits.prefers_service_config = program.prefers_service_config();
        options.set(balancing);
        let changes = changes.map(with_attributes);
        let feed = match known {
            Some(known) => Updates::known_after(changes, known),
            None => Updates::new(changes),
        };
        let of_channel = |metrics| {
            let target = target.unwrap_or_else(|| service.clone());
            ChannelMetrics::new(metrics, target, service.clone(), connector.is_tls())
        };
        let metrics = self.metrics.map(of_channel).map(Arc::new);
        options.metrics.clone_from(&metrics);
        let balancer = Balancer::start(&service, feed, connector, options);
        let gauges = metrics
            .as_ref()
            .map(|metrics| Gauges::start(metrics, balancer.shared()));
        if let Some(reason) = &invalid {
            tracing::error!(
                service,
                reason,
                "the channel is not valid: all its calls fail"
            );
            balancer.end(&format!("the channel is not valid: {reason}"));
        }
        let channel = program.channel();
        let live_config = service_configs.map(|configs| {
            let shared = Arc::downgrade(balancer.shared());
            follow_source(configs, program, shared)
        });
        BalancedChannel(Arc::new(Core {
            balancer,
            service,
            user_agent,
            scheme,
            authority,
            wait_for_ready: channel.wait_for_ready.unwrap_or(false),
            timeout: channel.timeout,
            startup_timeout: self.startup_timeout,
            unknown,
            is_single_threaded: is_single_threaded(),
            method_config: methods.has_effect().then(|| Box::new(methods)),
            live_config,
            metrics,
            traces: self.traces,
            _gauges: gauges,
            source_error,
            source_handle: handle,
        }))
    }
}

/// The name that messages show for a channel without a service name.
const UNNAMED: &str = "(unnamed)";
/// Limit on the connections to one endpoint. A larger number is most likely a mistake.
const MAX_CONNECTIONS: usize = 1_000;
/// The initial connection window of HTTP/2 (RFC 9113, section 6.9.2), which a client cannot reduce.
const MIN_CONNECTION_WINDOW: u32 = 65_535;

/// Returns the scheme and the authority of all calls. If the TLS configuration names the servers, or the endpoints are the addresses of a
/// name, and the program sets no other `origin`, this name is the authority. The source of endpoints cannot change it.
fn scheme_and_authority(
    connector: &Connector,
    name: Option<&ServerName>,
    origin: Option<Uri>,
) -> (Scheme, Option<Authority>) {
    let origin = origin.unwrap_or_default().into_parts();
    let default = if connector.is_tls() {
        Scheme::HTTPS
    } else {
        Scheme::HTTP
    };
    let server_name = connector.server_name().map(str::to_owned);
    let server_name = server_name.or_else(|| Some(name?.authority.clone()));
    let authority = server_name.and_then(|name| name.parse().ok());
    let scheme = origin.scheme.unwrap_or(default);
    (scheme, origin.authority.or(authority))
}

/// Converts the attributes of a new endpoint.
fn with_attributes<A: Into<Attributes>, E>(
    change: Result<Change<Address, A>, E>,
) -> Result<Change<Address, Attributes>, E> {
    Ok(match change? {
        Change::Insert(address, attributes) => Change::Insert(address, attributes.into()),
        Change::Remove(address) => Change::Remove(address),
    })
}

/// Returns the reason why a call fails while the set of endpoints is unknown.
fn unknown_reason(reports_known: bool) -> &'static str {
    if reports_known {
        "the source of endpoints has not reported the set within the startup timeout"
    } else {
        "the source has reported no endpoint within the startup timeout"
    }
}

/// Returns an empty set of endpoints, for a channel whose source cannot be used.
fn no_endpoints() -> Endpoints<Changes> {
    Endpoints::new(tokio_stream::iter(Vec::new()))
}

/// Returns true if this function runs in a current-thread runtime of tokio.
fn is_single_threaded() -> bool {
    let runtime = tokio::runtime::Handle::try_current();
    runtime.is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::CurrentThread)
}

/// Returns the user agent that the program has set, if any, followed by the user agent of this library.
fn user_agent(user_agent: Option<HeaderValue>) -> HeaderValue {
    let Some(theirs) = user_agent else {
        return HeaderValue::from_static(USER_AGENT);
    };
    let both = [theirs.as_bytes(), b" ", USER_AGENT.as_bytes()].concat();
    HeaderValue::try_from(both).unwrap_or_else(|_| HeaderValue::from_static(USER_AGENT))
}

const USER_AGENT: &str = concat!("tonic-balance/", env!("CARGO_PKG_VERSION"));
/// Default startup timeout. It is long enough for a leader election in etcd, and short enough for an interactive program.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(10);
