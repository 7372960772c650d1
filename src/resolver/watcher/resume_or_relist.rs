//! Handles the end of a watch: opens a new watch at the same revision, or lists the prefix again if the revision was compacted, if an event
//! is too large, or if the watches deliver nothing.

use std::time::Duration;

use tokio::time::Instant;

use super::machine::{Command, Machine};
use super::state::{FruitlessWatches, Listing, State};
use crate::backoff::jittered;
use crate::error::{EtcdError, EtcdErrorKind};

impl Machine {
    /// Handles the end of the watch, for any reason, and a watch that could not be opened.
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
            // A watch that delivered events is reopened within a second. A backlog is therefore delivered even if the connection fails
            // repeatedly. The limited rate does not burden the server.
            _ if progressed => self.backoff.cap_next(MAX_WAIT_AFTER_PROGRESS),
            _ => {}
        }
        if healthy {
            self.backoff.reset();
        }
        if healthy || progressed {
            self.fruitless = FruitlessWatches::default();
        }
        // For unary calls, the client renews a rejected token. A watch is rejected in a message, and older servers report an invalid token
        // as a missing permission. So after the first rejection, the token is renewed. A second consecutive rejection is treated as a
        // missing permission.
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
        // The last rejection counts only if the next attempt uses a fresh token.
        self.token_renewed = outcome.is_ok();
        match outcome {
            // The renewal is retried slowly, because each attempt costs etcd a password hash.
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

    /// Returns a wait after a failure. The wait is jittered and prevents a busy loop. It is long if only an operator can fix the failure.
    pub(super) fn wait(&mut self, error: EtcdError) -> Command {
        let slowly = error.kind().needs_operator();
        self.report.trouble = Some(error);
        if slowly {
            return Command::Wait(jittered(OPERATOR_WAIT, &mut self.rng));
        }
        Command::Wait(self.backoff.next(&mut self.rng))
    }
}

/// Longest wait after a watch that delivered events.
const MAX_WAIT_AFTER_PROGRESS: Duration = Duration::from_secs(1);
/// A watch that lasted this long was healthy, and its end is the first failure of a new series.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// Wait between attempts if only an operator can help, as with rejected credentials or permissions.
pub(super) const OPERATOR_WAIT: Duration = Duration::from_secs(30);
