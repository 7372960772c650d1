//! A layer that adds trailing metadata to a response if the request demands it. A service on tonic cannot send trailing metadata itself.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body::Frame;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tower::{Layer, Service};

pub const INITIAL: &str = "x-grpc-test-echo-initial";
pub const TRAILING: &str = "x-grpc-test-echo-trailing-bin";

#[derive(Clone, Copy)]
pub struct EchoTrailers;

impl<S> Layer<S> for EchoTrailers {
    type Service = Echo<S>;

    fn layer(&self, inner: S) -> Echo<S> {
        Echo(inner)
    }
}

#[derive(Clone)]
pub struct Echo<S>(S);

impl<S> Service<Request<Body>> for Echo<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<Response<Body>, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let value = request.headers().get(TRAILING).cloned();
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(match value {
                Some(value) => answer.map(|body| Body::new(Trailed { body, value })),
                None => answer,
            })
        })
    }
}

struct Trailed {
    body: Body,
    value: HeaderValue,
}

impl http_body::Body for Trailed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            trailers.insert(TRAILING, self.value.clone());
        }
        Poll::Ready(frame)
    }
}
