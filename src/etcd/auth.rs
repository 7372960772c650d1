//! The authentication token that etcd requires in every request.
//!
//! `etcd-client` can manage the token itself, but it renews the token only if a unary call fails with `Unauthenticated`. It does not renew
//! the token after a change of the store's users (`InvalidArgument`), nor if etcd cancels a watch because of the token. So this module
//! keeps the credentials and the token.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use tokio::sync::watch;
use tokio::time::Instant;

use super::error;
use super::token_cell::{Credentials, Token, TokenCell};
use crate::backoff::Backoff;
use crate::error::{EtcdError, EtcdErrorKind};
use tonic_balance::Address;

/// The user name, the password, and the last token that etcd issued for them. Clones share them by a reference count.
#[derive(Clone)]
pub(super) struct Auth(Arc<Inner>);

struct Inner {
    credentials: Option<Credentials>,
    token: TokenCell,
    /// The state of the exchange of the credentials for a token. Each exchange costs etcd 50 to 130 ms of bcrypt, so all tasks share one
    /// exchange: a caller that finds a running exchange waits for its outcome.
    refreshing: Mutex<ExchangeState>,
    /// The time at which an external client (one that the user passed to `Registry::from_client`) last fetched a token. The lock is held
    /// while a token is fetched, so that concurrent callers fetch only one token.
    client_refreshed: tokio::sync::Mutex<Option<Instant>>,
    /// The time at which the token was fetched, and the member that issued it.
    issued: Mutex<Option<(Instant, Address)>>,
    /// Whether a registration needs the token to renew its lease.
    renews_leases: AtomicBool,
    /// The largest number of keys that a resolver of this client has known. Each key belongs to a registered server, which probably also
    /// exchanges a password for a token of the same etcd.
    known_servers: AtomicUsize,
}

impl Auth {
    pub(super) fn new(credentials: Option<Credentials>) -> Self {
        Self(Arc::new(Inner {
            credentials,
            token: TokenCell::default(),
            refreshing: Mutex::new(ExchangeState::new()),
            client_refreshed: tokio::sync::Mutex::default(),
            issued: Mutex::default(),
            renews_leases: AtomicBool::new(false),
            known_servers: AtomicUsize::new(0),
        }))
    }

    /// Returns a copy with the same credentials and the same token. The copy never waits for an exchange that another runtime has started.
    pub(super) fn detached(&self) -> Self {
        let auth = Self::new(self.0.credentials.clone());
        auth.0.token.set(self.0.token.get());
        let issued = self.issued().clone();
        *auth.issued() = issued;
        auth
    }

    pub(super) fn user(&self) -> Option<&str> {
        self.0
            .credentials
            .as_ref()
            .map(|credentials| credentials.user.as_str())
    }

    /// Returns the token in use. The caller passes it to [`Auth::replacement`] if etcd rejects it.
    pub(super) fn token(&self) -> Option<Token> {
        self.0.token.get()
    }

    /// Returns the token cell that requests read.
    pub(super) fn cell(&self) -> &TokenCell {
        &self.0.token
    }

    /// Returns the member that issued the token, if the token is less than a second old. The issuer accepts the token at once. Other
    /// members accept it a moment later, after the raft log was replicated to them.
    pub(super) fn new_issuer(&self) -> Option<Address> {
        let issued = self.issued();
        let (at, member) = issued.as_ref()?;
        (Instant::now().saturating_duration_since(*at) < NEW_TOKEN_TIME).then(|| member.clone())
    }

    /// Records that a registration needs the token to renew its lease.
    pub(super) fn set_renews_leases(&self) {
        self.0.renews_leases.store(true, Ordering::Relaxed);
    }

    /// Records how many keys a resolver knows.
    pub(super) fn on_known_servers(&self, count: usize) {
        self.0.known_servers.fetch_max(count, Ordering::Relaxed);
    }

    /// Returns the longest wait before a rejected token is replaced. The actual wait is a random time between zero and this limit.
    ///
    /// After a restart of etcd or a change of its users, all processes exchange their passwords at the same time, and share the processor
    /// time of etcd. If a server does not get a token within the TTL, its lease expires. A client without a token only uses an older set of
    /// instances for a while. So a client that knows many servers waits longer than the servers.
    ///
    /// `fastest` is the duration of the client's fastest exchange: the estimate of the time that etcd takes for one password hash.
    fn spread(&self, fastest: Duration) -> Duration {
        if self.0.renews_leases.load(Ordering::Relaxed) {
            return REFRESH_SPREAD;
        }
        let servers = self.0.known_servers.load(Ordering::Relaxed);
        let servers = u32::try_from(servers).unwrap_or(u32::MAX);
        // If the process was started together with the fleet, even its fastest exchange took much longer than one hash. So the estimate is
        // limited to `HASH_MAX`; otherwise the wait would be too long.
        let hash = fastest.min(HASH_MAX);
        // The waits of clients are evenly distributed below this limit, so the mean wait is half of it. The factor 2 makes the mean wait as
        // long as one core needs for the hashes of all servers.
        let hashes = hash.saturating_mul(servers).saturating_mul(2);
        hashes.clamp(REFRESH_SPREAD, CLIENT_SPREAD_MAX)
    }

