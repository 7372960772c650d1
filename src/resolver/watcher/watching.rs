//! A watch: opened, checked, read, ended.

use std::time::Duration;

use tokio::time::Instant;

use super::listing::Listing;
use super::{Command, KeyState, Machine, State};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Event, Header, Key, KeyVersion, LeaseId, Revision, WatchMessage};

#[derive(Debug)]
pub(super) struct Watching {
    pub(super) revision: Revision,
    /// The revision that it was opened at.
    began: Revision,
    pub(super) opened: Option<Instant>,
    /// Whether the store was seen to be past R: there may be something to catch up with.
    behind: bool,
    /// Events of a revision that is not complete yet.
    pending: Vec<Event>,
    /// The key that tells whether this is the store that the set came from, until it was asked.
    check: Option<Key>,
    /// Whether a header below R has been looked into on this stream.
    suspected: bool,
}

/// Watches in a row that have brought nothing, though the store was past R: there may be more to bring than a server or a link can within the
/// time, and it would be the same again. A list comes in pages, which shrink where a link is slow.
#[derive(Debug)]
pub(super) struct Fruitless {
    watches: u32,
    /// How many are too many: twice as many each time that it was so.
    limit: u32,
}

impl Default for Fruitless {
    fn default() -> Self {
        Self {
            watches: 0,
            limit: FRUITLESS,
        }
    }
}

impl Fruitless {
    /// Counts one more, and says whether to list instead.
    pub(super) fn is_too_much(&mut self, silent: bool) -> bool {
        self.watches += if silent { 2 } else { 1 };
        let too_much = self.watches >= self.limit;
        if too_much {
            self.watches = 0;
            self.limit = (self.limit * 2).min(FRUITLESS_MAX);
        }
        too_much
    }
}

impl Machine {
    pub(super) fn watch(&mut self, revision: Revision, check: Option<Key>) -> Command {
        self.report.revision = revision;
        self.state = State::Watching(Watching {
            revision,
            began: revision,
            behind: false,
            opened: None,
            pending: Vec::new(),
            check,
            suspected: false,
        });
        Command::Watch(revision)
    }

    /// Takes the good answer to [`Command::Watch`].
    pub(in crate::resolver) fn on_watch_opened(&mut self, now: Instant) -> Command {
        self.report.watches += 1;
        let State::Watching(watching) = &mut self.state else {
            return self.on_wake();
        };
        watching.opened = Some(now);
        self.audit.on_watch_opened(now, &mut self.rng);
        match watching.check.take() {
            Some(key) => Command::Check(key),
            None => Command::Receive,
        }
    }

    /// Takes a message that does not cancel the watch.
    pub(in crate::resolver) fn on_message(&mut self, message: WatchMessage) -> Command {
        let State::Watching(watching) = &mut self.state else {
            return self.on_wake();
        };
        // The store at the other end is alive and answers for this prefix: what went wrong before is over.
        self.report.trouble = None;
        self.refused = false;
        watching.behind |= message.header.revision > watching.revision;
        let lags = message.header.revision != Revision::ZERO
            && message.header.revision < watching.revision;
        let foreign =
            message.header.cluster_id != 0 && message.header.cluster_id != self.seen.cluster_id;
        let suspicious = (lags || foreign) && !std::mem::replace(&mut watching.suspected, true);

        // Below R is history that a lagging member replays.
        let floor = watching.revision;
        watching.pending.extend(
            message
                .events
                .into_iter()
                .filter(|event| event.mod_revision() >= floor),
        );
        let pending = &mut watching.pending;
        let incomplete = match pending.last() {
            Some(last) if message.fragment => {
                let last = last.mod_revision();
                pending
                    .iter()
                    .rev()
                    .take_while(|event| event.mod_revision() == last)
                    .count()
            }
            _ => 0,
        };
        let ready: Vec<_> = pending.drain(..pending.len() - incomplete).collect();
        let passed = ready.last().map_or(watching.revision, Event::mod_revision);
        watching.revision = passed;
        self.report.revision = passed;
        // An event is proof that the store was there: one that was restored from a backup before it must not pass for it.
        if !foreign {
            self.seen.revision = self.seen.revision.max(passed);
        }
        for event in ready {
            self.apply(event);
        }
        // Afterwards: one message may hold what a tombstone overtook, and what is past it.
        self.tombstones.retain(|_, gone| *gone > passed);
        if !suspicious {
            return Command::Receive;
        }
        // A member that lags looks like this, and so does a store that was wiped: a linearizable read tells.
        if let Some(key) = self.newest() {
            return Command::Check(key);
        }
        self.state = State::Listing(Listing::default());
        Command::Wait(self.backoff.next(&mut self.rng))
    }

