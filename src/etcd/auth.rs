//! The token that etcd wants on every request.
//!
//! `etcd-client` can do this by itself, but renews a token only for `Unauthenticated` on a unary call: not when the store's users have
//! changed (`InvalidArgument`), and not when a watch is cancelled for it. So credentials stay here.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use tokio::time::Instant;

use super::request_channel::RequestService;
use super::token::{Credentials, Token, TokenCell};
use super::{error, raw};
use crate::backoff::Backoff;
use crate::error::{EtcdError, EtcdErrorKind};
use tonic_balance::Address;

/// Name, password, and the token they were last exchanged for. Cloning is a reference count.
#[derive(Clone)]
pub(super) struct Auth(Arc<Inner>);

struct Inner {
    credentials: Option<Credentials>,
    token: TokenCell,
    /// Held while a token is fetched: etcd spends 50-130 ms of bcrypt on each, so a fleet of tasks must ask once.
    refreshing: tokio::sync::Mutex<Refreshing>,
    /// When the token was fetched, and from which member.
    issued: Mutex<Option<(Instant, Address)>>,
}

impl Auth {
    pub(super) fn new(credentials: Option<Credentials>) -> Self {
        Self(Arc::new(Inner {
            credentials,
            token: TokenCell::default(),
            refreshing: tokio::sync::Mutex::new(Refreshing::new()),
            issued: Mutex::default(),
        }))
    }

    /// The same credentials and the same token, and nothing to wait for that another runtime has begun.
    pub(super) fn detached(&self) -> Self {
        let auth = Self::new(self.0.credentials.clone());
        auth.0.token.set(self.0.token.get());
        auth.set_issuer(self.new_issuer());
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
        self.0.token.get()
    }

    /// The cell of the token, for requests.
    pub(super) fn cell(&self) -> &TokenCell {
        &self.0.token
    }

    /// The member that has issued the token, while it is new: it knows the token, and to others the cluster's log may bring it a moment
    /// later.
    pub(super) fn new_issuer(&self) -> Option<Address> {
        let issued = self.0.issued.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, member) = issued.as_ref()?;
        (Instant::now().saturating_duration_since(*at) < JUST_NOW).then(|| member.clone())
    }

    /// Whether the token is too new to have expired with default settings. What is forbidden with it is forbidden with the next one as well:
    /// a permission that is missing in a whole fleet must not cost etcd a hash of the password for each try.
    pub(super) fn is_young(&self) -> bool {
        let issued = self.0.issued.lock().unwrap_or_else(PoisonError::into_inner);
        let at = issued.as_ref().map(|(at, _)| *at);
        at.is_some_and(|at| Instant::now().saturating_duration_since(at) < YOUNG)
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
        service: &RequestService,
        deadline: Duration,
    ) -> Result<bool, EtcdError> {
        let Some(credentials) = &self.0.credentials else {
            return Ok(false);
        };
        let mut refreshing = self.0.refreshing.lock().await;
        let current = self.0.token.get();
        let same = match (&current, refused) {
            (Some(current), Some(refused)) => Arc::ptr_eq(current, refused),
            (None, None) => true,
            _ => false,
        };
        if !same {
            return Ok(true);
        }
        if let Some(error) = refreshing.held_back(Instant::now()) {
            return Err(error);
        }
        if refreshing.asked {
            // A change of the store's users has every client here at once, and each answer costs etcd a hash of the password.
            tokio::time::sleep(REFRESH_SPREAD.mul_f64(fastrand::f64())).await;
        }
        refreshing.asked = true;
        // Whoever waits for this may give up before the answer.
        let silence = error::deadline("authenticate", &service.endpoint(), deadline);
        refreshing.on_failure(silence, Instant::now() + deadline);
        let answer = raw::authenticate(service, credentials, deadline).await;
        refreshing.on_answer(answer.as_ref().err());
        match answer {
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
                self.set_issuer(service.routing.address());
                self.0.token.set(Some(Arc::new(header)));
                Ok(true)
            }
            Err(error) if error.kind() == EtcdErrorKind::AuthNotEnabled => {
                tracing::warn!(
                    endpoint = %service.endpoint(),
                    "credentials are configured, but etcd has authentication switched off: going on without a token"
                );
                self.0.token.set(None);
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
        let at = refreshed.of_client;
        if at.is_some_and(|at| now.saturating_duration_since(at) < JUST_NOW) {
            return Ok(true);
        }
        let outcome = client.refresh_token().await;
        outcome.map_err(|source| error::of_client("authenticate", endpoint, source))?;
        refreshed.of_client = Some(Instant::now());
        Ok(true)
    }
}

/// How the exchange of the credentials goes.
struct Refreshing {
    /// Whether a token was ever asked for.
    asked: bool,
    /// Failures in a row that may have cost the server a hash, the last of them, and how long nobody asks after it. Etcd goes on hashing for
    /// those who have given up: a fleet that asks again and again would never be answered.
    failures: u32,
    last: Option<(Instant, EtcdError)>,
    backoff: Backoff,
    /// When a client that the user made has last fetched one.
    of_client: Option<Instant>,
}

impl Refreshing {
    fn new() -> Self {
        Self {
            asked: false,
            failures: 0,
            last: None,
            backoff: Backoff::new(BACKOFF_FIRST, BACKOFF_MAX),
            of_client: None,
        }
    }

    /// What whoever asks now is told instead of an answer.
    fn held_back(&self, now: Instant) -> Option<EtcdError> {
        let last = self.last.as_ref().filter(|(until, _)| now < *until);
        last.map(|(_, error)| error.clone())
    }

    fn on_failure(&mut self, error: EtcdError, at: Instant) {
        self.failures += 1;
        // The first may be one member's trouble alone.
        if self.failures > 1 {
            let until = at + self.backoff.next(&mut fastrand::Rng::new());
            self.last = Some((until, error));
        }
    }

    /// Takes the answer that was feared not to come.
    fn on_answer(&mut self, error: Option<&EtcdError>) {
        let costly = [
            EtcdErrorKind::DeadlineExceeded,
            EtcdErrorKind::BadCredentials,
        ];
        match (error, &mut self.last) {
            (Some(error), last) if costly.contains(&error.kind()) => {
                if let Some((_, last)) = last {
                    last.clone_from(error);
                }
            }
            _ => {
                self.failures = 0;
                self.last = None;
                self.backoff.reset();
            }
        }
    }
}

const BACKOFF_FIRST: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
const JUST_NOW: Duration = Duration::from_secs(1);
/// etcd's `--auth-token-ttl`, by default.
const YOUNG: Duration = Duration::from_secs(300);
/// Over how long the renewals of refused tokens are spread. It is part of the deadline of a call, which is 2 s here.
const REFRESH_SPREAD: Duration = Duration::from_millis(200);

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("user", &self.user())
            .finish_non_exhaustive()
    }
}
