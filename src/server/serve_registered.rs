//! The trait [`ServeRegistered`], and the steps from the check of the registration to the running server.

use std::future::{Future, pending};
use std::net::SocketAddr;

use http_body::Body as HttpBody;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::server::{Connected, Router};
use tower::{Layer, Service};
use tracing::Instrument;

use super::connection::{Connection, Connections};
#[cfg(feature = "health")]
use super::health_service;
use super::incoming::{Accepted, Incoming};
use super::shutdown::Serving;
use super::signal::Signals;
use crate::error::ServeError;
use crate::registration::RegistrationBuilder;

/// Serves a tonic [`Router`] that is registered in etcd while it serves.
///
/// ```no_run
/// # use std::convert::Infallible;
/// use tonic::transport::Server;
/// use tonic_etcd::{Registry, ServeRegistered};
///
/// # async fn run<G>(greeter: G) -> Result<(), Box<dyn std::error::Error>>
/// # where
/// #     G: tower::Service<http::Request<tonic::body::Body>, Error = Infallible, Response = http::Response<tonic::body::Body>>
/// #         + tonic::server::NamedService + Clone + Send + Sync + 'static,
/// #     G::Future: Send + 'static,
/// # {
/// let registry = Registry::connect(["127.0.0.1:2379"]).await?;
/// Server::builder()
///     .add_service(greeter)
///     .serve_registered("0.0.0.0:50051".parse()?, registry.registration("helloworld.Greeter"))
///     .await?;
/// # Ok(())
/// # }
/// ```
///
/// At the start, the server binds the listener, serves, and registers the bound address. The shutdown has five phases. Each phase has a
/// time limit, and the progress is logged:
///
/// 1. Report `NOT_SERVING` for every name in the health service (feature `health`, [`RegistrationBuilder`]`::health`). This phase takes no
///    time.
/// 2. Deregister: mark the entry as leaving, if the format has a field for this mark, and then revoke the lease. The [deregister
///    timeout](RegistrationBuilder::deregister_timeout) is 5 s by default. If it is exceeded, the entry is removed when its lease expires.
/// 3. Continue to accept connections for the [grace period](RegistrationBuilder::grace_period), 1 s by default. In this time, clients
///    receive the change from etcd.
/// 4. Close the listener, so that new connections are refused. Send GOAWAY to the connected clients, and wait for calls in flight. The
///    limit is the [drain timeout](RegistrationBuilder::drain_timeout), 20 s by default. Health watches end at once. An idle connection is
///    closed when its client has acknowledged the GOAWAY. A connection on which the client has not started HTTP is closed after 200 ms.
/// 5. Cut the remaining connections. This phase takes at most one second. The number of cut connections is logged, and is a field of
///    [`ServerState::Stopped`](crate::registration::ServerState::Stopped).
///
/// [`watch_server_state`](RegistrationBuilder::watch_server_state) returns a receiver for the state of the server, which follows these
/// phases. The handler of an endless stream should end the stream when the state becomes `Draining`. Otherwise, its connection is cut at
/// the drain timeout.
///
/// A server that must start while etcd is down needs two settings: a registry from
/// [`RegistryBuilder::connect_lazy`](crate::registry::RegistryBuilder::connect_lazy), which does not connect at once, and a
/// [`startup_timeout`](RegistrationBuilder::startup_timeout) that is longer than the expected outage. The server serves calls during the
/// outage.
///
/// `TCP_NODELAY` and TCP keep-alive are enabled on accepted sockets. The TCP settings of the router have no effect, as with tonic's
/// `serve_with_incoming`.
///
/// The trait is sealed: only [`Router`] implements it.
pub trait ServeRegistered: sealed::Sealed + Sized {
    /// Serves until SIGTERM or SIGINT, and returns after a clean shutdown. On Windows, the signals are Ctrl-C, Ctrl-Break, the close of
    /// the console, and the shutdown of the system.
    ///
    /// A second signal ends the server at once: the listener and every connection are closed without a grace period. A deregistration in
    /// progress gets 500 ms more, because clients would otherwise dial a stopped server until the lease expires. A healthy etcd needs only
    /// a fraction of these 500 ms.
    ///
    /// # Errors
    ///
    /// Fails if the signal handlers cannot be installed, if the socket cannot be bound, if the server cannot be registered, or if the
    /// server fails. After an error, the server no longer serves and its registration has ended. Cut connections are not an error.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the server and cuts open connections. The server is deregistered in the background.
    fn serve_registered(
        self,
        address: SocketAddr,
        registration: RegistrationBuilder,
    ) -> impl Future<Output = Result<(), ServeError>> + Send;

    /// Serves until `signal` completes, and returns after a clean shutdown. SIGTERM and SIGINT are not handled. To end the server at once,
    /// drop the future.
    ///
    /// # Errors
    ///
    /// See [`serve_registered`](Self::serve_registered).
    ///
    /// # Cancel safety
    ///
    /// See [`serve_registered`](Self::serve_registered).
    fn serve_registered_with_shutdown<F>(
        self,
        address: SocketAddr,
        registration: RegistrationBuilder,
        signal: F,
    ) -> impl Future<Output = Result<(), ServeError>> + Send
    where
        F: Future<Output = ()> + Send;

