//! The one user of the scripted etcd: a password, tokens that expire, and what may be refused.

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
use crate::etcd::token::Credentials;

/// What is known of users. Without a password authentication is off.
#[derive(Debug, Default)]
pub(super) struct Users {
    pub(super) password: Option<String>,
    /// The number of the token that is good.
    pub(super) token: u32,
    /// What a bad token is refused with; older servers say that permission is denied. A10 (a)
    pub(super) refusal: Option<&'static str>,
    /// Whether the user may do nothing at all.
    pub(super) denied: bool,
    /// Whether a renewal needs a good token: older servers renew without one.
    pub(super) renewals_are_checked: bool,
    /// Whether it takes longer to hash a password than anybody waits.
    pub(super) overloaded: bool,
    /// How often a password was asked for.
    pub(super) authentications: u32,
    /// How long a token is known to the member alone that has issued it.
    pub(super) lag: Duration,
    /// Which member that was of the last one, and when.
    issued: Option<(Arc<str>, Instant)>,
}

impl Users {
    /// What a client that is made now is given.
    pub(super) fn credentials(&self) -> Option<Credentials> {
        let password = self.password.clone()?;
        let user = "greeter".to_owned();
        Some(Credentials { user, password })
    }

    fn good(&self) -> String {
        format!("token{}", self.token)
    }

    /// Whether a member knows of the token that is good.
    fn known_to(&self, member: &Arc<str>) -> bool {
        let issued = self.issued.as_ref();
        issued.is_none_or(|(issuer, at)| issuer == member || Instant::now() >= *at + self.lag)
    }
}

impl Fake {
    /// Whether a request has a good token, where it needs one.
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

/// The service that exchanges passwords for tokens, and nothing else of it: the messages of other methods are not to be had.
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
        fake.insist(authenticates, "there is nothing else");
        fake.script().users.authentications += 1;
        Box::pin(async move {
            // A hash of the password takes its time.
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
