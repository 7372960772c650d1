//! Serves, registered: the server's life from bind to the last call.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::net::SocketAddr;
use std::time::Duration;

use http_body::Body as HttpBody;
use tokio::time::{sleep, timeout};
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::server::Router;
use tower::{Layer, Service};
use tracing::Instrument;

use crate::error::{RegisterError, ServeError};
use crate::registration::{Registration, RegistrationBuilder};

mod incoming;
mod signal;

use incoming::{Connections, Incoming};
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
/// The order of things, at the start: bind, serve, register what was bound. At the end: deregister, go on accepting for the
/// [grace period](RegistrationBuilder::grace_period) while clients learn of it, close the listener, tell the clients that are
/// connected (GOAWAY), wait for calls in flight up to the [drain timeout](RegistrationBuilder::drain_timeout), cut what is left.
///
/// Sockets have `TCP_NODELAY` and TCP keep-alive on; the router's own TCP settings do not apply, as with tonic's `serve_with_incoming`.
pub trait ServeRegistered: Sized {
    /// Serves until SIGTERM or SIGINT, and returns after a clean shutdown. A second signal ends it at once.
    ///
    /// # Errors
    ///
    /// A socket that cannot be bound, a registration that is refused, and a server that fails come back as themselves; after each of
    /// them nothing is registered and nothing is served.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops accepting and deregisters in the background; connections that are open are not waited for.
    fn serve_registered(
        self,
        address: SocketAddr,
        registration: RegistrationBuilder,
    ) -> impl Future<Output = Result<(), ServeError>> + Send;

    /// Serves until `signal` completes, and returns after a clean shutdown. SIGTERM and SIGINT are left alone.
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
        let (stop, stopped) = tokio::sync::oneshot::channel::<Infallible>();
        let mut stop = Some(stop);
        let mut serving =
            std::pin::pin!(
                self.serve_registered_with_shutdown(address, registration, async {
                    // Ends when `stop` is dropped.
                    let _ = stopped.await;
                })
            );
        loop {
            tokio::select! {
                outcome = &mut serving => return outcome,
                () = signals.recv() => if stop.take().is_some() {
                    tracing::info!("shutting down; a second signal ends it at once");
                } else {
                    tracing::warn!("second signal: ending at once");
                    return Ok(());
                }
            }
        }
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
        registration.check()?;
        let bind = |source| ServeError::Bind { address, source };
        let connections = Connections::default();
        let incoming = Incoming::bind(address, connections.clone()).map_err(bind)?;
        let bound = incoming.local_addr().map_err(bind)?;
        let close = connections.drained();
        let server = tokio::spawn(
            self.serve_with_incoming_shutdown(incoming, close)
                .in_current_span(),
        );
        let server = Serving {
            task: server,
            connections,
            grace: registration.grace_period,
            drain: registration.drain_timeout,
        };
        server.run(bound, registration, signal).await
    }
}

/// A server that has been started.
struct Serving {
    task: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    connections: Connections,
    grace: Duration,
    drain: Duration,
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Ends the accept loop and the connections as well, where the task alone would leave those to themselves.
        self.connections.drain();
        self.connections.cut();
    }
}

impl Serving {
    async fn run(
        mut self,
        bound: SocketAddr,
        registration: RegistrationBuilder,
        signal: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        tracing::info!(%bound, "serving");
        let startup_timeout = registration.startup_timeout;
        let registration = match registration.start(Some(bound)).await {
            Ok(registration) => registration,
            Err(error) => return Err(self.stop(error).await),
        };
        let registered = async {
            registration.registered(startup_timeout).await?;
            tracing::info!(%bound, key = registration.key(), address = %registration.address(), "registered");
            pending::<Result<Infallible, RegisterError>>().await
        };
        tokio::select! {
            outcome = self.ended() => {
                deregister(registration).await;
                outcome
            }
            // It has either failed or goes on for ever.
            Err(error) = registered => {
                deregister(registration).await;
                Err(self.stop(error).await)
            }
            () = signal => self.shut_down(registration).await,
        }
    }

    /// Waits for a server that ends by itself.
    async fn ended(&mut self) -> Result<(), ServeError> {
        match (&mut self.task).await {
            Ok(outcome) => outcome.map_err(ServeError::from),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Only a runtime that is shutting down cancels it.
            Err(_) => pending().await,
        }
    }

    /// Ends the server because it could not be registered. No client has been told of it, so nobody is waited for.
    async fn stop(mut self, error: RegisterError) -> ServeError {
        self.connections.drain();
        self.connections.cut();
        match self.ended().await {
            Ok(()) => error.into(),
            Err(failed) => failed,
        }
    }

    async fn shut_down(mut self, registration: Registration) -> Result<(), ServeError> {
        deregister(registration).await;
        tracing::info!(grace = ?self.grace, "accepting on while clients learn");
        tokio::select! {
            () = sleep(self.grace) => {}
            outcome = self.ended() => return outcome,
        }
        self.connections.drain();
        tracing::info!(connections = self.connections.open(), timeout = ?self.drain, "draining");
        if let Ok(outcome) = timeout(self.drain, self.ended()).await {
            return outcome;
        }
        tracing::warn!(
            connections = self.connections.open(),
            "the drain timeout has passed: cutting the connections that are left"
        );
        self.connections.cut();
        self.ended().await
    }
}

async fn deregister(registration: Registration) {
    let key = registration.key().to_owned();
    match registration.deregister().await {
        Ok(()) => tracing::info!(key, "deregistered"),
        Err(error) => {
            tracing::warn!(key, %error, "could not deregister; the entry goes with its lease");
        }
    }
}
