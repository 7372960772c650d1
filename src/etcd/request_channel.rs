//! The way of one request: the client that it is made with, and the service under the client, which knows where it went.

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
use super::token::TokenCell;
use crate::error::EtcdError;
use tonic_balance::{
    BalancedChannel, GRPC_TIMEOUT, ResponseBody, ResponseFuture, Routing, format_timeout,
};

/// What one request, or the stream that it opens, goes over. Clones are of the same request.
#[derive(Clone)]
pub(super) struct RequestChannel {
    pub(super) client: Arc<Client>,
    /// `None` for a client that the user made.
    pub(super) service: Option<RequestService>,
}

impl RequestChannel {
    /// Takes a client that the user made, whose connections are its own.
    pub(super) fn given(client: &Arc<Client>) -> Self {
        Self {
            client: Arc::clone(client),
            service: None,
        }
    }

    /// Makes a client for one request: which member has served it is not to be had through `etcd-client`.
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

    /// The member that was asked; if none was, the one whose connection has failed last.
    pub(super) fn endpoint(&self) -> String {
        let service = self.service.as_ref();
        service.map_or_else(|| GIVEN.to_owned(), RequestService::endpoint)
    }
}

impl std::fmt::Debug for RequestChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("endpoint", &self.endpoint())
            .finish_non_exhaustive()
    }
}

/// The channel over all members, for one request: adds the token, the deadline, and the wish to be refused by a member that has lost its
/// cluster.
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
        // Nobody was asked, and nothing has failed: connections are being made.
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
        // A token sent along with the request for a new one would have that refused as well.
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

/// What has no deadline: a watch ends by its watchdog, and a renewal's stream with its answer or with whoever waits for it.
const STREAMS: [&str; 2] = ["/etcdserverpb.Watch/Watch", LEASE_KEEP_ALIVE];
/// In place of a member's address.
const GIVEN: &str = "(the given client)";
pub(super) const AUTHENTICATE: &str = "/etcdserverpb.Auth/Authenticate";
pub(super) const LEASE_KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
