//! The channel of one request. It consists of an `etcd_client::Client` that is created for the request, and of the tower service below that
//! client. The service records the member that receives the request.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use http::HeaderValue;
use tonic::Status;
use tonic::body::Body;
use tower::util::{BoxCloneSyncService, ServiceExt};
use tower::{BoxError, Service};

use super::error;
use super::token_cell::TokenCell;
use crate::error::EtcdError;
use tonic_balance::{
    __private::{GRPC_TIMEOUT, format_timeout},
    BalancedChannel,
    channel::{ResponseBody, ResponseFuture, Routing},
};

/// The channel of one request, or of the stream that the request opens. Clones belong to the same request.
#[derive(Clone)]
pub(super) struct RequestChannel {
    pub(super) client: Arc<Client>,
    /// `None` for an external client: a client that the user has passed to `Registry::from_client`.
    pub(super) service: Option<RequestService>,
}

impl RequestChannel {
    /// Wraps an external client, which has its own connections.
    pub(super) fn external(client: &Arc<Client>) -> Self {
        Self {
            client: Arc::clone(client),
            service: None,
        }
    }

    /// Creates a client for one request. If several requests shared a client, it would be unknown which member served which request,
    /// because `etcd-client` does not expose the member.
    pub(super) async fn over(service: RequestService) -> Result<Self, EtcdError> {
        let boxed = service
            .clone()
            .map_response(|response: http::Response<ResponseBody>| response.map(Body::new))
            .map_err(BoxError::from);
        let custom = etcd_client::Channel::Custom(BoxCloneSyncService::new(boxed));
        let client = Client::from_channel(custom, Some(ConnectOptions::new())).await;
        let client =
            client.map_err(|source| error::of_client("connect", &service.endpoint(), source))?;
        Ok(Self {
            client: Arc::new(client),
            service: Some(service),
        })
    }

    /// Returns the address of the member that received the request. If no member received it, returns the member whose connection failed
    /// last. For an external client, returns a placeholder.
    pub(super) fn endpoint(&self) -> String {
        let service = self.service.as_ref();
        service.map_or_else(|| EXTERNAL_CLIENT.to_owned(), RequestService::endpoint)
    }
}

impl std::fmt::Debug for RequestChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RequestChannel")
            .field("endpoint", &self.endpoint())
            .finish_non_exhaustive()
    }
}

/// The channel over all members, for one request. It adds the token, the deadline of a unary request, and the `hasleader` header. A member
/// without a leader rejects a request with this header.
#[derive(Clone)]
pub(super) struct RequestService {
    pub(super) channel: BalancedChannel,
    pub(super) routing: Routing,
    pub(super) deadline: Duration,
    pub(super) token: TokenCell,
}

impl RequestService {
    pub(super) fn endpoint(&self) -> String {
        let address = self.routing.address();
        let address = address.or_else(|| self.channel.last_failed_endpoint());
        // There is no address if the request was not sent and no connection has failed, for example while the first connections are being
        // established.
        address.map_or_else(|| "(no member)".to_owned(), |address| address.to_string())
    }
}

impl Service<http::Request<Body>> for RequestService {
    type Response = http::Response<ResponseBody>;
    type Error = Status;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> ResponseFuture {
        let path = request.uri().path();
        let unary = !STREAMS.contains(&path);
        // `Authenticate` is sent without a token, because etcd would reject it if the token had expired.
        let token = self.token.get().filter(|_| path != AUTHENTICATE);
        let headers = request.headers_mut();
        headers.insert("hasleader", HeaderValue::from_static("true"));
        if unary {
            headers.insert(GRPC_TIMEOUT, format_timeout(self.deadline));
        }
        if let Some(token) = token {
            headers.insert("token", HeaderValue::clone(&token));
        }
        self.channel.call_routed(&self.routing, request)
    }
}

/// Streaming methods, which are sent without `grpc-timeout`. The task of a watch stream ends the stream if the server is silent. A
/// keep-alive stream ends with its response, or when the caller drops the future.
const STREAMS: [&str; 2] = ["/etcdserverpb.Watch/Watch", LEASE_KEEP_ALIVE];
/// Shown in place of the address of a member if the client is external.
const EXTERNAL_CLIENT: &str = "(external client)";
pub(super) const AUTHENTICATE: &str = "/etcdserverpb.Auth/Authenticate";
pub(super) const LEASE_KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
