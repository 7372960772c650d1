//! The list-and-watch machine of one prefix: pure, so that every order of answers can be played to it.
//!
//! ```text
//!            ┌─────── too large: smaller pages ──────┐
//!            │   compacted, failed: from the start   │
//!            ▼                                       │
//!   ┌─▶ Listing ── last page ──▶ Watching{R} ── end, error ──▶ Resuming{R}
//!   │      ▲                       │  │  ▲                          │
//!   │      └── compacted, or the ──┘  │  └─────── after a wait ─────┤
//!   │       store is another one      └ check when opened, or when  │
//!   │                                   the header is below R       │
//!   └───────────────────────── set empty ───────────────────────────┘
//! ```
//!
//! A store that was wiped or restored keeps its cluster id, and often its term and revisions: that R means the same there is only
//! known by a key. So whenever a watch is opened the key written last is read linearizably, before any message of the watch is
//! looked at. After the opening and not before it: the stream dies with the server process, so what is true then stays true for as
//! long as the stream lasts.
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
    /// Read a key linearizably, keeping the watch; answer with [`Machine::on_checked`].
    Check(Key),
    /// Drop the watch, wait, and fetch a fresh token; answer with [`Machine::on_token`].
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
    /// The number of keys asked for at once: halved when an answer is too large, and grown again.
    page_limit: i64,
    /// What it may grow to: halved when an answer takes too long.
    page_cap: i64,
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
    /// The key written last among those of the first page.
    check: Option<KeyVersion>,
    /// Keys that are there with a value that cannot be read.
    oversized: Vec<KeyVersion>,
    /// An event was too large to be received: the watch begins after the list's revision, or it would come again.
    skipping: bool,
    /// The list before this one did not stand up to the check. This one is not checked again: where keys change all the time, a
    /// check would find them changed after every list.
    distrusted: bool,
}

#[derive(Debug)]
struct Watching {
    revision: Revision,
    opened: Option<Instant>,
    /// Events of a revision that is not complete yet.
    pending: Vec<Event>,
    /// The key that tells whether this is the store that the set came from, until it was asked.
    check: Option<Key>,
    /// Whether a header below R has been looked into on this stream.
    suspected: bool,
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
            page_cap: PAGE_LIMIT,
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

    /// Takes the outcome of [`Command::RenewToken`].
    pub(super) fn on_token(&mut self, renewed: bool) -> Command {
        // Without a fresh token the last refusal said nothing of it.
        self.refused = renewed;
        self.on_wake()
    }

    /// The first command, and the one after a wait.
    pub(super) fn on_wake(&mut self) -> Command {
        match &self.state {
            State::Listing(listing) => Command::List(self.request(listing)),
            State::Watching(watching) => Command::Watch(watching.revision),
            State::Resuming { revision } => {
                let revision = *revision;
                match self.newest() {
                    Some(key) => self.watch(revision, Some(key)),
                    // An empty set has no key to tell one store from another by.
                    None => self.relist(false),
                }
            }
        }
    }

    /// The key written last: the one that a store with another history is least likely to have.
    fn newest(&self) -> Option<Key> {
        let newest = self.keys.iter().max_by_key(|(_, state)| state.mod_revision);
        newest.map(|(key, _)| key.clone())
    }

