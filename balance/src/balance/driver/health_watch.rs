//! Active health checks: for each connection, a task watches the health status that the server reports, and the driver applies this status.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use super::driver::Driver;
use super::event_queue::SubchannelEvent;
use super::subchannel_table::DialId;
use crate::balance::health_status::{Health, HealthWatch, Restart};
use crate::balance::ready_connection::ReadyConnection;
use crate::balance::subchannel::StopOnDrop;
use crate::transport::health_client::HealthCheck;

impl Driver {
    /// Starts the health watch of a connection. Returns `None` if health checks are disabled, or if the peer allows only one stream,
    /// because calls need that stream.
    pub(super) fn watch_health(
        &mut self,
        dial_id: DialId,
        connection: &Arc<ReadyConnection>,
    ) -> Option<StopOnDrop> {
        let check = self.options.health_check.clone()?;
        let address = connection.endpoint().address();
        if !connection.http2().has_reserve() {
            tracing::warn!(%address, "no health check: the endpoint allows only one stream, and calls need that stream");
            return None;
        }
        let report = self.events.reporter(dial_id);
        let event = move |health| report(SubchannelEvent::Health(health));
        let watch = HealthWatch::new(self.options.max_backoff);
        let rng = self.rng.fork();
        let first_status_timeout = self.connector.timeout;
        let watching = run(
            check,
            Arc::clone(connection),
            watch,
            rng,
            first_status_timeout,
            event.clone(),
        );
        let watching = async move {
            let _report_panic = ReportPanic(event);
            watching.await;
        };
        Some(StopOnDrop(tokio::spawn(watching).abort_handle()))
    }

    pub(super) fn on_health(&mut self, dial_id: DialId, health: Health) {
        let Some((id, address, subchannel)) = self.subchannels.of_connection(dial_id) else {
            return;
        };
        let address = address.clone();
        // A report can still be queued when its watch ends.
        if *subchannel.health() == health || !subchannel.has_health_watch() {
            return;
        }
        subchannel.set_health(health.clone());
        match health {
            Health::Unknown => {}
            Health::Serving => {
                tracing::info!(%address, "endpoint is healthy");
                // If this is the second connection, it replaces the silent connections (on which nothing was read for a while) only now.
                // Before its server reports SERVING, the second connection may be worse than a silent one.
                self.replace_silent(&address, id);
                self.begin_weight(&address, Instant::now());
            }
            Health::NotServing(reason) => {
                tracing::info!(%address, %reason, "endpoint is not healthy and gets no calls");
                self.set_last_error(&address, reason);
            }
        }
        self.update_ready_set(id);
        self.reclassify(&address);
    }
}

/// Reports a panic of the health watch. Otherwise the connection would keep its last health state forever.
struct ReportPanic<F: Fn(Health)>(F);

impl<F: Fn(Health)> Drop for ReportPanic<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.0)(Health::NotServing("its health watch has panicked".into()));
        }
    }
}

/// Runs one health watch after another, until the server reports that it has no health service. The task that runs this function is aborted
/// when the subchannel is no longer `Ready`.
async fn run(
    check: HealthCheck,
    connection: Arc<ReadyConnection>,
    mut watch: HealthWatch,
    mut rng: fastrand::Rng,
    first_status_timeout: Duration,
    event: impl Fn(Health) + Send,
) {
    loop {
        let began = Instant::now();
        let ended = follow(
            &check,
            &connection,
            &mut watch,
            first_status_timeout,
            &event,
        )
        .await;
        let lasted = Instant::now().saturating_duration_since(began);
        match watch.on_end(&ended, lasted, &mut rng) {
            Restart::Now => {}
            Restart::After(health, wait) => {
                event(health);
                sleep(wait).await;
            }
            Restart::Never(health) => {
                let address = connection.endpoint().address();
                tracing::debug!(%address, "the endpoint has no health service, so it counts as healthy");
                return event(health);
            }
        }
    }
}

/// Runs one watch until it ends, and returns the status with which it ended.
async fn follow(
    check: &HealthCheck,
    connection: &ReadyConnection,
    watch: &mut HealthWatch,
    first_status_timeout: Duration,
    event: &(impl Fn(Health) + Send),
) -> Status {
    let endpoint = connection.endpoint();
    let first = async {
        let mut statuses = check
            .watch(connection.http2(), endpoint.authority())
            .await?;
        let status = statuses.next().await?;
        Ok((statuses, status))
    };
    let (mut statuses, mut status) = match timeout(first_status_timeout, first).await {
        Ok(Ok(first)) => first,
        Ok(Err(status)) => return status,
        // A health server sends its current status at once, so a timeout is a failure.
        Err(_) => {
            return Status::deadline_exceeded(format!("no answer within {first_status_timeout:?}"));
        }
    };
    while let Some(new) = status {
        if let Some(health) = watch.on_status(new) {
            event(health);
        }
        status = match statuses.next().await {
            Ok(status) => status,
            Err(status) => return status,
        };
    }
    Status::unavailable("the watch ended")
}