    pub(super) fn apply(&mut self, event: Event) {
        match &event {
            Event::Put(kv) => {
                let later = |known: &KeyState| known.mod_revision > kv.mod_revision;
                let buried = |gone: &Revision| *gone >= kv.mod_revision;
                if self.keys.get(&kv.key).is_some_and(later)
                    || self.tombstones.get(&kv.key).is_some_and(buried)
                {
                    return;
                }
                self.tombstones.remove(&kv.key);
                self.keys
                    .insert(kv.key.clone(), KeyState::of(&kv.version()));
            }
            Event::Delete { key, mod_revision } => {
                if self
                    .keys
                    .get(key)
                    .is_none_or(|known| known.mod_revision > *mod_revision)
                {
                    return;
                }
                self.keys.remove(key);
            }
        }
        self.update.push(event);
    }

    /// Takes the end of the watch, whatever it was, or a watch that could not be opened.
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
                    skipping: true,
                    ..Listing::default()
                };
                self.state = State::Listing(listing);
            }
            _ if fruitless && self.fruitless.is_too_much(silent) => {
                self.state = State::Listing(Listing::default());
            }
            // A backlog behind a connection that is cut all the time is caught up with, at a pace that no server minds.
            _ if progressed => self.backoff.ease(PROGRESS),
            _ => {}
        }
        if healthy {
            self.backoff.reset();
        }
        if healthy || progressed {
            self.fruitless = Fruitless::default();
        }
        // Calls renew a refused token by themselves. A watch is refused in a message, and by older servers with the words of a missing
        // permission; the second time it is meant.
        if error.kind().is_refusal() {
            self.refused = !self.refused;
            if self.refused {
                self.report.trouble = Some(error);
                return Command::RenewToken(self.backoff.next(&mut self.rng));
            }
        }
        self.wait(error)
    }

    /// Takes the answer to [`Command::Check`].
    pub(in crate::resolver) fn on_checked(
        &mut self,
        answer: Result<(Header, Option<KeyVersion>), EtcdError>,
        now: Instant,
    ) -> Command {
        let (header, found) = match answer {
            Ok(answer) => answer,
            // What cannot be checked is not believed.
            Err(error) => return self.on_watch_ended(error, now),
        };
        let State::Watching(watching) = &self.state else {
            return self.on_wake();
        };
        let floor = watching.revision;
        let same = found.is_some_and(|found| {
            self.keys.get(&found.key).is_some_and(|known| {
                // Written again under the same lease, by its owner, is the same store: the watch brings the write.
                let later = found.mod_revision > floor && known.lease != LeaseId::NONE;
                known.lease == found.lease && (later || known.is_same(&KeyState::of(&found)))
            })
        });
        if self.is_other_store(header) || !same {
            return self.relist(true);
        }
        self.seen = header;
        Command::Receive
    }
}

/// How often a watch may be cut off before it has brought anything of what there is; one that is silent for as long as it is waited for counts
/// twice.
const FRUITLESS: u32 = 3;
/// What that grows to. Others may write to the store all the time, and whether a backlog is ours a watch that brings nothing does not tell.
const FRUITLESS_MAX: u32 = 48;
/// The longest wait after a watch that has brought something.
const PROGRESS: Duration = Duration::from_secs(1);
/// A watch that lasted this long was healthy, and its end is the first failure of a new series.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
