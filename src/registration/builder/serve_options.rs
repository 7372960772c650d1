//! The options of a registration that apply only to a server that registers itself ([`ServeRegistered`](crate::ServeRegistered)).

use std::time::Duration;

use tokio::sync::watch;

use super::registration_builder::RegistrationBuilder;
use crate::registration::handle::RegistrationHandle;
#[cfg(feature = "health")]
use crate::registration::serve_options::Health;
use crate::registration::serve_options::ServerState;

impl RegistrationBuilder {
    /// Sets the grace period: how long a server continues to accept connections after its entry was removed from etcd. In this time,
    /// clients receive the removal. The default is 1 s, many times the delay of a watch event. [`register`](Self::register) rejects this
    /// option.
    pub fn grace_period(mut self, grace: Duration) -> Self {
        self.serve.grace_period = Some(grace);
        self
    }

    /// Sets how long calls in flight may take after the listener was closed. When this time is over, the remaining connections are cut. The
    /// default is 20 s: together with 5 s for a deregistration and 1 s of grace, the shutdown stays below the 30 s that Kubernetes grants a
    /// pod. [`register`](Self::register) rejects this option.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.serve.drain_timeout = Some(timeout);
        self
    }

    /// Returns a handle of a registration that [`ServeRegistered`](crate::ServeRegistered) starts. The handle returns the address and the
    /// keys of the server. It can also pause and resume the registration, change its weight, and stop the server while it serves.
    ///
    /// ```no_run
    /// # async fn run(router: tonic::transport::server::Router, registry: tonic_etcd::Registry) -> Result<(), Box<dyn std::error::Error>> {
    /// use tonic_etcd::ServeRegistered;
    ///
    /// let registration = registry.registration("helloworld.Greeter");
    /// let handle = registration.handle();
    /// tokio::spawn(async move {
    ///     if let Some(address) = handle.address().await {
    ///         println!("serving on {address}");
    ///     }
    /// });
    /// router.serve_registered("0.0.0.0:0".parse()?, registration).await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn handle(&self) -> RegistrationHandle {
        RegistrationHandle::new(self.serve.started.subscribe(), self.serve.stop.clone())
    }

    /// Returns a receiver for the state of a server that registers itself ([`ServeRegistered`](crate::ServeRegistered)). A handler of an
    /// endless stream can use this receiver to end the stream at the shutdown. The last state contains the number of cut connections.
    ///
    /// ```no_run
    /// # fn run(registry: &tonic_etcd::Registry) {
    /// let registration = registry.registration("helloworld.Greeter");
    /// let mut states = registration.watch_server_state();
    /// tokio::spawn(async move {
    ///     if states.wait_for(|state| state.is_draining()).await.is_ok() {
    ///         // End the endless streams.
    ///     }
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn watch_server_state(&self) -> watch::Receiver<ServerState> {
        self.serve.states.subscribe()
    }
}

#[cfg(feature = "health")]
#[cfg_attr(docsrs, doc(cfg(feature = "health")))]
impl RegistrationBuilder {
    /// Adds the service `grpc.health.v1.Health` to a server that registers itself ([`ServeRegistered`](crate::ServeRegistered)). By default
    /// no health service is added. [`register`](Self::register) rejects this option.
    ///
    /// The server as a whole (the name `""`) and each registered service are `SERVING` until the shutdown begins. All names then become
    /// `NOT_SERVING` before any other step of the shutdown, and each `Watch` call ends when the listener closes. For further names, or to
    /// set a status yourself, see [`health_reporter`](Self::health_reporter). These statuses do not depend on etcd: a server that has lost
    /// its entry still serves.
    ///
    /// The name `readiness` is `SERVING` while the server is in service: from its first registration until the shutdown, except while it is
    /// paused or drained by an operator, and while another server has its entry. An outage of etcd does not change this status. It is meant
    /// for readiness probes, so that a rolling update waits for the registration. A liveness probe must not use it.
    ///
    /// ```no_run
    /// # use tonic::transport::server::Router;
    /// use tonic_etcd::{Registry, ServeRegistered};
    ///
    /// # async fn run(router: Router) -> Result<(), Box<dyn std::error::Error>> {
    /// let registry = Registry::connect(["127.0.0.1:2379"]).await?;
    /// let registration = registry.registration("helloworld.Greeter").health();
    /// router.serve_registered("0.0.0.0:50051".parse()?, registration).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The router must not have its own health service: tonic panics if a service is added twice. The layers of the server also apply to
    /// this service.
    pub fn health(mut self) -> Self {
        self.serve.health = Some(Health {
            reporter: tonic_health::server::HealthReporter::new(),
            services: true,
        });
        self
    }

    /// Adds the health service like [`health`](Self::health), but with the statuses of `reporter`. The reporter can set any name at any
    /// time. Once the shutdown begins, all names are `NOT_SERVING`, whatever statuses the reporter has. The name `readiness` is `SERVING`
    /// only if the server is in service and the reporter's own status of this name is `SERVING`. If the reporter has no such status at the
    /// start, the server sets it to `SERVING`.
    ///
    /// ```no_run
    /// # async fn run(registry: tonic_etcd::Registry) {
    /// use tonic_health::{ServingStatus, server::HealthReporter};
    ///
    /// let reporter = HealthReporter::new();
    /// reporter.set_service_status("helloworld.Greeter", ServingStatus::Serving).await;
    /// let registration = registry.registration("helloworld.Greeter").health_reporter(reporter.clone());
    /// # }
    /// ```
    ///
    /// `tonic_health::server::health_reporter()` returns a reporter and a `HealthServer`. Pass only the reporter to this function, and do
    /// not add the `HealthServer` to the router: the service that is added here reads the same reporter.
    pub fn health_reporter(mut self, reporter: tonic_health::server::HealthReporter) -> Self {
        self.serve.health = Some(Health {
            reporter,
            services: false,
        });
        self
    }
}