    /// Serves like [`serve_registered_with_shutdown`](Self::serve_registered_with_shutdown), but on a listener that is already bound, for
    /// example by a service manager (socket activation) or with other socket options.
    ///
    /// ```no_run
    /// # async fn run(router: tonic::transport::server::Router, registry: tonic_etcd::Registry) -> Result<(), Box<dyn std::error::Error>> {
    /// use tonic_etcd::ServeRegistered;
    ///
    /// let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await?;
    /// println!("listens on {}", listener.local_addr()?);
    /// let registration = registry.registration("helloworld.Greeter");
    /// let stop = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
    /// router.serve_registered_with_listener_shutdown(listener, registration, stop).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// See [`serve_registered`](Self::serve_registered).
    ///
    /// # Cancel safety
    ///
    /// See [`serve_registered`](Self::serve_registered).
    fn serve_registered_with_listener_shutdown<F>(
        self,
        listener: TcpListener,
        registration: RegistrationBuilder,
        signal: F,
    ) -> impl Future<Output = Result<(), ServeError>> + Send
    where
        F: Future<Output = ()> + Send;

    /// Serves like [`serve_registered_with_shutdown`](Self::serve_registered_with_shutdown), but on connections that `incoming` yields, for
    /// example connections of a Unix socket. The registration needs an [`address`](RegistrationBuilder::address). For a Unix socket, the
    /// server and its clients also need an [address policy](crate::AddressPolicy::allow_unix_sockets) that allows Unix sockets.
    ///
    /// After the grace period, no more connections are taken from `incoming`, and the stream is dropped.
    ///
    /// ```no_run
    /// # #[cfg(unix)]
    /// # async fn run(router: tonic::transport::server::Router, registry: tonic_etcd::Registry) -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_stream::wrappers::UnixListenerStream;
    /// use tonic_etcd::ServeRegistered;
    ///
    /// let listener = tokio::net::UnixListener::bind("/run/greeter.sock")?;
    /// let registration = registry.registration("helloworld.Greeter").address("unix:/run/greeter.sock");
    /// let stop = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
    /// let incoming = UnixListenerStream::new(listener);
    /// router.serve_registered_with_incoming_shutdown(incoming, registration, stop).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// See [`serve_registered`](Self::serve_registered). Also fails if the registration has no address.
    ///
    /// # Cancel safety
    ///
    /// See [`serve_registered`](Self::serve_registered).
    fn serve_registered_with_incoming_shutdown<I, T, E, F>(
        self,
        incoming: I,
        registration: RegistrationBuilder,
        signal: F,
    ) -> impl Future<Output = Result<(), ServeError>> + Send
    where
        I: Stream<Item = Result<T, E>> + Send + 'static,
        T: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        T::ConnectInfo: Clone + Send + Sync + 'static,
        E: Into<tower::BoxError> + Send + 'static,
        F: Future<Output = ()> + Send;
}

mod sealed {
    #[allow(unnameable_types, reason = "the private module seals the trait")]
    pub trait Sealed {}

    impl<L> Sealed for tonic::transport::server::Router<L> {}
}

impl<L, ResBody> ServeRegistered for Router<L>
where
    L: Layer<Routes> + Send + 'static,
    L::Service:
        Service<http::Request<Body>, Response = http::Response<ResBody>> + Clone + Send + 'static,
    <L::Service as Service<http::Request<Body>>>::Future: Send,
    <L::Service as Service<http::Request<Body>>>::Error: Into<tower::BoxError> + Send,
    ResBody: HttpBody<Data = bytes::Bytes> + Send + 'static,
    ResBody::Error: Into<tower::BoxError>,
{
    async fn serve_registered(
        self,
        address: SocketAddr,
        registration: RegistrationBuilder,
    ) -> Result<(), ServeError> {
        let mut signals = Signals::install().map_err(ServeError::Signal)?;
        #[expect(
            clippy::async_yields_async,
            reason = "the output of the first future is the future of the second signal"
        )]
        let stop = async move {
            signals.recv().await;
            async move { signals.recv().await }
        };
        let listening = listen(&registration, || bind(address))?;
        serve(self, listening, registration, stop).await
    }

    async fn serve_registered_with_shutdown<F>(
        self,
        address: SocketAddr,
        registration: RegistrationBuilder,
        signal: F,
    ) -> Result<(), ServeError>
    where
        F: Future<Output = ()> + Send,
    {
        let listening = listen(&registration, || bind(address))?;
        serve(self, listening, registration, once(signal)).await
    }

    async fn serve_registered_with_listener_shutdown<F>(
        self,
        listener: TcpListener,
        registration: RegistrationBuilder,
        signal: F,
    ) -> Result<(), ServeError>
    where
        F: Future<Output = ()> + Send,
    {
        let listening = listen(&registration, || Ok(listener))?;
        serve(self, listening, registration, once(signal)).await
    }

    async fn serve_registered_with_incoming_shutdown<I, T, E, F>(
        self,
        incoming: I,
        registration: RegistrationBuilder,
        signal: F,
    ) -> Result<(), ServeError>
    where
        I: Stream<Item = Result<T, E>> + Send + 'static,
        T: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        T::ConnectInfo: Clone + Send + Sync + 'static,
        E: Into<tower::BoxError> + Send + 'static,
        F: Future<Output = ()> + Send,
    {
        registration.check()?;
        let connections = Connections::default();
        let listening = Listening {
            incoming: Accepted::new(incoming, connections.clone()),
            connections,
            bound: None,
        };
        serve(self, listening, registration, once(signal)).await
    }
}

