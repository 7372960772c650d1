//! The watch on the registration's own keys: only a short cut, for the keys are read as well.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::backoff::jittered;
use crate::error::EtcdError;
use crate::etcd::{Etcd, Token, Watch};
use crate::keyspace::{Event, Key};

/// The watch on our own keys, over one stream.
#[derive(Debug, Default)]
pub(super) struct KeyWatch {
    open: Option<Watch>,
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
    /// The next news of the keys, of which there is at least one.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no news; a watch that was being opened is opened anew.
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
        let wait = if hopeless { REFUSED } else { REWATCH };
        let wait = jittered(wait, &mut fastrand::Rng::new());
        self.not_before = Some(Instant::now() + wait);
        News::Lost(error)
    }

    async fn reopen(&mut self, etcd: &Etcd, keys: &[Key]) -> Result<(), EtcdError> {
        if let Some(not_before) = self.not_before {
            sleep_until(not_before).await;
        }
        if self.refusals == 1 {
            // Calls renew their token by themselves; a watch is told in a message.
            etcd.refused(self.token.as_ref()).await?;
        }
        self.token = etcd.token();
        self.open = Some(etcd.watch_each(&keys[0], &keys[1..]).await?);
        Ok(())
    }
}

/// Between two tries to watch our own keys. It is only a short cut: they are read at each renewal meanwhile.
const REWATCH: Duration = Duration::from_secs(1);
/// The same while it is refused.
const REFUSED: Duration = Duration::from_secs(30);
