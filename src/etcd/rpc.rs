//! Two calls that `etcd-client` does not offer in the required form: a single keep-alive that exposes the raft term of the response, and
//! the exchange of credentials for a token. The messages are those of etcd, with only the fields that are used here.

use std::fmt;
use std::time::Duration;

use http::uri::PathAndQuery;
use tokio_stream::StreamExt;
use tonic::Request;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;

use super::error;
use super::request_channel::{AUTHENTICATE, LEASE_KEEP_ALIVE, RequestService};
use super::token_cell::Credentials;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Header, LeaseId, Revision};

#[derive(Clone, PartialEq, prost::Message)]
struct ResponseHeader {
    #[prost(uint64, tag = "1")]
    cluster_id: u64,
    #[prost(int64, tag = "3")]
    revision: i64,
    #[prost(uint64, tag = "4")]
    raft_term: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct AuthenticateRequest {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    password: String,
}

/// Does not print the password.
impl fmt::Debug for AuthenticateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        f.debug_struct("AuthenticateRequest")
            .field("name", name)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct AuthenticateResponse {
    #[prost(string, tag = "2")]
    token: String,
}

/// Does not print the token.
impl fmt::Debug for AuthenticateResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthenticateResponse")
            .finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct LeaseKeepAliveRequest {
    #[prost(int64, tag = "1")]
    id: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LeaseKeepAliveResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(int64, tag = "3")]
    ttl: i64,
}

/// Exchanges a user name and a password for a token.
pub(super) async fn authenticate(
    service: &RequestService,
    credentials: &Credentials,
    deadline: Duration,
) -> Result<String, EtcdError> {
    const OPERATION: &str = "authenticate";
    let request = AuthenticateRequest {
        name: credentials.user.clone(),
        password: credentials.password.clone(),
    };
    let failed = |status| error::of_status(OPERATION, &service.endpoint(), status);
    let call = async {
        let mut grpc = Grpc::new(service.clone());
        grpc.ready().await.map_err(failed)?;
        let codec = ProstCodec::<AuthenticateRequest, AuthenticateResponse>::default();
        let path = PathAndQuery::from_static(AUTHENTICATE);
        let response = grpc.unary(Request::new(request), path, codec).await;
        response.map_err(failed)
    };
    let response = tokio::time::timeout(deadline, call)
        .await
        .map_err(|_| error::deadline(OPERATION, &service.endpoint(), deadline))??;
    Ok(response.into_inner().token)
}

/// Renews a lease over a new stream, which carries one request and one response. An open stream is not reused, because it can stall: while
/// the leader is frozen, an open stream on a healthy follower gets no response for seconds, but a new stream gets one at once.
pub(super) async fn keep_alive(
    service: &RequestService,
    lease: LeaseId,
) -> Result<(Option<Header>, i64), EtcdError> {
    const OPERATION: &str = "lease keep-alive";
    let failed = |status| error::of_status(OPERATION, &service.endpoint(), status);
    let mut grpc = Grpc::new(service.clone());
    grpc.ready().await.map_err(failed)?;
    let codec = ProstCodec::<LeaseKeepAliveRequest, LeaseKeepAliveResponse>::default();
    let path = PathAndQuery::from_static(LEASE_KEEP_ALIVE);
    // The request stream stays open after the request. If it ended, `etcd grpc-proxy` would end the call without a response. Dropping the
    // response stream ends the call.
    let requests = tokio_stream::once(LeaseKeepAliveRequest { id: lease.get() });
    let request = Request::new(requests.chain(tokio_stream::pending()));
    let mut answers = grpc
        .streaming(request, path, codec)
        .await
        .map_err(failed)?
        .into_inner();
    let answer = answers.message().await.map_err(failed)?;
    let answer = answer.ok_or_else(|| closed(OPERATION, &service.endpoint()))?;
    let header = answer.header.map(|header| Header {
        cluster_id: header.cluster_id,
        revision: Revision::new(header.revision),
        raft_term: header.raft_term,
    });
    Ok((header, answer.ttl))
}

/// Creates the error for a stream that ended before its response. The lease may or may not have been renewed.
pub(super) fn closed(operation: &'static str, endpoint: &str) -> EtcdError {
    let source = "the stream ended without an answer";
    EtcdError::new(EtcdErrorKind::Unavailable, operation, endpoint, source)
}
