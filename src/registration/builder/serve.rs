//! The options of a registration that only [`ServeRegistered`](crate::ServeRegistered) reads.

use std::time::Duration;

use tokio::sync::watch;

use super::RegistrationBuilder;
#[cfg(feature = "health")]
use crate::registration::serve::Health;
use crate::registration::serve::ServerState;

impl RegistrationBuilder {
    /// Only for [`ServeRegistered`](crate::ServeRegistered): how long a server goes on accepting connections after it was
    /// deregistered, so that every client has learned of it first. Default 1 s, many times what a watch event takes.
    pub fn grace_period(mut self, grace: Duration) -> Self {
        self.serve.grace_period = grace;
        self
    }

    /// Only for [`ServeRegistered`](crate::ServeRegistered): how long calls in flight may take after the listener was closed; what is
    /// left then is cut. Default 20 s: with 5 s for a deregistration and 1 s of grace it stays inside the 30 s that Kubernetes grants
    /// a pod to end.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.serve.drain_timeout = timeout;
        self
    }

    /// Only for [`ServeRegistered`](crate::ServeRegistered): the server's state as a watch, for endless streams that are to end with it,
    /// and for what was cut.
    ///
    /// ```no_run
    /// # fn run(registry: &tonic_etcd::Registry) {
    /// let registration = registry.registration("helloworld.Greeter");
    /// let mut states = registration.watch_server_state();
    /// tokio::spawn(async move {
    ///     if states.wait_for(|state| state.is_draining()).await.is_ok() {
    ///         // End what would go on for ever.
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
    /// Only for [`ServeRegistered`](crate::ServeRegistered): serves `grpc.health.v1.Health` as well. None by default.
    ///
    /// The server as a whole (the name `""`) and each registered service are `SERVING` until the server is told to stop; then, before
    /// anything else happens, all are `NOT_SERVING`, and a `Watch` is ended when the listener closes. For further names, or a status of
    /// your own, see [`health_reporter`](Self::health_reporter). etcd has no say in it: a server that etcd has lost serves on.
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
    /// The router must not have a health service of its own: tonic panics when one is added twice. The layers of the server apply to
    /// this one, too.
    pub fn health(mut self) -> Self {
        self.serve.health = Some(Health {
            reporter: tonic_health::server::HealthReporter::new(),
            services: true,
        });
        self
    }

    /// As [`health`](Self::health), with the statuses that `reporter` is told, of any names and whenever you like. When the server is
    /// told to stop, all of them are `NOT_SERVING`, whatever the reporter says.
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
    /// Leave out the `HealthServer` that `tonic_health::server::health_reporter()` gives along with a reporter: the one that is served
    /// here reads the same reporter.
    pub fn health_reporter(mut self, reporter: tonic_health::server::HealthReporter) -> Self {
        self.serve.health = Some(Health {
            reporter,
            services: false,
        });
        self
    }
}
