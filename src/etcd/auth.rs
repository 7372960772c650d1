//! The token that etcd wants on every request.
//!
//! `etcd-client` can do this by itself, but renews a token only for `Unauthenticated` on a unary call: not when the store's users have
//! changed (`InvalidArgument`), and not when a watch is cancelled for it. So credentials stay here.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::HeaderValue;
use tokio::time::Instant;

use super::link::LinkService;
use super::{error, rpc};
use crate::address::Address;
use crate::error::{EtcdError, EtcdErrorKind};

/// Name, password, and the token they were last exchanged for. Cloning is a reference count.
#[derive(Clone)]
pub(super) struct Auth(Arc<Inner>);

struct Inner {
    credentials: Option<Credentials>,
    token: ArcSwapOption<HeaderValue>,
    /// Held while a token is fetched: etcd spends 50-130 ms of bcrypt on each, so a fleet of tasks must ask once. In it, when a client
    /// that the user made has last fetched one.
    refreshing: tokio::sync::Mutex<Option<Instant>>,
    /// When the token was fetched, and from which member.
    issued: Mutex<Option<(Instant, Address)>>,
}

/// A token as it stands in a header. Which allocation it is tells one token from the next.
pub(crate) type Token = Arc<HeaderValue>;

#[derive(Clone)]
pub(crate) struct Credentials {
    pub(crate) user: String,
    pub(crate) password: String,
}

impl Auth {
    pub(super) fn new(credentials: Option<Credentials>) -> Self {
        Self(Arc::new(Inner {
            credentials,
            token: ArcSwapOption::default(),
            refreshing: tokio::sync::Mutex::default(),
            issued: Mutex::default(),
        }))
    }

    /// The same credentials and the same token, and nothing to wait for that another runtime has begun.
    pub(super) fn apart(&self) -> Self {
        let auth = Self::new(self.0.credentials.clone());
        auth.0.token.store(self.0.token.load_full());
        auth
    }

    pub(super) fn user(&self) -> Option<&str> {
        self.0
            .credentials
            .as_ref()
            .map(|credentials| credentials.user.as_str())
    }

    /// The token in use, to be handed to [`Auth::refresh`] if etcd refuses it.
    pub(super) fn token(&self) -> Option<Token> {
        self.0.token.load_full()
    }

    /// The member that has issued the token, while it is new: it knows the token, and to others the cluster's log may bring it a moment
    /// later.
    pub(super) fn new_issuer(&self) -> Option<Address> {
        let issued = self.0.issued.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, member) = issued.as_ref()?;
        (Instant::now().saturating_duration_since(*at) < JUST_NOW).then(|| member.clone())
    }

    fn set_issuer(&self, member: Option<Address>) {
        let mut issued = self.0.issued.lock().unwrap_or_else(PoisonError::into_inner);
        *issued = member.map(|member| (Instant::now(), member));
    }

    /// Exchanges the credentials for a new token, unless `refused` is not the token in use any more: then somebody else just did.
    ///
    /// Says whether there is a new token to try.
    pub(super) async fn refresh(
        &self,
        refused: Option<&Token>,
        service: &LinkService,
        deadline: Duration,
    ) -> Result<bool, EtcdError> {
        let Some(credentials) = &self.0.credentials else {
            return Ok(false);
        };
        let _refreshing = self.0.refreshing.lock().await;
        let current = self.0.token.load_full();
        let same = match (&current, refused) {
            (Some(current), Some(refused)) => Arc::ptr_eq(current, refused),
            (None, None) => true,
            _ => false,
        };
        if !same {
            return Ok(true);
        }
        if current.is_some() {
            // A change of the store's users has every client here at once, and each answer costs etcd a hash of the password.
            tokio::time::sleep(REFRESH_SPREAD.mul_f64(fastrand::f64())).await;
        }
        match rpc::authenticate(service, credentials, deadline).await {
            Ok(token) => {
                let header = HeaderValue::from_str(&token).map_err(|source| {
                    let endpoint = service.endpoint();
                    EtcdError::new(
                        EtcdErrorKind::Unavailable,
                        "authenticate",
                        &endpoint,
                        source,
                    )
                })?;
                self.set_issuer(service.route.address());
                self.0.token.store(Some(Arc::new(header)));
                Ok(true)
            }
            Err(error) if error.kind() == EtcdErrorKind::AuthNotEnabled => {
                tracing::warn!(
                    endpoint = %service.endpoint(),
                    "credentials are configured, but etcd has authentication switched off: going on without a token"
                );
                self.0.token.store(None);
                Ok(current.is_some())
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a client that the user made exchange its credentials, if it has any, for a new token. It renews a token that has expired by
    /// itself, but not one that a change of the store's users has made invalid.
    pub(super) async fn refresh_client(
        &self,
        client: &etcd_client::Client,
        endpoint: &str,
    ) -> Result<bool, EtcdError> {
        let mut refreshed = self.0.refreshing.lock().await;
        let now = Instant::now();
        // Its token cannot be seen: whoever waited for somebody else's renewal has got it.
        if refreshed.is_some_and(|at| now.saturating_duration_since(at) < JUST_NOW) {
            return Ok(true);
        }
        let outcome = client.refresh_token().await;
        outcome.map_err(|source| error::of_client("authenticate", endpoint, source))?;
        *refreshed = Some(Instant::now());
        Ok(true)
    }
}

const JUST_NOW: Duration = Duration::from_secs(1);
/// Over how long the renewals of refused tokens are spread. It is part of the deadline of a call, which is 2 s here.
const REFRESH_SPREAD: Duration = Duration::from_millis(200);

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("user", &self.user())
            .finish_non_exhaustive()
    }
}
