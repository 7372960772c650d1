//! The client of the gRPC health service: one call of `grpc.health.v1.Health/Watch`, on a connection that other calls use as well.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE, USER_AGENT};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Method, Request, Uri, Version};
use http_body::{Body, Frame};
use prost::Message;
use tonic::codec::{Codec, Streaming};
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use super::exchange::Exchange;
use super::http2::{Connection, OpenError};
use super::request_body::{Outgoing, Recall};
use super::response_body::{Broken, Incoming};

/// The parameters of a health check.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HealthCheck {
    /// The name of the service; empty for the whole server.
    pub(crate) service: String,
    pub(crate) scheme: Scheme,
    /// If set, replaces the endpoint's own authority.
    pub(crate) authority: Option<Authority>,
    pub(crate) user_agent: HeaderValue,
}

/// The status of a service in the health protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum ServingStatus {
    Unknown = 0,
    Serving = 1,
    NotServing = 2,
    ServiceUnknown = 3,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(enumeration = "ServingStatus", tag = "1")]
    status: i32,
}

/// The statuses that a server sends: first the current status, then each change. Dropping the value ends the call.
#[derive(Debug)]
pub(crate) struct Statuses(Streaming<HealthCheckResponse>);

impl HealthCheck {
    /// Starts a watch. Waits for the response head without a timeout.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the call.
    pub(crate) async fn watch(
        &self,
        connection: &Connection,
        endpoint: &Authority,
    ) -> Result<Statuses, Status> {
        let body = Outgoing::Single(self.message());
        let started = Exchange::start(connection, self.head(endpoint)?, body, Recall::Never);
        let mut exchange = started.map_err(|(error, _)| match error {
            OpenError::Gone(error) => Status::unavailable(error.to_string()),
            OpenError::Malformed(error) => Status::internal(error.to_string()),
        })?;
        let response = std::future::poll_fn(|cx| exchange.poll_head(cx)).await;
        let (head, body) = response.map_err(of_stream)?.into_parts();
        if let Some(status) = Status::from_header_map(&head.headers)
            && status.code() != Code::Ok
        {
            return Err(status);
        }
        let decoder = ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default().decoder();
        let limit = Some(MAX_MESSAGE);
        let streaming =
            Streaming::new_response(decoder, StatusesBody(body), head.status, None, limit);
        Ok(Statuses(streaming))
    }

    fn head(&self, endpoint: &Authority) -> Result<Request<()>, Status> {
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(self.scheme.clone());
        uri.authority = Some(self.authority.as_ref().unwrap_or(endpoint).clone());
        uri.path_and_query = Some(PathAndQuery::from_static(WATCH));
        let uri = Uri::from_parts(uri).map_err(|error| Status::internal(error.to_string()))?;
        let mut head = Request::new(());
        *head.method_mut() = Method::POST;
        *head.version_mut() = Version::HTTP_2;
        *head.uri_mut() = uri;
        let headers = head.headers_mut();
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(USER_AGENT, self.user_agent.clone());
        Ok(head)
    }

    /// Returns the request message with gRPC's prefix: the compression flag (not compressed) and the length.
    fn message(&self) -> Bytes {
        let request = HealthCheckRequest {
            service: self.service.clone(),
        };
        let message = request.encode_to_vec();
        let mut frame = BytesMut::with_capacity(5 + message.len());
        frame.put_u8(0);
        frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
        frame.put_slice(&message);
        frame.freeze()
    }
}

impl Statuses {
    /// Returns the next status, or `None` if the server has ended the call without an error.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Option<ServingStatus>, Status> {
        let response = self.0.message().await?;
        // An unknown status value decodes as `Unknown`, which does not count as serving.
        Ok(response.map(|response| response.status()))
    }
}

/// A response body in the form that tonic requires.
struct StatusesBody(Incoming);

impl Body for StatusesBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = self.0.poll_frame(cx);
        frame.map_err(|broken| match broken {
            Broken::Stream(error) => of_stream(error),
            Broken::Request(status) => status,
        })
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "`map_err` requires a function that takes the error by value"
)]
fn of_stream(error: h2::Error) -> Status {
    Status::unavailable(error.to_string())
}

const WATCH: &str = "/grpc.health.v1.Health/Watch";
/// Limit on the size of a message. A status message usually has at most two bytes. A message above this limit is rejected before memory is
/// allocated for it.
const MAX_MESSAGE: usize = 1 << 10;
