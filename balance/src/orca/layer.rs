//! The layer that adds a load report to each response of a server.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tonic::metadata::{Binary, MetadataValue};
use tower::{Layer, Service};

use super::recorder::LoadRecorder;
use crate::load_report::TRAILER;

/// A [`tower::Layer`] for a server, which adds a load report to the trailers of each response. See the [module](super).
///
/// The layer counts the calls of all servers and all services that have it and share its recorder. It should be the outermost layer, so that
/// it also counts the calls that other layers refuse. A response that has a report already keeps it. If a report is larger than 4 KiB, it is
/// sent without the metrics and utilizations that have a name, except `requests_in_flight`, because clients limit the size of trailers.
#[derive(Clone, Debug)]
pub struct ReportLoadLayer {
    recorder: LoadRecorder,
}

impl ReportLoadLayer {
    /// Creates a layer that reports what the recorder has recorded.
    #[must_use]
    pub fn new(recorder: LoadRecorder) -> Self {
        Self { recorder }
    }
}

impl<S> Layer<S> for ReportLoadLayer {
    type Service = ReportLoad<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ReportLoad {
            inner,
            recorder: self.recorder.clone(),
        }
    }
}

/// The service of [`ReportLoadLayer`].
#[derive(Clone, Debug)]
pub struct ReportLoad<S> {
    inner: S,
    recorder: LoadRecorder,
}

impl<S, B, R> Service<Request<B>> for ReportLoad<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<ReportLoadBody<R>>;
    type Error = S::Error;
    type Future = ReportLoadFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let path = request.uri().path();
        let is_counted = !EXEMPT.iter().any(|service| path.starts_with(service));
        let served = is_counted.then(|| Served::start(&self.recorder));
        ReportLoadFuture {
            future: self.inner.call(request),
            served,
        }
    }
}

/// A call that is being served. It is in flight until the value is dropped.
#[derive(Debug)]
struct Served {
    recorder: LoadRecorder,
}

impl Served {
    fn start(recorder: &LoadRecorder) -> Self {
        recorder.traffic().on_start();
        Self {
            recorder: recorder.clone(),
        }
    }

    /// Adds the report to the trailers, and records whether the call has failed.
    fn end(self, trailers: &mut HeaderMap) {
        let status = trailers.get(GRPC_STATUS).map(HeaderValue::as_bytes);
        if status.is_none_or(|status| FAILURES.contains(&status)) {
            self.recorder.traffic().on_failure();
        }
        // A response without a status is not gRPC, so its client expects no report.
        if status.is_some() && !trailers.contains_key(TRAILER) {
            // The call itself is still in flight, as it is at its client.
            let report = self.recorder.trailer(Instant::now());
            let value = MetadataValue::<Binary>::from_bytes(&report);
            if let Ok(value) = HeaderValue::from_bytes(value.as_encoded_bytes()) {
                trailers.insert(TRAILER, value);
            }
        }
    }

    /// Records that the response has ended without trailers.
    fn fail(self) {
        self.recorder.traffic().on_failure();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.recorder.traffic().on_end();
    }
}

pin_project! {
    /// The response future of [`ReportLoad`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ReportLoadFuture<F> {
        #[pin]
        future: F,
        served: Option<Served>,
    }
}

impl<F, R, E> Future for ReportLoadFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<ReportLoadBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.future.poll(cx));
        let mut served = this.served.take();
        let mut response = match response {
            Ok(response) => response,
            Err(error) => {
                if let Some(served) = served {
                    served.fail();
                }
                return Poll::Ready(Err(error));
            }
        };
        // A response without messages has its trailers in the head.
        if response.headers().contains_key(GRPC_STATUS)
            && let Some(served) = served.take()
        {
            served.end(response.headers_mut());
        }
        Poll::Ready(Ok(response.map(|body| ReportLoadBody { body, served })))
    }
}

pin_project! {
    /// The response body of [`ReportLoad`].
    #[derive(Debug)]
    pub struct ReportLoadBody<B> {
        #[pin]
        body: B,
        served: Option<Served>,
    }
}

