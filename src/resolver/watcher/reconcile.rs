//! Reconciliation, which runs beside the watch because a watch can lose events. All keys are compared with a list periodically, and single
//! keys are read.
//!
//! ```text
//!   every few minutes ──▶ names, page by page ──▶ suspects ── 5 s ──▶ still other? ──┐
//!                                                                                    ├──▶ read, and believed
//!   an address refuses connections ─────────────────────── within 2 s ───────────────┘
//! ```
//!
//! A list of names alone proves nothing, because the watch may still deliver the listed change. A difference makes the key a suspect, and
//! the watch gets 5 s to resolve it. Only a linearizable read of the key itself is trusted. The read replaces every event of the key up to
//! the revision of its response. Such events are dropped if they arrive later: by the key's mod revision if the key exists, by its
//! [`tombstone`](Machine::bury) if not.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;
use std::time::Duration;

use tokio::time::Instant;

use super::listing::PAGE_LIMIT;
use super::{Command, KeyState, Machine, State};
use crate::backoff::jittered;
use crate::error::EtcdError;
use crate::keyspace::{Event, Header, Key, KeyValue, ListRequest, Page, Range, Revision};

/// The schedule and the state of reconciliations and key reads.
#[derive(Debug)]
pub(super) struct Audit {
    /// Longest time between two lists; `None` disables lists.
    interval: Option<Duration>,
    next_list: Option<Instant>,
    /// Start of the next page of the list in progress, and the revision that the list is pinned to.
    cursor: Option<(Key, Revision)>,
    suspects: Vec<Suspect>,
    /// End of the time that the watch gets to resolve the suspects.
    settled: Option<Instant>,
    /// Keys to read, with the earliest time of each read.
    reads: BTreeSet<(Instant, Key)>,
    /// Earliest time of the next read of any key.
    next_read: Option<Instant>,
    /// Time of the last accepted report about each key, from [`ResolverFeedback`](crate::ResolverFeedback).
    doubted: HashMap<Key, Instant>,
    /// Suspects that are being read. If the read of a suspect differs from the known state, the watch has lost an event.
    confirming: BTreeSet<Key>,
    /// Whether the watch has lost an event.
    lossy: bool,
}

/// A key whose listed version differs from the known version.
#[derive(Debug)]
struct Suspect {
    key: Key,
    /// The listed version; `None` if the list does not contain the key.
    found: Option<KeyState>,
    /// The revision of the list.
    at: Revision,
}

impl Audit {
    pub(super) fn new(interval: Option<Duration>) -> Self {
        Self {
            interval: interval.map(|interval| interval.clamp(INTERVAL_MIN, INTERVAL_MAX)),
            next_list: None,
            cursor: None,
            suspects: Vec::new(),
            settled: None,
            reads: BTreeSet::new(),
            next_read: None,
            doubted: HashMap::new(),
            confirming: BTreeSet::new(),
            lossy: false,
        }
    }

    /// Handles the opening of a watch. The first opening schedules a list one interval later. A list that became due in the meantime is
    /// postponed.
    pub(super) fn on_watch_opened(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        self.cursor = None;
        // The watch may have to catch up first.
        self.settled = self.settled.map(|_| now + SETTLE);
        let Some(interval) = self.interval else {
            return;
        };
        match self.next_list {
            None => self.next_list = Some(now + jittered(interval, rng)),
            // After an outage longer than the interval, the lists of all clients are overdue at once. They are spread over one interval, as
            // they were before it.
            Some(at) if at <= now => {
                let wait = interval.mul_f64(rng.f64());
                self.next_list = Some(now + wait.max(SETTLE.min(interval)));
            }
            Some(_) => {}
        }
    }

    /// Handles a complete list with values, which resolves every doubt.
    pub(super) fn on_listed(&mut self) {
        self.cursor = None;
        self.suspects.clear();
        self.settled = None;
        self.reads.clear();
        self.confirming.clear();
        self.lossy = false;
    }

    fn due(&self) -> Option<Instant> {
        let read = self.reads.first().map(|(at, _)| *at);
        let read = read.map(|at| self.next_read.map_or(at, |next| at.max(next)));
        // No new list starts while the last one still has suspects.
        let list = self.next_list.filter(|_| self.suspects.is_empty());
        [read, self.settled, list].into_iter().flatten().min()
    }

    fn take_read(&mut self, now: Instant) -> Option<Key> {
        let (at, _) = self.reads.first()?;
        if *at > now || self.next_read.is_some_and(|next| next > now) {
            return None;
        }
        self.reads.pop_first().map(|(_, key)| key)
    }

