//! The watch on the registration's own keys: only a short cut, for the keys are read as well.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument;

use crate::backoff::{Backoff, jittered};
use crate::error::EtcdError;
use crate::etcd::{Etcd, Token, Watch};
use crate::keyspace::{Event, Key};

/// The watch on our own keys, over one stream.
pub(super) struct KeyWatch {
    open: Option<Watch>,
    /// One that is being opened, by a task of its own: renewals come in between, and with a short TTL it would be begun anew at each. Left
    /// where it was it could hold the lock of the token, which the renewal may need.
    opening: JoinSet<Result<Watch, EtcdError>>,
    /// When it was opened.
    since: Option<Instant>,
    backoff: Backoff,
    /// What the watch was opened with.
    token: Option<Token>,
    not_before: Option<Instant>,
    /// How often in a row it was refused.
    refusals: u32,
}

/// What the watch on our own keys has to say.
pub(super) enum News {
    /// From here on nothing is missed.
    Opened,
    Events(Vec<Event>),
    Lost(EtcdError),
}

impl KeyWatch {
    pub(super) fn new() -> Self {
        Self {
            open: None,
            opening: JoinSet::new(),
            since: None,
            backoff: Backoff::new(REWATCH, REWATCH_MAX),
            token: None,
            not_before: None,
            refusals: 0,
        }
    }

    /// The next news of the keys, of which there is at least one.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no news, and a watch that is being opened goes on being opened with the next one.
    pub(super) async fn next(&mut self, etcd: &Etcd, keys: &[Key]) -> News {
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
                etcd.report(watch, &error);
                error
            }
        };
        self.open = None;
        let refused = error.kind().is_refusal();
        self.refusals = if refused { self.refusals + 1 } else { 0 };
        // Once refused, a fresh token may help; then only an operator can, as where none is to be had.
        let hopeless = self.refusals > 1 || !refused && error.kind().needs_operator();
        let since = self.since.take();
        if since.is_some_and(|since| Instant::now().saturating_duration_since(since) >= REWATCH_MAX)
        {
            self.backoff.reset();
        }
        let mut rng = fastrand::Rng::new();
        let wait = if hopeless {
            jittered(REFUSED, &mut rng)
        } else {
            self.backoff.next(&mut rng)
        };
        self.not_before = Some(Instant::now() + wait);
        News::Lost(error)
    }

    async fn reopen(&mut self, etcd: &Etcd, keys: &[Key]) -> Result<(), EtcdError> {
        if self.opening.is_empty() {
            self.prepare(etcd).await?;
            let (etcd, keys) = (etcd.clone(), keys.to_vec());
            self.token = etcd.token();
            let opening = async move { etcd.watch_each(&keys[0], &keys[1..]).await };
            self.opening.spawn(opening.in_current_span());
        }
        match self.opening.join_next().await {
            Some(Ok(opened)) => self.open = Some(opened?),
            Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Only a runtime that is shutting down cancels it.
            _ => std::future::pending().await,
        }
        self.since = Some(Instant::now());
        Ok(())
    }

    /// Waits until it is time, and sees to the token.
    async fn prepare(&mut self, etcd: &Etcd) -> Result<(), EtcdError> {
        if let Some(not_before) = self.not_before {
            sleep_until(not_before).await;
        }
        if self.refusals == 1 {
            // Calls renew their token by themselves; a watch is told in a message.
            etcd.refused(self.token.as_ref()).await?;
        }
        Ok(())
    }
}

/// Between two tries to watch our own keys, at first. It is only a short cut: they are read at each renewal meanwhile.
const REWATCH: Duration = Duration::from_secs(1);
/// What that grows to, for each watch that is opened costs a read as well. One that lasted for so long was well.
const REWATCH_MAX: Duration = Duration::from_secs(15);
/// The same while it is refused.
const REFUSED: Duration = Duration::from_secs(30);
