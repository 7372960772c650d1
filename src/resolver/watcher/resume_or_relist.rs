//! Handles the end of a watch. Normally, a new watch is opened at the revision of the last applied event. The prefix is listed again
//! instead if this revision was compacted or is ahead of the store, if an event is too large, or if several watches in a row deliver
//! nothing although the store is at a higher revision.

use std::time::Duration;

use tokio::time::Instant;

use super::machine::{Command, Machine};
use super::state::{FruitlessWatches, Listing, State};
use crate::backoff::jittered;
use crate::error::{EtcdError, EtcdErrorKind};

impl Machine {
    /// Handles the end of the watch, for any reason. Also handles a watch that could not be opened.
    pub(in crate::resolver) fn on_watch_ended(
        &mut self,
        error: EtcdError,
        now: Instant,
    ) -> Command {
        let State::Watching(watching) = &self.state else {
            return self.wait(error);
        };
        let healthy = |opened| now.saturating_duration_since(opened) >= HEALTHY_AFTER;
        let healthy = watching.opened.is_some_and(healthy);
        let progressed = watching.revision > watching.began;
        let fruitless = watching.behind && !progressed && !healthy;
        let silent = error.kind() == EtcdErrorKind::DeadlineExceeded;
        let revision = watching.revision;
        self.state = State::Resuming { revision };
        match error.kind() {
            EtcdErrorKind::Compacted | EtcdErrorKind::FutureRevision => {
                self.state = State::Listing(Listing::default());
            }
            EtcdErrorKind::ResponseTooLarge => {
                let listing = Listing {
                    skips_oversized_event: true,
                    ..Listing::default()
                };
                self.state = State::Listing(listing);
            }
            _ if fruitless && self.fruitless.must_list(silent) => {
                self.state = State::Listing(Listing::default());
            }
            // After a watch that delivered events, the next one is opened within a second, unless only an operator can resolve the error.
            // A backlog is therefore delivered even if the connection fails repeatedly. A short wait remains, to limit the load on the
            // server.
            _ if progressed => self.backoff.cap_next(MAX_WAIT_AFTER_PROGRESS),
            _ => {}
        }
        if healthy {
            self.backoff.reset();
        }
        if healthy || progressed {
            self.fruitless = FruitlessWatches::default();
        }
        // For unary requests, `src/etcd/` renews a rejected token by itself. The rejection of a watch arrives as a message, and older
        // servers report an invalid token as a missing permission. The first rejection of a watch therefore renews the token. A second
        // rejection in a row is treated as a missing permission.
        if error.kind().is_refusal() {
            self.token_renewed = !self.token_renewed;
            if self.token_renewed {
                self.report.trouble = Some(error);
                return Command::RenewToken(self.backoff.next(&mut self.rng));
            }
        }
        self.wait(error)
    }

    /// Handles the result of [`Command::RenewToken`].
    pub(in crate::resolver) fn on_token(&mut self, outcome: Result<(), EtcdError>) -> Command {
        // Without a fresh token, the rejection of the next watch must count as a first rejection again.
        self.token_renewed = outcome.is_ok();
        match outcome {
            // Credentials that are wrong are retried slowly, because each attempt costs etcd a password hash.
            Err(error) if error.kind().needs_operator() => self.wait(error),
            _ => self.on_wake(),
        }
    }

    pub(super) fn relist(&mut self, after_failed_check: bool) -> Command {
        self.state = State::Listing(Listing {
            after_failed_check,
            ..Listing::default()
        });
        self.on_wake()
    }

    /// Records a failure, and returns a jittered wait that prevents a busy loop. The wait is long if only an operator can resolve the
    /// failure.
    pub(super) fn wait(&mut self, error: EtcdError) -> Command {
        let slowly = error.kind().needs_operator();
        self.report.trouble = Some(error);
        if slowly {
            return Command::Wait(jittered(OPERATOR_WAIT, &mut self.rng));
        }
        Command::Wait(self.backoff.next(&mut self.rng))
    }
}

/// Maximum wait after a watch that delivered events. Errors that need an operator are excepted: see [`OPERATOR_WAIT`].
const MAX_WAIT_AFTER_PROGRESS: Duration = Duration::from_secs(1);
/// A watch that was open for at least this long was healthy. Its end is the first failure of a new series, so the backoff is reset.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// Maximum wait between attempts if only an operator can resolve the failure, such as rejected credentials or permissions.
pub(super) const OPERATOR_WAIT: Duration = Duration::from_secs(30);