    /// Schedules the next read, counted from the response to this one. The watch is not read while a key read is in progress, and a slow
    /// etcd must not block the watch for several reads in a row.
    fn on_answer(&mut self, failed: bool, now: Instant) {
        let wait = if failed { SETTLE } else { READ_STEP };
        self.next_read = Some(now + wait);
    }
}

impl Machine {
    /// Returns the time at which [`Machine::on_time`] is due; `None` while no watch is open.
    pub(in crate::resolver) fn due(&self) -> Option<Instant> {
        self.audit.due().filter(|_| self.is_watching())
    }

    fn is_watching(&self) -> bool {
        matches!(&self.state, State::Watching(watching) if watching.opened.is_some())
    }

    /// Returns the command that is due beside the watch.
    pub(in crate::resolver) fn on_time(&mut self, now: Instant) -> Command {
        if !self.is_watching() {
            return self.on_wake();
        }
        if let Some(key) = self.audit.take_read(now) {
            self.report.reads += 1;
            return Command::Read(key);
        }
        if self.audit.settled.is_some_and(|at| at <= now) {
            return self.on_settled(now);
        }
        if let (Some(at), Some(interval)) = (self.audit.next_list, self.audit.interval)
            && at <= now
            && self.audit.suspects.is_empty()
        {
            self.audit.next_list = Some(now + jittered(interval, &mut self.rng));
            return Command::Reconcile(self.names(self.range.start.clone(), Revision::ZERO));
        }
        Command::Receive
    }

    fn names(&self, start: Key, revision: Revision) -> ListRequest {
        let end = self.range.end.clone();
        ListRequest {
            range: Range { start, end },
            limit: PAGE_LIMIT,
            revision,
            keys_only: true,
        }
    }

    /// Handles the result of [`Command::Reconcile`].
    pub(in crate::resolver) fn on_names(
        &mut self,
        answer: Result<Page, EtcdError>,
        now: Instant,
    ) -> Command {
        let cursor = self.audit.cursor.take();
        if !self.is_watching() {
            return self.on_wake();
        }
        let page = match answer {
            Ok(page) => page,
            Err(error) => {
                // Only the watch decides whether etcd is reachable. The next list can replace this one.
                tracing::debug!(%error, "could not list the keys for reconciliation");
                return self.end_of_names(now);
            }
        };
        if self.is_other_store(page.header) {
            return self.relist(true);
        }
        self.seen = page.header;
        let (start, revision) =
            cursor.unwrap_or_else(|| (self.range.start.clone(), page.header.revision));
        let next = page.kvs.last().filter(|_| page.more);
        let next = next.map(|kv| kv.key.successor());
        self.compare(&start, next.as_ref(), &page, revision);
        match next {
            // With too many suspects, the prefix will probably be listed again, so no further page is needed.
            Some(next) if self.audit.suspects.len() <= SUSPECTS_MAX => {
                self.audit.cursor = Some((next.clone(), revision));
                Command::Reconcile(self.names(next, revision))
            }
            _ => {
                self.report.reconciliations += 1;
                self.end_of_names(now)
            }
        }
    }

    fn end_of_names(&mut self, now: Instant) -> Command {
        if !self.audit.suspects.is_empty() {
            self.audit.settled = Some(now + SETTLE);
        }
        Command::Receive
    }

    /// Compares the keys from `start` up to `end` with a page, and records each difference as a suspect.
    fn compare(&mut self, start: &Key, end: Option<&Key>, page: &Page, at: Revision) {
        let mut listed: HashMap<_, _> = page.kvs.iter().map(|kv| (&kv.key, kv)).collect();
        let end = end.map_or(Bound::Unbounded, Bound::Excluded);
        for (key, known) in self.keys.range((Bound::Included(start), end)) {
            let found = listed.remove(key).map(|kv| KeyState::of(&kv.named()));
            if !KeyState::agree(found.as_ref(), Some(known)) {
                let key = key.clone();
                self.audit.suspects.push(Suspect { key, found, at });
            }
        }
        let unknown = listed.into_values();
        let unknown = unknown.map(|kv| Suspect {
            key: kv.key.clone(),
            found: Some(KeyState::of(&kv.named())),
            at,
        });
        self.audit.suspects.extend(unknown);
    }

    /// Handles the end of the time that the watch had to resolve the suspects. Keys that still differ are read.
    fn on_settled(&mut self, now: Instant) -> Command {
        self.audit.settled = None;
        let suspects = std::mem::take(&mut self.audit.suspects);
        let left = suspects.into_iter().filter(|suspect| {
            let known = self.keys.get(&suspect.key);
            let passed = known.is_some_and(|known| known.mod_revision > suspect.at);
            !passed && !KeyState::agree(known, suspect.found.as_ref())
        });
        let left: Vec<_> = left.map(|suspect| suspect.key).collect();
        if left.len() > SUSPECTS_MAX {
            tracing::warn!(
                keys = left.len(),
                "the watch has lost changes of many keys: listing the prefix again"
            );
            return self.relist(true);
        }
        for key in left {
            self.audit.confirming.insert(key.clone());
            self.audit.reads.insert((now, key));
        }
        Command::Receive
    }

