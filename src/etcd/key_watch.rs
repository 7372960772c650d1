//! A watch on a few keys, which is opened again whenever it ends. A registration watches its own keys with it, and a resolver the key of the
//! service config. Its owner also reads the keys at intervals, to find a change that the watch has not delivered.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument;

use super::cluster::Etcd;
use super::token_cell::Token;
use super::watch::Watch;
use crate::backoff::{Backoff, jittered};
use crate::error::EtcdError;
use crate::keyspace::{Event, Key};

/// A watch on a few keys, over one stream.
pub(crate) struct KeyWatch {
    open: Option<Watch>,
    /// The task that opens a watch. A task is needed, because the future of [`KeyWatch::next`] is dropped at each renewal of the lease. An
    /// attempt inside `next` would start again at each renewal, and with a short TTL it might never finish. During a renewal, such an
    /// attempt would not be polled, but could hold the lock of the auth token. The renewal could then wait for this lock.
    opening: JoinSet<Opening>,
    /// The time at which the open watch was opened.
    since: Option<Instant>,
    backoff: Backoff,
    /// The auth token of the last attempt to open the watch.
    token: Option<Token>,
    /// The earliest time of the next attempt to open the watch.
    not_before: Option<Instant>,
    /// Number of consecutive rejections: the token is invalid, the permission is denied, or credentials are missing.
    refusals: u32,
}

/// The result of an attempt to open a watch, and the auth token of the attempt.
type Opening = (Option<Token>, Result<Watch, EtcdError>);

/// An event of a [`KeyWatch`].
pub(crate) enum News {
    /// The watch is open: from now on, it reports every change of the keys.
    Opened,
    Events(Vec<Event>),
    /// The watch has ended, or could not be opened.
    Lost(EtcdError),
}

impl KeyWatch {
    pub(crate) fn new() -> Self {
        Self {
            open: None,
            opening: JoinSet::new(),
            since: None,
            backoff: Backoff::new(REOPEN_FIRST, REOPEN_MAX),
            token: None,
            not_before: None,
            refusals: 0,
        }
    }

    /// Returns the next event. `keys` has at least one key.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no event. If a watch is being opened, the next call waits for the same attempt.
    pub(crate) async fn next(&mut self, etcd: &Etcd, keys: &[Key]) -> News {
        let error = match &mut self.open {
            None => match self.reopen(etcd, keys).await {
                Ok(()) => {
                    self.refusals = 0;
                    return News::Opened;
                }
                Err(error) => error,
            },
            Some(watch) => {
                let error = match watch.message().await {
                    Ok(message) if message.canceled => watch.cancel_error(&message),
                    Ok(message) => {
                        self.refusals = 0;
                        return News::Events(message.events);
                    }
                    Err(error) => error,
                };
                etcd.record_watch_end(watch, &error);
                error
            }
        };
        self.open = None;
        let refused = error.kind().is_refusal();
        self.refusals = if refused { self.refusals + 1 } else { 0 };
        // After the first rejection, a new token can help. After the second rejection, or after another error that needs an operator, the
        // wait is 15 s to 30 s instead of the backoff.
        let needs_operator = self.refusals > 1 || !refused && error.kind().needs_operator();
        let since = self.since.take();
        if since.is_some_and(|since| Instant::now().saturating_duration_since(since) >= REOPEN_MAX)
        {
            self.backoff.reset();
        }
        let mut rng = fastrand::Rng::new();
        let wait = if needs_operator {
            jittered(OPERATOR_WAIT, &mut rng)
        } else {
            self.backoff.next(&mut rng)
        };
        self.not_before = Some(Instant::now() + wait);
        News::Lost(error)
    }

    /// Closes the watch, because it does not deliver the events. The next call of [`next`](Self::next) opens another one.
    pub(crate) fn close(&mut self) {
        self.open = None;
        self.since = None;
        let wait = self.backoff.next(&mut fastrand::Rng::new());
        self.not_before = Some(Instant::now() + wait);
    }

    async fn reopen(&mut self, etcd: &Etcd, keys: &[Key]) -> Result<(), EtcdError> {
        if self.opening.is_empty() {
            self.wait_and_renew_token(etcd).await?;
            let (etcd, keys) = (etcd.clone(), keys.to_vec());
            let opening = async move {
                let _permit = etcd.acquire_permit().await;
                // Another task may replace the token during the wait for the permit.
                let token = etcd.token();
                (token, etcd.watch_each(&keys).await)
            };
            self.opening.spawn(opening.in_current_span());
        }
        match self.opening.join_next().await {
            Some(Ok((token, opened))) => {
                self.token = token;
                self.open = Some(opened?);
            }
            Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // The task is cancelled only by a runtime that shuts down. The runtime then also drops this future.
            _ => std::future::pending().await,
        }
        self.since = Some(Instant::now());
        Ok(())
    }

    /// Waits until the next attempt is due, and replaces a rejected auth token.
    async fn wait_and_renew_token(&mut self, etcd: &Etcd) -> Result<(), EtcdError> {
        if let Some(not_before) = self.not_before {
            sleep_until(not_before).await;
        }
        if self.refusals == 1 {
            // A unary request replaces a rejected token by itself and is sent again. A watch receives the rejection as a message, so its
            // token is replaced here.
            etcd.on_token_rejected(self.token.as_ref()).await?;
        }
        Ok(())
    }
}

/// Maximum time before the first attempt to open the watch again; the minimum is half of it. A wait is acceptable, because the keys are
/// read after each renewal while the watch is not open.
const REOPEN_FIRST: Duration = Duration::from_secs(1);
/// Maximum time between two attempts to open the watch. The time grows up to this limit, because each opening of the watch also causes a
/// read of the keys. A watch that was open for this long counts as healthy and resets the backoff.
const REOPEN_MAX: Duration = Duration::from_secs(15);
/// Maximum time between attempts while only an operator can resolve the error; the minimum is half of it.
const OPERATOR_WAIT: Duration = Duration::from_secs(30);