/// Waits for the stop signal. Returns the future of a second signal, which would end the server at once. Here, that future never completes,
/// because the caller passes only one signal. So the shutdown is always graceful.
async fn once(signal: impl Future<Output = ()>) -> impl Future<Output = ()> {
    signal.await;
    pending()
}

/// Waits for the stop signal, or until a handle stops the server. After a handle, the stop signal has no effect of its own, because the
/// shutdown has begun already. Returns the future of a second signal.
async fn stopped<N: Future<Output = ()>>(
    signal: impl Future<Output = N>,
    mut by_handle: watch::Receiver<bool>,
) -> impl Future<Output = ()> {
    let mut signal = Box::pin(signal);
    let by_handle = async move {
        // Without a sender, no handle is left.
        if by_handle.wait_for(|stop| *stop).await.is_err() {
            pending::<()>().await;
        }
    };
    let second = tokio::select! {
        second = &mut signal => Some(second),
        () = by_handle => None,
    };
    async move {
        match second {
            Some(second) => second.await,
            None => signal.await.await,
        }
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener, ServeError> {
    Incoming::bind(address).map_err(|cause| ServeError::Bind { address, cause })
}

/// A stream of connections, with the state that they share.
struct Listening<I> {
    incoming: I,
    connections: Connections,
    /// The address of the listening socket; `None` if the user passed the stream of connections.
    bound: Option<SocketAddr>,
}

/// Checks the registration and then prepares the listener, so that no socket is bound for an invalid registration.
fn listen(
    registration: &RegistrationBuilder,
    listener: impl FnOnce() -> Result<TcpListener, ServeError>,
) -> Result<Listening<Incoming>, ServeError> {
    registration.check()?;
    let listener = listener()?;
    let unspecified = SocketAddr::from(([0, 0, 0, 0], 0));
    let bound = listener.local_addr().map_err(|cause| ServeError::Bind {
        address: unspecified,
        cause,
    })?;
    let connections = Connections::default();
    Ok(Listening {
        incoming: Incoming::new(listener, connections.clone()),
        connections,
        bound: Some(bound),
    })
}

/// Serves on a stream of connections. The stream ends after the drain has begun.
async fn serve<L, ResBody, N, I, T, E>(
    router: Router<L>,
    listening: Listening<I>,
    mut registration: RegistrationBuilder,
    stop: impl Future<Output = N>,
) -> Result<(), ServeError>
where
    L: Layer<Routes> + Send + 'static,
    L::Service:
        Service<http::Request<Body>, Response = http::Response<ResBody>> + Clone + Send + 'static,
    <L::Service as Service<http::Request<Body>>>::Future: Send,
    <L::Service as Service<http::Request<Body>>>::Error: Into<tower::BoxError> + Send,
    ResBody: HttpBody<Data = bytes::Bytes> + Send + 'static,
    ResBody::Error: Into<tower::BoxError>,
    N: Future<Output = ()>,
    I: Stream<Item = Result<Connection<T>, E>> + Send + 'static,
    T: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    T::ConnectInfo: Clone + Send + Sync + 'static,
    E: Into<tower::BoxError> + Send + 'static,
{
    let Listening {
        incoming,
        connections,
        bound,
    } = listening;
    let stop = stopped(stop, registration.serve.stop.subscribe());
    registration.serve.connections = Some(connections.gauge());
    #[cfg(feature = "health")]
    let router = match registration.serve.health.clone() {
        Some(health) => {
            let states = registration.watch_server_state();
            let registered = registration.watch_state();
            let services = registration.services();
            let service = health_service::service(health, services, states, registered);
            router.add_service(service.await)
        }
        None => router,
    };
    // The stream `incoming` ends by itself. After its end, tonic waits for open connections only if it was given a shutdown signal. So
    // tonic is given a signal that never completes.
    let serving = router.serve_with_incoming_shutdown(incoming, pending());
    let task = tokio::spawn(serving.in_current_span());
    let server = Serving::new(task, connections, &registration.serve);
    server.run(bound, registration, stop).await
}
