//! The service that reports the load out of band.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::pin::Pin;
use std::task::{Context, Poll, ready as ready_or_pending};
use std::time::Duration;

use http::{Request, Response};
use http_body::Body as HttpBody;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_stream::Stream;
use tonic::Status;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, ServerStreamingService};
use tonic_prost::ProstCodec;
use tower::{BoxError, Service};

use super::recorder::LoadRecorder;
use crate::load_report::OrcaLoadReport;

/// The service `xds.service.orca.v3.OpenRcaService`, which sends load reports at an interval. [`LoadRecorder::service`] creates it.
#[derive(Clone, Debug)]
pub struct OpenRcaService {
    recorder: LoadRecorder,
    min_interval: Duration,
}

impl LoadRecorder {
    /// Returns the service that reports the load out of band: `xds.service.orca.v3.OpenRcaService`. Add it to the server.
    ///
    /// A client names the interval of its reports. An interval that is shorter than `min_interval` counts as `min_interval`, and so does a
    /// missing interval. In other implementations of gRPC, the default is 30 s. The minimum of `min_interval` is 100 ms.
    #[must_use]
    pub fn service(&self, min_interval: Duration) -> OpenRcaService {
        OpenRcaService {
            recorder: self.clone(),
            min_interval: min_interval.max(MIN_INTERVAL),
        }
    }
}

impl OpenRcaService {
    /// Returns the interval of the reports to a client.
    fn interval(&self, request: &OrcaLoadReportRequest) -> Duration {
        let requested = request.report_interval.as_ref().and_then(|interval| {
            let seconds = u64::try_from(interval.seconds).ok()?;
            let nanos = u32::try_from(interval.nanos).ok()?;
            Some(Duration::new(seconds, nanos.min(MAX_NANOS)))
        });
        requested
            .unwrap_or_default()
            .clamp(self.min_interval, self.min_interval.max(MAX_INTERVAL))
    }
}

impl NamedService for OpenRcaService {
    const NAME: &'static str = "xds.service.orca.v3.OpenRcaService";
}

impl<B> Service<Request<B>> for OpenRcaService
where
    B: HttpBody + Send + 'static,
    B::Error: Into<BoxError> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if request.uri().path() != STREAM_CORE_METRICS {
            let status = Status::unimplemented("the service has only the method StreamCoreMetrics");
            return Box::pin(ready(Ok(status.into_http())));
        }
        let method = StreamCoreMetrics(self.clone());
        Box::pin(async move {
            let mut grpc = Grpc::new(Codec::default());
            Ok(grpc.server_streaming(method, request).await)
        })
    }
}

type Codec = ProstCodec<OrcaLoadReport, OrcaLoadReportRequest>;

/// The only method of the service.
struct StreamCoreMetrics(OpenRcaService);

impl ServerStreamingService<OrcaLoadReportRequest> for StreamCoreMetrics {
    type Response = OrcaLoadReport;
    type ResponseStream = Reports;
    type Future = Ready<Result<tonic::Response<Reports>, Status>>;

    fn call(&mut self, request: tonic::Request<OrcaLoadReportRequest>) -> Self::Future {
        let mut interval = tokio::time::interval(self.0.interval(request.get_ref()));
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ready(Ok(tonic::Response::new(Reports {
            recorder: self.0.recorder.clone(),
            interval,
        })))
    }
}

/// The reports to one client. The first one is sent at once.
#[derive(Debug)]
struct Reports {
    recorder: LoadRecorder,
    interval: Interval,
}

impl Stream for Reports {
    type Item = Result<OrcaLoadReport, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        ready_or_pending!(self.interval.poll_tick(cx));
        Poll::Ready(Some(Ok(self.recorder.report(Instant::now()))))
    }
}

/// `xds.service.orca.v3.OrcaLoadReportRequest`, without the names of request costs, which this service does not report.
#[derive(Clone, PartialEq, prost::Message)]
struct OrcaLoadReportRequest {
    #[prost(message, optional, tag = "1")]
    report_interval: Option<ProtoDuration>,
}

/// `google.protobuf.Duration`.
#[derive(Clone, PartialEq, prost::Message)]
struct ProtoDuration {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

const STREAM_CORE_METRICS: &str = "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics";
/// A shorter interval would cost the server more than the reports are worth.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// A longer interval is not distinguished from this one.
const MAX_INTERVAL: Duration = Duration::from_secs(24 * 60 * 60);
const MAX_NANOS: u32 = 999_999_999;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_client_is_not_shorter_than_that_of_the_server() {
        let service = LoadRecorder::new().service(Duration::from_secs(30));
        let interval = |seconds, nanos| {
            let report_interval = Some(ProtoDuration { seconds, nanos });
            service.interval(&OrcaLoadReportRequest { report_interval })
        };
        assert_eq!(interval(45, 500_000_000), Duration::from_millis(45_500));
        assert_eq!(interval(1, 0), Duration::from_secs(30));
        assert_eq!(interval(-1, -1), Duration::from_secs(30));
        assert_eq!(interval(i64::MAX, i32::MAX), MAX_INTERVAL);
        let none = OrcaLoadReportRequest::default();
        assert_eq!(service.interval(&none), Duration::from_secs(30));
        let fast = LoadRecorder::new().service(Duration::ZERO);
        assert_eq!(fast.interval(&none), MIN_INTERVAL);
    }
}
