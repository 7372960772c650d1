//! The list-and-watch machine of one prefix: pure, so that every order of answers can be played to it.
//!
//! ```text
//!            ┌────────────── too large: smaller pages ─────────────┐
//!            │              compacted: from the start              │
//!            ▼                                                     │
//!   ┌─▶ Listing ── last page ──▶ Watching{R} ── end, error ──▶ Resuming{R}
//!   │      ▲                        ▲   │ ▲                        │
//!   │      └────── compacted ───────│───┘ └─ lower header: check ──┤
//!   │                               └── newest key unchanged ──────┤
//!   └────── newest key differs, store went back, set empty ────────┘
//! ```
//!
//! R is the header revision of the list, then the mod revision of the last event applied. The header of a watch message never moves
//! it: in catch-up batches it runs ahead of the events. A watch is opened at R itself, since a revision may have been cut in two by
//! fragments; what is then seen twice changes nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::{Backoff, jittered};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{
    Event, Header, Key, KeyValue, KeyVersion, LeaseId, ListRequest, Page, Range, Revision,
    WatchMessage,
};

/// What the owner task is to do next. Each is answered by one call of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Ask for a page; answer with [`Machine::on_page`].
    List(ListRequest),
    /// Open a watch at this revision in place of the one at hand; answer with [`Machine::on_watch_opened`] or
    /// [`Machine::on_watch_ended`].
    Watch(Revision),
    /// Take the next message of the watch; answer with [`Machine::on_message`] or [`Machine::on_watch_ended`].
    Receive,
    /// Read a key linearizably, keeping the watch if there is one; answer with [`Machine::on_checked`].
    Check(Key),
    /// Fetch a fresh token, then as for `Wait`.
    RenewToken(Duration),
    /// Drop the watch and wait; answer with [`Machine::on_wake`].
    Wait(Duration),
}

/// The machine.
#[derive(Debug)]
pub(super) struct Machine {
    range: Range,
    state: State,
    /// The highest header of a linearizable answer: only such answers never go back on a healthy cluster.
    seen: Header,
    /// Every key of the prefix as last applied, decodable or not.
    keys: BTreeMap<Key, KeyState>,
    /// Changes that are to be published.
    update: Vec<Event>,
    backoff: Backoff,
    rng: fastrand::Rng,
    /// Whether the last watch was refused.
    refused: bool,
    /// The number of keys asked for at once.
    page_limit: i64,
    pub(super) report: Report,
}

/// What a user may know of the machine.
#[derive(Clone, Debug, Default)]
pub(super) struct Report {
    /// Whether the set has been listed once.
    pub(super) listed: bool,
    /// The revision the set is known to be right at.
    pub(super) revision: Revision,
    /// Why the set is not being watched right now.
    pub(super) trouble: Option<EtcdError>,
    pub(super) lists: u64,
    pub(super) watches: u64,
    /// Keys whose value alone is above the message limit.
    pub(super) oversized: u64,
}

#[derive(Clone, Copy, Debug)]
struct KeyState {
    mod_revision: Revision,
    lease: LeaseId,
}

#[derive(Debug)]
enum State {
    Listing(Listing),
    Watching(Watching),
    Resuming { revision: Revision },
}

/// A list under way.
#[derive(Debug, Default)]
struct Listing {
    kvs: Vec<KeyValue>,
    /// The first page's header.
    header: Option<Header>,
    /// Where the next page begins; `None` at the range's start.
    next: Option<Key>,
    /// How often compaction has overtaken it. From the third time on the pages are not pinned to one revision; watching from the first
    /// page's revision makes the outcome exact all the same.
    compacted: u32,
    /// The next request asks for the name alone of a key that is too large to be read.
    naming: bool,
}

#[derive(Debug)]
struct Watching {
    revision: Revision,
    opened: Instant,
    /// Events of a revision that is not complete yet.
    pending: Vec<Event>,
    /// Whether a header below R has been looked into on this stream.
    checked: bool,
}

impl Machine {
    pub(super) fn new(range: Range, rng: fastrand::Rng) -> Self {
        Self {
            range,
            state: State::Listing(Listing::default()),
            seen: Header::default(),
            keys: BTreeMap::new(),
            update: Vec::new(),
            backoff: Backoff::new(BACKOFF_FIRST, BACKOFF_MAX),
            rng,
            refused: false,
            page_limit: PAGE_LIMIT,
            report: Report::default(),
        }
    }