    /// Takes the answer to [`Command::List`].
    pub(super) fn on_page(&mut self, answer: Result<Page, EtcdError>) -> Command {
        let State::Listing(listing) = &mut self.state else {
            return self.on_wake();
        };
        match answer {
            Ok(page) => {
                self.page_limit = (self.page_limit * 2).min(self.page_cap);
                let header = *listing.header.get_or_insert(page.header);
                let more = page.more && !page.kvs.is_empty();
                listing.next = page.kvs.last().map(|kv| kv.key.successor());
                if std::mem::take(&mut listing.naming) {
                    listing
                        .oversized
                        .extend(page.kvs.iter().map(KeyValue::version));
                } else {
                    if listing.kvs.is_empty() {
                        let newest = page.kvs.iter().max_by_key(|kv| kv.mod_revision);
                        listing.check = newest.map(KeyValue::version);
                    }
                    listing.kvs.extend(page.kvs);
                }
                if more {
                    return self.on_wake();
                }
                let listing = std::mem::take(listing);
                // One of the first page: a store that is wiped between two pages has another last one.
                let check = listing.check.filter(|_| !listing.distrusted);
                self.complete(header, listing.kvs, listing.oversized);
                self.page_cap = PAGE_LIMIT;
                let command = self.watch(header.revision, check.map(|check| check.key));
                match command {
                    Command::Watch(revision) if listing.skipping => {
                        Command::Watch(Revision::new(revision.get() + 1))
                    }
                    command => command,
                }
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
                    distrusted: listing.distrusted,
                    skipping: listing.skipping,
                    ..Listing::default()
                };
                let wait = self.backoff.next(&mut self.rng);
                Command::Wait(wait)
            }
            _ => {
                // The pages at hand may be those of a store that is gone when the next one is asked for.
                *listing = Listing {
                    distrusted: listing.distrusted,
                    skipping: listing.skipping,
                    ..Listing::default()
                };
                if error.kind() == EtcdErrorKind::DeadlineExceeded {
                    // Over a slow link, a page of large values takes longer than a call may.
                    self.page_cap = (self.page_cap / 2).max(PAGE_CAP_MIN);
                    self.page_limit = self.page_limit.min(self.page_cap);
                }
                self.wait(error)
            }
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
    fn complete(&mut self, header: Header, kvs: Vec<KeyValue>, oversized: Vec<KeyVersion>) {
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
        for KeyVersion {
            key,
            mod_revision,
            lease,
        } in oversized
        {
            // Its last good value, if there was one, stays.
            let before = gone.remove(&key);
            if before.is_none_or(|before| before.mod_revision != mod_revision) {
                tracing::warn!(%key, revision = %mod_revision, "skipped a value that is too large to be received");
                self.report.oversized += 1;
            }
            self.keys.insert(
                key,
                KeyState {
                    mod_revision,
                    lease,
                },
            );
        }
        let deleted = gone.into_keys().map(|key| Event::Delete {
            key,
            mod_revision: header.revision,
        });
        self.update.extend(deleted);
    }

    fn watch(&mut self, revision: Revision, check: Option<Key>) -> Command {
        self.report.revision = revision;
        self.state = State::Watching(Watching {
            revision,
            opened: None,
            pending: Vec::new(),
            check,
            suspected: false,
        });
        Command::Watch(revision)
    }

    /// Takes the good answer to [`Command::Watch`].
    pub(super) fn on_watch_opened(&mut self, now: Instant) -> Command {
        self.report.watches += 1;
        let State::Watching(watching) = &mut self.state else {
            return self.on_wake();
        };
        watching.opened = Some(now);
        match watching.check.take() {
            Some(key) => Command::Check(key),
            None => Command::Receive,
        }
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
        let suspicious = (behind || foreign) && !std::mem::replace(&mut watching.suspected, true);

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
        match self.newest() {
            Some(key) => Command::Check(key),
            None => self.relist(false),
        }
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
        let healthy = |opened| now.saturating_duration_since(opened) >= HEALTHY_AFTER;
        if watching.opened.is_some_and(healthy) {
            self.backoff.reset();
        }
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
            _ => {}
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
            // What cannot be checked is not believed.
            Err(error) => return self.on_watch_ended(error, now),
        };
        let State::Watching(watching) = &self.state else {
            return self.on_wake();
        };
        let went_back = header.cluster_id != self.seen.cluster_id
            || header.revision < self.seen.revision
            || header.raft_term < self.seen.raft_term;
        let floor = watching.revision;
        let same = found.is_some_and(|found| {
            self.keys.get(&found.key).is_some_and(|known| {
                // Written again under the same lease, by its owner, is the same store: the watch brings the write.
                let later = found.mod_revision > floor && known.lease != LeaseId::NONE;
                known.lease == found.lease && (later || known.mod_revision == found.mod_revision)
            })
        });
        if went_back || !same {
            return self.relist(true);
        }
        self.seen = header;
        Command::Receive
    }

    fn relist(&mut self, distrusted: bool) -> Command {
        self.state = State::Listing(Listing {
            distrusted,
            ..Listing::default()
        });
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
/// Small enough for any link that carries a call's answer at all.
const PAGE_CAP_MIN: i64 = 10;
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
