//! Sources of endpoints: a list of addresses, a stream of changes, or any type that implements [`EndpointSource`].

use std::any::Any;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::Stream;
use tower::BoxError;
use tower::discover::Change;

use crate::address::{Address, AddressError, AddressPolicy, without_password};
use crate::attributes::Attributes;
use crate::balance::AddressCallback;
use crate::service_config::ServiceConfig;

/// A source of endpoints for a channel, for example a resolver.
///
/// Implement this trait for the builder of a resolver, so that the resolver starts when the channel connects. A plain stream of changes
/// needs no implementation: see [`ChannelBuilder::discover`](crate::channel::ChannelBuilder::discover).
///
/// ```no_run
/// use std::convert::Infallible;
/// use tokio::sync::mpsc;
/// use tokio_stream::wrappers::ReceiverStream;
/// use tonic_balance::channel::{EndpointSource, Endpoints, SourceContext};
/// use tonic_balance::{Address, BalancedChannel};
/// use tower::{BoxError, discover::Change};
///
/// /// Reads addresses from a file.
/// struct File(&'static str);
///
/// impl EndpointSource for File {
///     type Attributes = ();
///     type Error = Infallible;
///     type Stream = ReceiverStream<Result<Change<Address, ()>, Infallible>>;
///
///     fn start(self, _: &SourceContext) -> Result<Endpoints<Self::Stream>, BoxError> {
///         let text = std::fs::read_to_string(self.0)?;
///         let addresses: Vec<Address> = text.lines().map(str::parse).collect::<Result<_, _>>()?;
///         let (changes, stream) = mpsc::channel(addresses.len().max(1));
///         for address in addresses {
///             changes.try_send(Ok(Change::Insert(address, ())))?;
///         }
///         Ok(Endpoints::new(ReceiverStream::new(stream)).service("greeter"))
///     }
/// }
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let channel = BalancedChannel::builder().source(File("/etc/greeter/servers")).connect().await?;
/// # Ok(())
/// # }
/// ```
pub trait EndpointSource {
    /// The attributes that the source reports for an endpoint, besides its address.
    type Attributes: Into<Attributes> + 'static;
    /// The error of the stream. If the stream yields an error, the channel logs it and changes no endpoint.
    type Error: Into<BoxError> + 'static;
    /// The stream of changes. When the stream ends, the channel keeps its endpoints.
    type Stream: Stream<Item = Result<Change<Address, Self::Attributes>, Self::Error>>
        + Send
        + 'static;

    /// Starts the source in the current tokio runtime.
    ///
    /// # Errors
    ///
    /// Returns the reason why the source cannot be used. `connect` then fails with
    /// [`InvalidOption`](crate::error::ChannelError::InvalidOption).
    fn start(self, context: &SourceContext) -> Result<Endpoints<Self::Stream>, BoxError>;
}

/// The options of the channel that a source may need when it starts.
#[derive(Clone, Debug)]
pub struct SourceContext {
    pub(super) tls: bool,
    /// The policy that the program has set on the channel, or the default.
    pub(super) policy: AddressPolicy,
}

impl SourceContext {
    /// Returns whether the channel connects to its endpoints with TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.tls
    }
}

/// A stream of changes, with the options of its source.
pub struct Endpoints<S> {
    pub(super) changes: S,
    pub(super) known: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    pub(super) source_error: Option<SourceError>,
    pub(super) on_refused: Option<AddressCallback>,
    pub(super) on_lost: Option<AddressCallback>,
    pub(super) service: Option<String>,
    pub(super) policy: Option<AddressPolicy>,
    pub(super) static_addresses: bool,
    /// The name that the program has set, if the source has looked up the addresses of the endpoints itself.
    pub(super) name: Option<ServerName>,
    pub(super) handle: Option<SourceHandle>,
    pub(super) target: Option<String>,
    pub(super) service_configs: Option<ServiceConfigs>,
}

/// The name of the servers whose addresses a source has looked up.
#[derive(Clone, Debug)]
pub(super) struct ServerName {
    /// The server name for TLS.
    pub(super) host: Box<str>,
    /// The authority of calls.
    pub(super) authority: String,
}

/// The service configs of a source.
pub(super) type ServiceConfigs = Pin<Box<dyn Stream<Item = Option<ServiceConfig>> + Send>>;

/// A handle of the source, which [`BalancedChannel::source_handle`](crate::BalancedChannel::source_handle) returns.
pub(super) type SourceHandle = Box<dyn Any + Send + Sync>;

/// A function that returns the current failure of a source, if any.
pub(super) type SourceError = Box<dyn Fn() -> Option<String> + Send + Sync>;

impl<S> Endpoints<S> {
    /// Creates the endpoints from a stream of changes. The set of endpoints is known after the first item or the end of the stream. Until
    /// then, calls wait instead of failing.
    pub fn new(changes: S) -> Self {
        Self {
            changes,
            known: None,
            source_error: None,
            on_refused: None,
            on_lost: None,
            service: None,
            policy: None,
            static_addresses: false,
            name: None,
            handle: None,
            target: None,
            service_configs: None,
        }
    }

    /// Sets a future that completes when the set of endpoints is known. Without this future, the set is known after the first item or the
    /// end of the stream. A source whose set can be empty needs this future, because the stream of an empty set yields no item.
    #[must_use]
    pub fn known_after(mut self, known: impl Future<Output = ()> + Send + 'static) -> Self {
        self.known = Some(Box::pin(known));
        self
    }