    /// Returns whether the token is too new to have expired under etcd's default settings. If etcd forbids a request with such a token, a
    /// new token does not help. Without this check, a client that lacks a permission would cost etcd a password hash at each attempt.
    pub(super) fn cannot_be_expired(&self) -> bool {
        let issued = self.issued();
        let at = issued.as_ref().map(|(at, _)| *at);
        at.is_some_and(|at| Instant::now().saturating_duration_since(at) < DEFAULT_TOKEN_TTL)
    }

    fn issued(&self) -> MutexGuard<'_, Option<(Instant, Address)>> {
        self.0.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_issuer(&self, member: Option<Address>) {
        *self.issued() = member.map(|member| (Instant::now(), member));
    }

    /// Returns what the caller must do to replace a token that etcd rejected. `refused` is the token of the rejected request, or `None` if
    /// the request carried no token.
    pub(super) fn replacement(&self, refused: Option<&Token>, now: Instant) -> Replacement {
        let Some(credentials) = &self.0.credentials else {
            return Replacement::Done(Ok(false));
        };
        // The lock is taken before the token is read. Otherwise, an exchange could end in between, and the caller would begin another one.
        let mut refreshing = self.refreshing();
        let current = self.0.token.get();
        let same = match (&current, refused) {
            (Some(current), Some(refused)) => Arc::ptr_eq(current, refused),
            (None, None) => true,
            _ => false,
        };
        if !same {
            return Replacement::Done(Ok(true));
        }
        if let Some(error) = refreshing.cached_error(now) {
            return Replacement::Done(Err(error));
        }
        if let Some(running) = refreshing.running.as_ref().filter(|one| !one.has_ended()) {
            return Replacement::Running(running.clone());
        }
        let is_repeated = std::mem::replace(&mut refreshing.is_first_done, true);
        let fastest = refreshing.fastest.unwrap_or_default();
        let (outcome, running) = watch::channel(None);
        refreshing.running = Some(Running(running.clone()));
        Replacement::Begin {
            credentials: credentials.clone(),
            spread: if is_repeated {
                self.spread(fastest).mul_f64(fastrand::f64())
            } else {
                Duration::ZERO
            },
            outcome,
            running: Running(running),
        }
    }

    /// Records the outcome of an exchange. Returns whether the token has changed. Only then can a repeated request succeed.
    pub(super) fn on_exchanged(
        &self,
        answer: Result<String, EtcdError>,
        member: Option<Address>,
        elapsed: Duration,
    ) -> Result<bool, EtcdError> {
        let answer = answer.and_then(|token| {
            HeaderValue::from_str(&token).map_err(|source| {
                let kind = EtcdErrorKind::Unavailable;
                let member = member.as_ref().map_or("(no member)", Address::as_str);
                EtcdError::new(kind, "authenticate", member, source)
            })
        });
        self.refreshing()
            .on_answer(answer.as_ref().err(), elapsed, Instant::now());
        match answer {
            Ok(mut header) => {
                // Keeps the token out of debug output and out of HPACK's table.
                header.set_sensitive(true);
                self.set_issuer(member);
                self.0.token.set(Some(Arc::new(header)));
                Ok(true)
            }
            Err(error) if error.kind() == EtcdErrorKind::AuthNotEnabled => {
                tracing::warn!(
                    endpoint = error.endpoint(),
                    "credentials are configured, but authentication is disabled in etcd: continuing without a token"
                );
                let had_token = self.0.token.get().is_some();
                self.0.token.set(None);
                self.set_issuer(None);
                Ok(had_token)
            }
            Err(error) => Err(error),
        }
    }

    fn refreshing(&self) -> MutexGuard<'_, ExchangeState> {
        // No code panics while it holds this lock.
        self.0
            .refreshing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an external client exchange its credentials, if it has any, for a new token. By itself, the client replaces an expired token,
    /// but not a token that became invalid after a change of the store's users. Returns true on success, because the client does not expose
    /// whether its token has changed.
    pub(super) async fn refresh_client(
        &self,
        client: &etcd_client::Client,
        endpoint: &str,
    ) -> Result<bool, EtcdError> {
        let mut refreshed = self.0.client_refreshed.lock().await;
        let now = Instant::now();
        // The client does not expose its token, so this code checks when it last fetched a token. If another caller fetched a token while
        // this caller waited for the lock, the client already has a new token.
        if refreshed.is_some_and(|at| now.saturating_duration_since(at) < NEW_TOKEN_TIME) {
            return Ok(true);
        }
        let outcome = client.refresh_token().await;
        outcome.map_err(|source| error::of_client("authenticate", endpoint, source))?;
        *refreshed = Some(Instant::now());
        Ok(true)
    }
}

