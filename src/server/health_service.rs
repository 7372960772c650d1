//! The health service of a server that registers itself. While the server serves, the service reports the statuses of a reporter. Once the
//! shutdown begins, the service reports `NOT_SERVING` for every name that the reporter has. The name `readiness` is `NOT_SERVING` as well
//! while the server is not ready.
//!
//! A reporter alone is not sufficient. It does not list its names, so the server could not set all of them to `NOT_SERVING`. Its open
//! watches would also delay the drain.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::pb::health_check_response::ServingStatus as Wire;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_health::server::{HealthService, WatchStream as Reported};

use super::readiness::{self, READINESS};
use crate::registration::{Health as Source, RegistrationState, ServerState};

/// Returns the service to add to the router.
pub(super) async fn service(
    source: Source,
    registered: Vec<String>,
    states: watch::Receiver<ServerState>,
    registration: watch::Receiver<RegistrationState>,
) -> HealthServer<LameDuck> {
    let Source { reporter, services } = source;
    let reported = HealthService::from_health_reporter(reporter.clone());
    let service = READINESS.to_owned();
    let request = Request::new(HealthCheckRequest { service });
    if reported.check(request).await.is_err() {
        let serving = ServingStatus::Serving;
        reporter.set_service_status(READINESS, serving).await;
    }
    if services {
        for service in registered {
            let serving = ServingStatus::Serving;
            reporter.set_service_status(service, serving).await;
        }
    }
    HealthServer::new(LameDuck {
        reported,
        states,
        ready: readiness::follow(registration),
    })
}

/// A health service that reports `NOT_SERVING` once the shutdown of its server begins.
#[derive(Debug)]
pub(super) struct LameDuck {
    reported: HealthService,
    states: watch::Receiver<ServerState>,
    ready: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl Health for LameDuck {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let is_readiness = request.get_ref().service == READINESS;
        // For an unknown name, the result is the error of the reporter, also during the shutdown.
        let reported = self.reported.check(request).await?;
        let is_unready = is_readiness && !*self.ready.borrow();
        if is_unready || self.states.borrow().is_stopping() {
            return Ok(Response::new(not_serving()));
        }
        Ok(reported)
    }

    type WatchStream = Watching;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Watching>, Status> {
        let is_readiness = request.get_ref().service == READINESS;
        let reported = self.reported.watch(request).await?.into_inner();
        let ready = is_readiness.then(|| WatchStream::new(self.ready.clone()));
        Ok(Response::new(Watching {
            reported,
            latest: None,
            states: WatchStream::new(self.states.clone()),
            is_ready: ready.is_none(),
            ready,
            stopping: false,
            draining: false,
            last: None,
        }))
    }
}

/// The stream of the statuses of one name. It ends when the listener closes, because an open watch would delay the drain. The last status
/// before this end is always `NOT_SERVING`.
#[derive(Debug)]
pub(super) struct Watching {
    reported: Reported,
    /// The latest status of the reporter.
    latest: Option<HealthCheckResponse>,
    states: WatchStream<ServerState>,
    /// The readiness. `None` for other names, which are always ready.
    ready: Option<WatchStream<bool>>,
    is_ready: bool,
    stopping: bool,
    draining: bool,
    /// The last status that was sent.
    last: Option<HealthCheckResponse>,
}

impl Watching {
    /// Returns the next status that differs from the last one. During the shutdown, and while the server is not ready, it is `NOT_SERVING`.
    fn poll_status(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<HealthCheckResponse, Status>>> {
        while !self.draining
            && let Poll::Ready(state) = Pin::new(&mut self.states).poll_next(cx)
        {
            let state = state.as_ref();
            self.stopping = state.is_none_or(ServerState::is_stopping);
            self.draining = state.is_none_or(ServerState::is_draining);
        }
        while let Some(ready) = &mut self.ready
            && let Poll::Ready(is_ready) = Pin::new(ready).poll_next(cx)
        {
            // The end of the stream is the end of the registration.
            self.is_ready = is_ready.unwrap_or_default();
            if is_ready.is_none() {
                self.ready = None;
            }
        }
        while !self.stopping
            && let Poll::Ready(reported) = Pin::new(&mut self.reported).poll_next(cx)
        {
            match reported {
                Some(Ok(status)) => self.latest = Some(status),
                end => return Poll::Ready(end),
            }
        }
        let status = if self.stopping || !self.is_ready {
            Some(not_serving())
        } else {
            self.latest
        };
        // `NOT_SERVING` is sent even if the server is already draining, so that `SERVING` is never the last status of a watch.
        if let Some(status) = status
            && self.last != Some(status)
        {
            return Poll::Ready(Some(Ok(status)));
        }
        if self.draining {
            return Poll::Ready(None);
        }
        Poll::Pending
    }
}

impl Stream for Watching {
    type Item = Result<HealthCheckResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let status = ready!(self.poll_status(cx));
        if let Some(Ok(status)) = &status {
            self.last = Some(*status);
        }
        Poll::Ready(status)
    }
}

fn not_serving() -> HealthCheckResponse {
    HealthCheckResponse {
        status: Wire::NotServing.into(),
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;
    use tonic_health::server::HealthReporter;

    use super::*;

    #[tokio::test]
    async fn a_watcher_that_is_polled_late_receives_not_serving_before_the_end() {
        let (states, receiver) = watch::channel(ServerState::Serving);
        let health = LameDuck {
            reported: HealthService::from_health_reporter(HealthReporter::new()),
            states: receiver,
            ready: watch::channel(true).1,
        };
        let request = Request::new(HealthCheckRequest::default());
        let response = Health::watch(&health, request).await.expect("no error");
        let mut watching = response.into_inner();
        let first = watching.next().await.expect("a status").expect("no error");
        assert_eq!(first.status(), Wire::Serving);
        states.send_replace(ServerState::LameDuck);
        states.send_replace(ServerState::Draining);
        let last = watching.next().await.expect("a status").expect("no error");
        assert_eq!(last, not_serving());
        assert!(watching.next().await.is_none());
    }
}
