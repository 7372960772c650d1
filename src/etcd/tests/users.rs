//! The single user of the scripted etcd: the password, the valid token, and the rejection of requests.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::proto::{PbAuthenticateRequest, PbAuthenticateResponse};
use tokio::time::Instant;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::Service;

use super::fake::Fake;
use crate::etcd::token_cell::Credentials;

/// The state of authentication. Without a password, authentication is disabled.
#[derive(Debug, Default)]
pub(super) struct Users {
    pub(super) password: Option<String>,
    /// The number of the valid token. A test increments it to invalidate the earlier tokens.
    pub(super) token: u32,
    /// The error text for an invalid token; `None` for the text of current servers. Older servers use "permission denied".
    pub(super) refusal: Option<&'static str>,
    /// Whether all requests of the user are forbidden.
    pub(super) denied: bool,
    /// Whether the renewal of a lease requires a valid token; older servers renew a lease without one.
    pub(super) renewals_are_checked: bool,
    /// Whether a password hash takes 60 s instead of 0.1 s. No request waits 60 s for a token.
    pub(super) overloaded: bool,
    /// Number of requested exchanges of a password for a token.
    pub(super) authentications: u32,
    /// The time for which only the member that issued a token accepts the token. After this time, all members accept it.
    pub(super) lag: Duration,
    /// The member that issued the last token, and the time at which it did so.
    issued: Option<(Arc<str>, Instant)>,
}

impl Users {
    /// Returns the credentials of a new client.
    pub(super) fn credentials(&self) -> Option<Credentials> {
        let password = self.password.clone()?;
        let user = "greeter".to_owned();
        Some(Credentials { user, password })
    }

    fn good(&self) -> String {
        format!("token{}", self.token)
    }

    /// Returns whether a member already accepts the valid token.
    fn known_to(&self, member: &Arc<str>) -> bool {
        let issued = self.issued.as_ref();
        issued.is_none_or(|(issuer, at)| issuer == member || Instant::now() >= *at + self.lag)
    }
}

impl Fake {
    /// Checks the token of a request. If authentication is disabled, accepts every request.
    pub(super) fn admits<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let script = self.script();
        let users = &script.users;
        if users.password.is_none() {
            return Ok(());
        }
        match request.metadata().get("token") {
            Some(_) if users.denied => {
                Err(Status::permission_denied("etcdserver: permission denied"))
            }
            Some(token) if token == users.good().as_str() && users.known_to(&self.member) => Ok(()),
            Some(_) => {
                let refusal = users.refusal.unwrap_or("etcdserver: invalid auth token");
                Err(Status::unauthenticated(refusal))
            }
            None => Err(Status::invalid_argument("etcdserver: user name is empty")),
        }
    }
}

/// The service that exchanges passwords for tokens. Its other methods are missing, because their message types are not available.
#[derive(Clone)]
pub(super) struct Authenticate(pub(super) Fake);

impl NamedService for Authenticate {
    const NAME: &'static str = "etcdserverpb.Auth";
}

impl Service<http::Request<Body>> for Authenticate {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let fake = self.0.clone();
        let authenticates = request.uri().path() == "/etcdserverpb.Auth/Authenticate";
        fake.insist(
            authenticates,
            "a request to the service Auth is not `Authenticate`",
        );
        fake.script().users.authentications += 1;
        Box::pin(async move {
            // A password hash takes time.
            let overloaded = fake.script().users.overloaded;
            let takes = Duration::from_millis(if overloaded { 60_000 } else { 100 });
            tokio::time::sleep(takes).await;
            let codec = ProstCodec::<PbAuthenticateResponse, PbAuthenticateRequest>::default();
            let method = tower::service_fn(|request| fake.authenticate(&request));
            Ok(Grpc::new(codec).unary(method, request).await)
        })
    }
}

impl Fake {
    fn authenticate(
        &self,
        request: &Request<PbAuthenticateRequest>,
    ) -> Ready<Result<Response<PbAuthenticateResponse>, Status>> {
        let mut script = self.script();
        let users = &mut script.users;
        ready(match &users.password {
            None => Err(Status::failed_precondition(
                "etcdserver: authentication is not enabled",
            )),
            Some(password) if *password == request.get_ref().password => {
                let token = users.good();
                users.issued = Some((Arc::clone(&self.member), Instant::now()));
                Ok(Response::new(PbAuthenticateResponse {
                    header: None,
                    token,
                }))
            }
            Some(_) => Err(Status::invalid_argument(
                "etcdserver: authentication failed, invalid user ID or password",
            )),
        })
    }
}