/// How a token is replaced.
pub(super) enum Replacement {
    /// No exchange starts. `Ok(true)`: the token has already changed. `Ok(false)`: there are no credentials. `Err`: the last exchange
    /// failed, and the backoff after it has not ended.
    Done(Result<bool, EtcdError>),
    /// An exchange is running.
    Running(Running),
    /// No exchange is running. The caller waits for `spread`, exchanges `credentials`, and sends the outcome to `outcome`.
    Begin {
        credentials: Credentials,
        spread: Duration,
        outcome: watch::Sender<Option<Result<bool, EtcdError>>>,
        running: Running,
    },
}

/// A running exchange of the credentials for a token.
#[derive(Clone)]
pub(super) struct Running(watch::Receiver<Option<Result<bool, EtcdError>>>);

impl Running {
    /// Returns whether the exchange or its runtime has ended.
    fn has_ended(&self) -> bool {
        self.0.borrow().is_some() || self.0.has_changed().is_err()
    }

    /// Waits for the outcome of the exchange.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the exchange.
    pub(super) async fn outcome(mut self) -> Result<bool, EtcdError> {
        match self.0.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Ok(false)),
            Err(_) => Err(EtcdError::without_endpoint(
                EtcdErrorKind::Unavailable,
                "authenticate",
                "the runtime of the exchange has ended",
            )),
        }
    }
}

/// The state of the exchange of the credentials for a token.
struct ExchangeState {
    /// Whether the first exchange has been started. The first exchange starts at once. Each later exchange starts after a random wait.
    is_first_done: bool,
    /// The number of consecutive failures that may have cost etcd a password hash.
    failures: u32,
    /// The last failure after which a backoff was started, and the end of that backoff. The backoff is necessary, because etcd continues to
    /// hash for callers that have timed out: a fleet that retries without a backoff would never get a token.
    last: Option<(Instant, EtcdError)>,
    backoff: Backoff,
    running: Option<Running>,
    /// The duration of the fastest successful exchange. If etcd was idle then, this is about the time of one password hash.
    fastest: Option<Duration>,
}

impl ExchangeState {
    fn new() -> Self {
        Self {
            is_first_done: false,
            failures: 0,
            last: None,
            backoff: Backoff::new(BACKOFF_FIRST, BACKOFF_MAX),
            running: None,
            fastest: None,
        }
    }

    /// Returns the last failure until the backoff after it has ended.
    fn cached_error(&self, now: Instant) -> Option<EtcdError> {
        let last = self.last.as_ref().filter(|(until, _)| now < *until);
        last.map(|(_, error)| error.clone())
    }

    /// Records the outcome of an exchange. An error counts if it may have cost etcd a password hash. The first such error starts no
    /// backoff, because its cause may be a single member. Each further one in a row starts a backoff. Any other outcome resets the count.
    fn on_answer(&mut self, error: Option<&EtcdError>, elapsed: Duration, now: Instant) {
        if error.is_none() {
            let fastest = self.fastest.unwrap_or(elapsed).min(elapsed);
            self.fastest = Some(fastest);
        }
        let is_costly = |error: &&EtcdError| {
            matches!(
                error.kind(),
                EtcdErrorKind::DeadlineExceeded | EtcdErrorKind::BadCredentials
            )
        };
        let Some(error) = error.filter(is_costly) else {
            self.failures = 0;
            self.last = None;
            self.backoff.reset();
            return;
        };
        self.failures += 1;
        if self.failures > 1 {
            let until = now + self.backoff.next(&mut fastrand::Rng::new());
            self.last = Some((until, error.clone()));
        }
    }
}

const BACKOFF_FIRST: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// Age up to which a token counts as new. A member other than the issuer may not have received a new token yet, and
/// [`Auth::refresh_client`] does not replace a new token.
const NEW_TOKEN_TIME: Duration = Duration::from_secs(1);
/// The default of etcd's `--auth-token-ttl`.
const DEFAULT_TOKEN_TTL: Duration = Duration::from_secs(300);
/// The shortest interval over which the replacements of rejected tokens are spread. It is short, because a rejected request usually waits
/// at most 2 s for the new token, including this wait.
const REFRESH_SPREAD: Duration = Duration::from_millis(200);
/// Limit on the estimated time of one password hash. With its default settings, etcd takes 50 to 130 ms for a hash. A higher limit would
/// delay the clients of a busy etcd longer than the hashes require.
const HASH_MAX: Duration = Duration::from_millis(100);
/// Limit on the interval over which the exchanges of clients are spread: the default lease TTL. With a hash time of 100 ms, the interval
/// reaches this limit at 75 known servers (2 * 75 * 100 ms).
const CLIENT_SPREAD_MAX: Duration = Duration::from_secs(15);

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("user", &self.user())
            .finish_non_exhaustive()
    }
}