    /// Handles a report that the server named by a key refuses connections. One read shows whether the key still exists; it is delayed and
    /// rate-limited.
    pub(in crate::resolver) fn on_doubt(&mut self, key: &Key, now: Instant) {
        let audit = &mut self.audit;
        let lately = |at: &Instant| now.saturating_duration_since(*at) < DOUBT_INTERVAL;
        if !self.keys.contains_key(key)
            || audit.reads.len() >= READS_MAX
            || audit.doubted.get(key).is_some_and(lately)
        {
            return;
        }
        if audit.doubted.len() >= READS_MAX {
            audit.doubted.retain(|_, at| lately(at));
        }
        audit.doubted.insert(key.clone(), now);
        let wait = DOUBT_SPREAD.mul_f64(self.rng.f64());
        audit.reads.insert((now + wait, key.clone()));
    }

    /// Handles the result of [`Command::Read`].
    pub(in crate::resolver) fn on_read(
        &mut self,
        key: Key,
        answer: Result<(Header, Option<KeyValue>), EtcdError>,
        now: Instant,
    ) -> Command {
        self.audit.on_answer(answer.is_err(), now);
        let confirms = self.audit.confirming.remove(&key);
        if !self.is_watching() {
            return self.on_wake();
        }
        match answer {
            Ok((header, found)) => {
                let known = self.keys.get(&key).copied();
                let older = found
                    .as_ref()
                    .zip(known)
                    .is_some_and(|(found, known)| found.mod_revision < known.mod_revision);
                if older || self.is_other_store(header) {
                    return self.relist(true);
                }
                self.seen = header;
                let read = found.as_ref().map(|kv| KeyState::of(&kv.version()));
                if !KeyState::agree(read.as_ref(), known.as_ref()) {
                    self.report.repaired += 1;
                    self.audit.lossy |= confirms;
                    tracing::debug!(?key, revision = %header.revision, there = found.is_some(), "a read was ahead of the watch");
                    self.believe(key, found, header.revision);
                }
            }
            Err(error) => tracing::debug!(?key, %error, "could not read a key in doubt"),
        }
        if self.audit.lossy && self.audit.confirming.is_empty() {
            return self.distrust_watch();
        }
        Command::Receive
    }

    fn believe(&mut self, key: Key, found: Option<KeyValue>, revision: Revision) {
        if let Some(kv) = found {
            return self.apply(Event::Put(kv));
        }
        self.apply(Event::Delete {
            key: key.clone(),
            mod_revision: revision,
        });
        self.bury(key, revision);
    }

    /// Records that a key did not exist at a revision. Without this record, a put older than the read but delivered after it would restore
    /// the key; the delete that follows the put may be the lost event.
    fn bury(&mut self, key: Key, revision: Revision) {
        self.tombstones.insert(key, revision);
    }

    /// Opens a new watch, because a watch that has lost changes may lose more.
    fn distrust_watch(&mut self) -> Command {
        self.audit.lossy = false;
        let State::Watching(watching) = &self.state else {
            return self.on_wake();
        };
        tracing::warn!(revision = %watching.revision, "a list found changes that the watch has lost: opening a new watch");
        let revision = watching.revision;
        self.state = State::Resuming { revision };
        self.on_wake()
    }
}

/// Shortest interval. With a shorter one, clients would list without a pause.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Longest interval: the time of the next list must fit into an `Instant`.
const INTERVAL_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Time for the watch to resolve suspects: as long as a watch may be silent before it is probed.
const SETTLE: Duration = Duration::from_secs(5);
/// Limit of suspects. Above it, a list costs less than the reads.
const SUSPECTS_MAX: usize = 100;
/// Reads after reports are spread over this time: when a server crashes, all of its clients detect it within the same milliseconds.
const DOUBT_SPREAD: Duration = Duration::from_secs(2);
/// Shortest time between two reads of a key whose server keeps refusing connections.
const DOUBT_INTERVAL: Duration = Duration::from_secs(10);
/// Time from the response to a read to the next read. When a thousand servers fail at once, a client sends etcd at most ten reads per
/// second.
const READ_STEP: Duration = Duration::from_millis(100);
/// Limit of pending reads. Reports above it are dropped; an address that keeps refusing connections is reported again.
const READS_MAX: usize = 100;