impl<B: Body> Body for ReportLoadBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let mut frame = ready!(this.body.poll_frame(cx));
        match &mut frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_mut()
                    && let Some(served) = this.served.take()
                {
                    served.end(trailers);
                }
            }
            Some(Err(_)) | None => {
                if let Some(served) = this.served.take() {
                    served.fail();
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

const GRPC_STATUS: &str = "grpc-status";
/// The codes that the channel of this library counts as failures of a server: `UNKNOWN`, `RESOURCE_EXHAUSTED`, `INTERNAL`, `UNAVAILABLE` and
/// `DATA_LOSS`.
const FAILURES: &[&[u8]] = &[b"2", b"8", b"13", b"14", b"15"];
/// The services whose calls are no load: health checks, and the reports themselves. Their streams are open for as long as their clients run.
const EXEMPT: &[&str] = &[
    "/grpc.health.v1.Health/",
    "/xds.service.orca.v3.OpenRcaService/",
];

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use tonic::metadata::MetadataMap;

    use super::*;
    use crate::load_report::LoadReport;

    /// The frames of a response.
    struct Frames(Vec<Received>);

    impl Body for Frames {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Received>> {
            let next = (!self.0.is_empty()).then(|| self.0.remove(0));
            Poll::Ready(next)
        }

        fn is_end_stream(&self) -> bool {
            self.0.is_empty()
        }
    }

    /// A server that makes one response.
    struct Answer(Option<Response<Frames>>);

    impl Service<Request<()>> for Answer {
        type Response = Response<Frames>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Response<Frames>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<()>) -> Self::Future {
            std::future::ready(Ok(self.0.take().expect("only one call")))
        }
    }

    type Received = Result<Frame<Bytes>, &'static str>;

    /// Returns the frames of a response with a message and these trailers.
    fn message(trailers: HeaderMap) -> Vec<Received> {
        let data = Frame::data(Bytes::from_static(b"message"));
        vec![Ok(data), Ok(Frame::trailers(trailers))]
    }

    fn status(code: &'static str) -> HeaderMap {
        let mut trailers = HeaderMap::new();
        trailers.insert(GRPC_STATUS, HeaderValue::from_static(code));
        trailers
    }

    fn report(trailers: HeaderMap) -> Option<LoadReport> {
        let trailers = MetadataMap::from_headers(trailers);
        let bytes = trailers.get_bin(TRAILER)?.to_bytes().expect("base64");
        LoadReport::decode(&bytes, Instant::now())
    }

    /// Makes a call, and returns the headers of the response and its body.
    async fn call(
        recorder: &LoadRecorder,
        path: &str,
        head: HeaderMap,
        frames: Vec<Received>,
    ) -> (HeaderMap, Pin<Box<ReportLoadBody<Frames>>>) {
        let mut response = Response::new(Frames(frames));
        *response.headers_mut() = head;
        let layer = ReportLoadLayer::new(recorder.clone());
        let mut server = layer.layer(Answer(Some(response)));
        let request = Request::builder().uri(path).body(()).expect("a request");
        let Ok(response) = server.call(request).await;
        let (head, body) = response.into_parts();
        (head.headers, Box::pin(body))
    }

    /// Reads a body to its end, and returns its trailers.
    async fn trailers(body: &mut Pin<Box<ReportLoadBody<Frames>>>) -> Option<HeaderMap> {
        let mut trailers = None;
        while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            trailers = frame.ok().and_then(|frame| frame.into_trailers().ok());
        }
        trailers
    }

    const PATH: &str = "/helloworld.Greeter/SayHello";

    #[tokio::test(start_paused = true)]
    async fn the_trailers_of_each_response_have_a_report() {
        let recorder = LoadRecorder::new();
        recorder.set_application_utilization(0.5);
        let stream = || message(status("0"));
        let (head, mut first) = call(&recorder, PATH, HeaderMap::new(), stream()).await;
        assert!(head.is_empty());
        let (_, mut second) = call(&recorder, PATH, HeaderMap::new(), stream()).await;
        assert_eq!(recorder.requests_in_flight(), 2);
        let first = report(trailers(&mut first).await.expect("trailers")).expect("a report");
        assert_eq!(first.application_utilization(), Some(0.5));
        assert_eq!(first.requests_in_flight(), Some(2));
        assert_eq!(first.requests_per_second(), None, "no second has passed");
        tokio::time::advance(std::time::Duration::from_secs(2)).await;
        let second = report(trailers(&mut second).await.expect("trailers")).expect("a report");
        assert_eq!(second.requests_in_flight(), Some(1));
        assert_eq!(second.requests_per_second(), Some(0.5));
        assert_eq!(recorder.requests_in_flight(), 0);
    }

    #[tokio::test]
    async fn a_response_that_consists_of_headers_has_a_report_in_them() {
        let recorder = LoadRecorder::new();
        let (head, _body) = call(&recorder, PATH, status("5"), Vec::new()).await;
        let report = report(head).expect("a report");
        assert_eq!(report.requests_in_flight(), Some(1));
        assert_eq!(recorder.requests_in_flight(), 0, "the response has ended");
    }

    #[tokio::test]
    async fn health_checks_and_the_service_of_the_reports_are_not_counted() {
        let recorder = LoadRecorder::new();
        for path in [
            "/grpc.health.v1.Health/Watch",
            "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics",
        ] {
            let stream = message(status("0"));
            let (_, mut body) = call(&recorder, path, HeaderMap::new(), stream).await;
            assert_eq!(recorder.requests_in_flight(), 0);
            let trailers = trailers(&mut body).await.expect("trailers");
            assert_eq!(report(trailers), None);
        }
    }

    #[tokio::test]
    async fn a_response_that_is_not_grpc_has_no_report() {
        let recorder = LoadRecorder::new();
        let not_grpc = message(HeaderMap::new());
        let (_, mut body) = call(&recorder, PATH, HeaderMap::new(), not_grpc).await;
        let trailers = trailers(&mut body).await.expect("trailers");
        assert!(trailers.is_empty());
    }

    #[tokio::test]
    async fn a_report_of_the_handler_is_kept() {
        let recorder = LoadRecorder::new();
        let mut own = status("0");
        own.insert(TRAILER, HeaderValue::from_static("SQAAAAAAAOA/"));
        let stream = message(own);
        let (_, mut body) = call(&recorder, PATH, HeaderMap::new(), stream).await;
        let report = report(trailers(&mut body).await.expect("trailers")).expect("a report");
        assert_eq!(report.application_utilization(), Some(0.5));
        assert_eq!(report.requests_in_flight(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn failures_of_the_server_are_counted_and_errors_of_the_caller_are_not() {
        let recorder = LoadRecorder::new();
        for code in ["0", "5", "13", "14"] {
            let stream = message(status(code));
            let (_, mut body) = call(&recorder, PATH, HeaderMap::new(), stream).await;
            trailers(&mut body).await;
        }
        let (_, mut body) = call(&recorder, PATH, HeaderMap::new(), vec![Err("broken")]).await;
        trailers(&mut body).await;
        let (_, body) = call(&recorder, PATH, HeaderMap::new(), message(status("0"))).await;
        drop(body);
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        let report = recorder.report(Instant::now());
        let rates = (report.rps_fractional, report.eps);
        assert_eq!(rates, (6.0, 3.0), "a cancelled call is not a failure");
        assert_eq!(recorder.requests_in_flight(), 0);
    }
}