    /// Sets a function that returns the current failure of the source, if any. The errors of calls that find no endpoint include this
    /// failure.
    #[must_use]
    pub fn last_error(
        mut self,
        last_error: impl Fn() -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        self.source_error = Some(Box::new(last_error));
        self
    }

    /// Sets a function that is called after each failed attempt to connect to an endpoint. The function must not block.
    #[must_use]
    pub fn on_refused(mut self, on_refused: impl Fn(&Address) + Send + Sync + 'static) -> Self {
        self.on_refused = Some(AddressCallback(Arc::new(on_refused)));
        self
    }

    /// Sets a function that is called after the end of a connection to an endpoint. The function must not block.
    pub(super) fn on_lost(mut self, on_lost: impl Fn(&Address) + Send + Sync + 'static) -> Self {
        self.on_lost = Some(AddressCallback(Arc::new(on_lost)));
        self
    }

    /// Sets a handle of the source, for example to read the state of a resolver.
    /// [`BalancedChannel::source_handle`](crate::BalancedChannel::source_handle) returns the handle. It is dropped with the last clone of
    /// the channel.
    #[must_use]
    pub fn handle(mut self, handle: impl Any + Send + Sync) -> Self {
        self.handle = Some(Box::new(handle));
        self
    }

    /// Sets the service's name in error messages and logs. A name from the channel's builder takes precedence.
    #[must_use]
    pub fn service(mut self, service: impl Into<String>) -> Self {
        self.service = Some(service.into());
        self
    }

    /// Sets the target, as in `etcd:////gRPC/helloworld.Greeter`. It is the value of the label `grpc.target` of
    /// [metrics](crate::channel::ChannelBuilder::metrics), and must not contain the addresses of endpoints.
    #[must_use]
    pub fn target(mut self, target: impl Into<String>) -> Self {
        self.target = Some(target.into());
        self
    }

    /// Sets a stream of service configs. The channel applies each item to all calls that are made from then on, and keeps its connections.
    /// With `None`, the options of the program apply again. If the stream ends, the last item stays in force.
    ///
    /// Until the first item, the options of the program apply. The option
    /// [`service_config_mode`](crate::channel::ChannelBuilder::service_config_mode) of the channel sets which of the two takes precedence.
    /// If this method is used, the channel reserves one HTTP/2 stream of each connection for a health check, which a service config can
    /// enable.
    #[must_use]
    pub fn service_configs(
        mut self,
        configs: impl Stream<Item = Option<ServiceConfig>> + Send + 'static,
    ) -> Self {
        self.service_configs = Some(Box::pin(configs));
        self
    }

    /// Sets the policy for the addresses that host names resolve to. A policy from the channel's builder takes precedence.
    #[must_use]
    pub fn address_policy(mut self, policy: AddressPolicy) -> Self {
        self.policy = Some(policy);
        self
    }
}

impl<S> fmt::Debug for Endpoints<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoints")
            .field("service", &self.service)
            .finish_non_exhaustive()
    }
}

/// A source that takes its endpoints from a stream of changes.
#[derive(Clone, Debug)]
pub struct Discover<D>(pub(super) D);

impl<D, A, E> EndpointSource for Discover<D>
where
    D: Stream<Item = Result<Change<Address, A>, E>> + Send + 'static,
    A: Into<Attributes> + 'static,
    E: Into<BoxError> + 'static,
{
    type Attributes = A;
    type Error = E;
    type Stream = D;

    fn start(self, _: &SourceContext) -> Result<Endpoints<D>, BoxError> {
        Ok(Endpoints::new(self.0))
    }
}

/// A source of fixed endpoints.
#[derive(Clone)]
pub struct Addresses(pub(super) Vec<String>);

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The addresses are not parsed yet, and one of them could contain a password. So only their number is printed.
        f.debug_tuple("Addresses").field(&self.0.len()).finish()
    }
}

/// The changes of a fixed list of endpoints.
pub(super) type Changes =
    tokio_stream::Iter<std::vec::IntoIter<Result<Change<Address, ()>, Infallible>>>;

impl EndpointSource for Addresses {
    type Attributes = ();
    type Error = Infallible;
    type Stream = Changes;

    fn start(self, context: &SourceContext) -> Result<Endpoints<Changes>, BoxError> {
        let addresses = self.0.iter().map(|given| parse(given, context.tls));
        let changes: Result<Vec<_>, _> = addresses
            .map(|address| address.map(|address| Ok(Change::Insert(address, ()))))
            .collect();
        let mut endpoints = Endpoints::new(tokio_stream::iter(changes?));
        endpoints.static_addresses = true;
        Ok(endpoints)
    }
}

/// Parses an address, or a URI in the form that tonic's `Channel` takes.
pub(super) fn parse(given: &str, tls: bool) -> Result<Address, String> {
    let shown = without_password(given);
    let address = match given.split_once("://") {
        Some(("http", _)) if tls => {
            return Err(format!(
                "{shown:?} is plaintext, but TLS is configured; write https://"
            ));
        }
        Some(("https", _)) if !tls => {
            return Err(format!(
                "{shown:?} requires TLS, but TLS is not configured; call `tls_config` first"
            ));
        }
        Some(("http" | "https", rest)) => rest.strip_suffix('/').unwrap_or(rest),
        _ => given,
    };
    address
        .parse()
        .map_err(|error: AddressError| error.to_string())
}
