//! Serves, registered: the server's life from bind to the last call.

use std::future::{Future, pending};
use std::net::SocketAddr;

use http_body::Body as HttpBody;
use tokio::net::TcpListener;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::server::Router;
use tower::{Layer, Service};
use tracing::Instrument;

use crate::error::ServeError;
use crate::registration::RegistrationBuilder;

mod connection;
#[cfg(feature = "health")]
mod health;
mod incoming;
mod opening;
mod serving;
mod signal;

use connection::Connections;
use incoming::Incoming;
use serving::Serving;
use signal::Signals;

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
/// At the start it binds, serves, and registers what was bound. The end is a lame duck's, each phase with its bound and a line in the log:
///
/// 1. The health service (feature `health`, [`RegistrationBuilder`]`::health`) says `NOT_SERVING` for every name: at once.
/// 2. Deregister: etcd is told that the instance is leaving, and its lease is revoked. Up to the
///    [deregister timeout](RegistrationBuilder::deregister_timeout), 5 s by default; what then is left goes with its lease.
/// 3. Accept on while clients learn of it: for the [grace period](RegistrationBuilder::grace_period), 1 s by default.
/// 4. Close the listener: new connections are refused from here on. Tell the clients that are connected (GOAWAY), and wait for calls in
///    flight: up to the [drain timeout](RegistrationBuilder::drain_timeout), 20 s by default. Connections on which no client has begun
///    to speak end after 200 ms, idle ones as soon as their clients have heard, watches on the health at once.
/// 5. Cut what is left, which takes a second at most, and say how many connections that were: in the log, and in
///    [`ServerState::Stopped`](crate::ServerState::Stopped).
///
/// [`watch_server_state`](RegistrationBuilder::watch_server_state) tells your program of each: a handler of an endless stream that ends it when the
/// server drains need not be cut.
///
/// A server that must start while etcd is down needs a registry that does so, too: [`Registry::from_client`](crate::Registry::from_client)
/// with a client whose `connect` does not authenticate, and so asks nothing of etcd; and a
/// [`startup_timeout`](RegistrationBuilder::startup_timeout) as long as that may last. It serves meanwhile.
///
/// Sockets have `TCP_NODELAY` and TCP keep-alive on; the router's own TCP settings do not apply, as with tonic's `serve_with_incoming`.
///
/// The trait is sealed: it is implemented for [`Router`] alone.
pub trait ServeRegistered: sealed::Sealed + Sized {
    /// Serves until SIGTERM or SIGINT, and returns after a clean shutdown.
    ///
    /// A second signal means now: the listener and every connection end at once, without a grace period. Only a deregistration that
    /// is still under way gets 500 ms more: an etcd that answers needs a fraction of that, and without it clients would dial a dead
    /// server until its lease runs out.
    ///
    /// # Errors
    ///
    /// A socket that cannot be bound, a registration that is refused, and a server that fails come back as themselves; after each of
    /// them nothing is registered and nothing is served. That connections had to be cut is no error.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops accepting and deregisters in the background; connections that are open are not waited for.
    fn serve_registered(
        self,
        address: SocketAddr,
        registration: RegistrationBuilder,
    ) -> impl Future<Output = Result<(), ServeError>> + Send;

    /// Serves until `signal` completes, and returns after a clean shutdown. SIGTERM and SIGINT are left alone. To end it at once, drop
    /// the future.
    ///
    /// # Errors
    ///
    /// As [`serve_registered`](Self::serve_registered).
    ///
    /// # Cancel safety
    ///
    /// As [`serve_registered`](Self::serve_registered).
    fn serve_registered_with_shutdown<F>(
        self,
        address: SocketAddr,
        registration: RegistrationBuilder,
        signal: F,
    ) -> impl Future<Output = Result<(), ServeError>> + Send
    where
        F: Future<Output = ()> + Send;

    /// As [`serve_registered_with_shutdown`](Self::serve_registered_with_shutdown), on a listener that is already bound: one of a service
    /// manager's socket activation, or one with socket options of its own.
    ///
    /// ```no_run
    /// # async fn run(router: tonic::transport::server::Router, registry: tonic_etcd::Registry) -> Result<(), Box<dyn std::error::Error>> {
    /// use tonic_etcd::ServeRegistered;
    ///
    /// let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await?;
    /// println!("listens on {}", listener.local_addr()?);
    /// let registration = registry.registration("helloworld.Greeter");
    /// let stop = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
    /// router.serve_registered_with_listener(listener, registration, stop).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`serve_registered`](Self::serve_registered).
    ///
    /// # Cancel safety
    ///
    /// As [`serve_registered`](Self::serve_registered).
    fn serve_registered_with_listener<F>(
        self,
        listener: TcpListener,
        registration: RegistrationBuilder,
        signal: F,
    ) -> impl Future<Output = Result<(), ServeError>> + Send
    where
        F: Future<Output = ()> + Send;
}

mod sealed {
    #[allow(unnameable_types, reason = "that is what seals the trait")]
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
            reason = "the first signal gives the second one"
        )]
        let stop = async move {
            signals.recv().await;
            async move { signals.recv().await }
        };
        serve(self, || bind(address), registration, stop).await
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
        serve(self, || bind(address), registration, once(signal)).await
    }

    async fn serve_registered_with_listener<F>(
        self,
        listener: TcpListener,
        registration: RegistrationBuilder,
        signal: F,
    ) -> Result<(), ServeError>
    where
        F: Future<Output = ()> + Send,
    {
        serve(self, || Ok(listener), registration, once(signal)).await
    }
}

/// A signal that is not followed by a second one, which would end the server at once.
async fn once(signal: impl Future<Output = ()>) -> impl Future<Output = ()> {
    signal.await;
    pending()
}

fn bind(address: SocketAddr) -> Result<TcpListener, ServeError> {
    Incoming::bind(address).map_err(|source| ServeError::Bind { address, source })
}

/// Serves on a listener, and registers its address. The registration is checked before the listener is bound.
async fn serve<L, ResBody, N>(
    router: Router<L>,
    listener: impl FnOnce() -> Result<TcpListener, ServeError>,
    registration: RegistrationBuilder,
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
{
    registration.check()?;
    let listener = listener()?;
    let unspecified = SocketAddr::from(([0, 0, 0, 0], 0));
    let bound = listener.local_addr().map_err(|source| ServeError::Bind {
        address: unspecified,
        source,
    })?;
    let connections = Connections::default();
    let incoming = Incoming::new(listener, connections.clone());
    #[cfg(feature = "health")]
    let router = match registration.serve.health.clone() {
        Some(health) => {
            let states = registration.watch_server_state();
            let services = registration.services();
            router.add_service(health::service(health, services, states).await)
        }
        None => router,
    };
    // The listener ends by itself; with a signal, if only one that never comes, tonic waits for the connections then.
    let serving = router.serve_with_incoming_shutdown(incoming, pending());
    let task = tokio::spawn(serving.in_current_span());
    let server = Serving::new(task, connections, &registration.serve);
    server.run(bound, registration, stop).await
}