    pub(super) fn range(&self) -> &Range {
        &self.range
    }

    /// The changes since the last call, in order.
    pub(super) fn take_update(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.update)
    }

    /// The first command, and the one after a wait.
    pub(super) fn on_wake(&mut self) -> Command {
        match &self.state {
            State::Listing(listing) => Command::List(self.request(listing)),
            State::Watching(watching) => Command::Watch(watching.revision),
            State::Resuming { .. } => self.check(),
        }
    }

    fn check(&mut self) -> Command {
        // The key written last is the one that a store with another history is least likely to have.
        match self.keys.iter().max_by_key(|(_, state)| state.mod_revision) {
            Some((newest, _)) => Command::Check(newest.clone()),
            None => self.relist(),
        }
    }

    /// Takes the answer to [`Command::List`].
    pub(super) fn on_page(&mut self, answer: Result<Page, EtcdError>, now: Instant) -> Command {
        let State::Listing(listing) = &mut self.state else {
            return self.on_wake();
        };
        match answer {
            Ok(page) => {
                self.page_limit = (self.page_limit * 2).min(PAGE_LIMIT);
                let header = *listing.header.get_or_insert(page.header);
                let more = page.more && !page.kvs.is_empty();
                listing.next = page.kvs.last().map(|kv| kv.key.successor());
                if std::mem::take(&mut listing.naming) {
                    self.report.oversized += page.kvs.len() as u64;
                } else {
                    listing.kvs.extend(page.kvs);
                }
                if more {
                    return self.on_wake();
                }
                let kvs = std::mem::take(&mut listing.kvs);
                self.complete(header, kvs, now)
            }
            Err(error) => self.on_list_failed(error),
        }
    }

    fn on_list_failed(&mut self, error: EtcdError) -> Command {
        let State::Listing(listing) = &mut self.state else {
            return self.on_wake();
        };
        match error.kind() {
            EtcdErrorKind::ResponseTooLarge if self.page_limit > 1 => {
                self.page_limit /= 2;
                self.on_wake()
            }
            EtcdErrorKind::ResponseTooLarge if !listing.naming => {
                listing.naming = true;
                self.on_wake()
            }
            EtcdErrorKind::Compacted | EtcdErrorKind::FutureRevision => {
                *listing = Listing {
                    compacted: listing.compacted + 1,
                    ..Listing::default()
                };
                let wait = self.backoff.next(&mut self.rng);
                Command::Wait(wait)
            }
            _ => self.wait(error),
        }
    }

    fn request(&self, listing: &Listing) -> ListRequest {
        let start = listing
            .next
            .clone()
            .unwrap_or_else(|| self.range.start.clone());
        let pinned = listing
            .header
            .filter(|_| listing.compacted < UNPINNED_AFTER);
        ListRequest {
            range: Range {
                start,
                end: self.range.end.clone(),
            },
            limit: if listing.naming { 1 } else { self.page_limit },
            revision: pinned.map_or(Revision::ZERO, |header| header.revision),
            keys_only: listing.naming,
        }
    }

    /// Takes a whole list over: what is in it is put, what is not is deleted.
    fn complete(&mut self, header: Header, kvs: Vec<KeyValue>, now: Instant) -> Command {
        // Not the maximum: after a wipe the store's history begins anew, and with it what can be held against it.
        self.seen = header;
        self.report.listed = true;
        self.report.lists += 1;
        self.report.trouble = None;
        let mut gone = std::mem::take(&mut self.keys);
        for kv in kvs {
            gone.remove(&kv.key);
            self.keys.insert(
                kv.key.clone(),
                KeyState {
                    mod_revision: kv.mod_revision,
                    lease: kv.lease,
                },
            );
            self.update.push(Event::Put(kv));
        }
        let deleted = gone.into_keys().map(|key| Event::Delete {
            key,
            mod_revision: header.revision,
        });
        self.update.extend(deleted);
        self.watch(header.revision, now)
    }

    fn watch(&mut self, revision: Revision, now: Instant) -> Command {
        self.report.revision = revision;
        self.state = State::Watching(Watching {
            revision,
            opened: now,
            pending: Vec::new(),
            checked: false,
        });
        Command::Watch(revision)
    }

    /// Takes the good answer to [`Command::Watch`].
    pub(super) fn on_watch_opened(&mut self) -> Command {
        self.report.watches += 1;
        Command::Receive
    }

    /// Takes a message that does not cancel the watch.
    pub(super) fn on_message(&mut self, message: WatchMessage) -> Command {
        let State::Watching(watching) = &mut self.state else {
            return self.on_wake();
        };
        // The store at the other end is alive and answers for this prefix: what went wrong before is over.
        self.report.trouble = None;
        self.refused = false;
        let behind = message.header.revision != Revision::ZERO
            && message.header.revision < watching.revision;
        let foreign =
            message.header.cluster_id != 0 && message.header.cluster_id != self.seen.cluster_id;
        let suspicious = (behind || foreign) && !std::mem::replace(&mut watching.checked, true);

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
        if let Some(last) = ready.last() {
            watching.revision = last.mod_revision();
            self.report.revision = watching.revision;
        }
        for event in ready {
            self.apply(event);
        }
        if !suspicious {
            return Command::Receive;
        }
        // A member that lags looks like this, and so does a store that was wiped: a linearizable read tells.
        self.check()
    }

    fn apply(&mut self, event: Event) {
        match &event {
            Event::Put(kv) => {
                if self
                    .keys
                    .get(&kv.key)
                    .is_some_and(|known| known.mod_revision > kv.mod_revision)
                {
                    return;
                }
                self.keys.insert(
                    kv.key.clone(),
                    KeyState {
                        mod_revision: kv.mod_revision,
                        lease: kv.lease,
                    },
                );
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
    pub(super) fn on_watch_ended(&mut self, error: EtcdError, now: Instant) -> Command {
        let State::Watching(watching) = &self.state else {
            return self.wait(error);
        };
        if now.saturating_duration_since(watching.opened) >= HEALTHY_AFTER {
            self.backoff.reset();
        }
        let revision = watching.revision;
        self.state = State::Resuming { revision };
        if matches!(
            error.kind(),
            EtcdErrorKind::Compacted | EtcdErrorKind::FutureRevision
        ) {
            self.state = State::Listing(Listing::default());
        }
        // Calls renew a refused token by themselves. A watch is refused in a message, and by older servers with the words of a missing
        // permission; the second time it is meant.
        if error.kind().is_refusal() && !std::mem::replace(&mut self.refused, true) {
            self.report.trouble = Some(error);
            return Command::RenewToken(self.backoff.next(&mut self.rng));
        }
        self.wait(error)
    }

    /// Takes the answer to [`Command::Check`].
    pub(super) fn on_checked(
        &mut self,
        answer: Result<(Header, Option<KeyVersion>), EtcdError>,
        now: Instant,
    ) -> Command {
        let (header, found) = match answer {
            Ok(answer) => answer,
            // While watching, the check can wait for the next stream; the watch at hand goes on.
            Err(_) if matches!(self.state, State::Watching(_)) => return Command::Receive,
            Err(error) => return self.wait(error),
        };
        let went_back = header.cluster_id != self.seen.cluster_id
            || header.revision < self.seen.revision
            || header.raft_term < self.seen.raft_term;
        let same = found.is_some_and(|found| {
            self.keys.get(&found.key).is_some_and(|known| {
                known.mod_revision == found.mod_revision && known.lease == found.lease
            })
        });
        if went_back || !same {
            return self.relist();
        }
        self.seen = header;
        match &self.state {
            State::Resuming { revision } => {
                let revision = *revision;
                self.watch(revision, now)
            }
            State::Watching(_) => Command::Receive,
            State::Listing(_) => self.on_wake(),
        }
    }

    fn relist(&mut self) -> Command {
        self.state = State::Listing(Listing::default());
        self.on_wake()
    }

    /// Waits after a failure: jittered, never in a loop, and long where only an operator can help.
    fn wait(&mut self, error: EtcdError) -> Command {
        let slowly = error.kind().needs_operator();
        self.report.trouble = Some(error);
        if slowly {
            return Command::Wait(jittered(OPERATOR_WAIT, &mut self.rng));
        }
        Command::Wait(self.backoff.next(&mut self.rng))
    }
}

/// Keys per page: 500 values of the usual 150 bytes are 75 KiB, and a page halves itself where values are large.
const PAGE_LIMIT: i64 = 500;
/// Lists that compaction overtook before pages are no longer pinned to one revision.
const UNPINNED_AFTER: u32 = 3;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A watch that lasted this long was healthy, and its end is the first failure of a new series.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// Between tries where credentials or permissions are refused.
const OPERATOR_WAIT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
