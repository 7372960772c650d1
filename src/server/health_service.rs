//! The health service of a server that registers itself. While the server serves, the service reports the statuses of a reporter. Once the
//! shutdown begins, the service reports `NOT_SERVING` for every name that the reporter has.
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

use crate::registration::{Health as Source, ServerState};

/// Returns the service to add to the router.
pub(super) async fn service(
    source: Source,
    registered: Vec<String>,
    states: watch::Receiver<ServerState>,
) -> HealthServer<LameDuck> {
    let Source { reporter, services } = source;
    if services {
        for service in registered {
            let serving = ServingStatus::Serving;
            reporter.set_service_status(service, serving).await;
        }
    }
    HealthServer::new(LameDuck {
        reported: HealthService::from_health_reporter(reporter),
        states,
    })
}

/// A health service that reports `NOT_SERVING` once the shutdown of its server begins.
#[derive(Debug)]
pub(super) struct LameDuck {
    reported: HealthService,
    states: watch::Receiver<ServerState>,
}

#[tonic::async_trait]
impl Health for LameDuck {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        // For an unknown name, the result is the error of the reporter, also during the shutdown.
        let reported = self.reported.check(request).await?;
        if self.states.borrow().is_stopping() {
            return Ok(Response::new(not_serving()));
        }
        Ok(reported)
    }

    type WatchStream = Watching;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Watching>, Status> {
        let reported = self.reported.watch(request).await?.into_inner();
        Ok(Response::new(Watching {
            reported,
            states: WatchStream::new(self.states.clone()),
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
    states: WatchStream<ServerState>,
    stopping: bool,
    draining: bool,
    /// The last status that was sent.
    last: Option<HealthCheckResponse>,
}

impl Watching {
    /// Returns the next status. During the shutdown, `NOT_SERVING` is sent, unless it is already the last status that was sent.
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
        if !self.stopping {
            return Pin::new(&mut self.reported).poll_next(cx);
        }
        // `NOT_SERVING` is sent even if the server is already draining, so that `SERVING` is never the last status of a watch.
        if self.last != Some(not_serving()) {
            return Poll::Ready(Some(Ok(not_serving())));
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
