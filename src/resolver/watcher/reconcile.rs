//! What is done beside the watch, which can lose events: all keys are compared with a list now and then, and single ones are read.
//!
//! ```text
//!   every few minutes ──▶ names, page by page ──▶ suspects ── 5 s ──▶ still other? ──┐
//!                                                                                    ├──▶ read, and believed
//!   an address refuses connections ─────────────────────── within 2 s ───────────────┘
//! ```
//!
//! A list of names alone decides nothing: what it says may be on its way. It raises a suspicion, and the watch gets the time to dispel it.
//! Only a linearizable read of the key itself is believed. It stands in for every event of the key up to the revision of its answer, so
//! those that arrive later are dropped: by the key's mod revision if it is there, by its [`tombstone`](Machine::bury) if not.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;
use std::time::Duration;

use tokio::time::Instant;

use super::listing::PAGE_LIMIT;
use super::{Command, KeyState, Machine, State};
use crate::backoff::jittered;
use crate::error::EtcdError;
use crate::keyspace::{Event, Header, Key, KeyValue, ListRequest, Page, Range, Revision};

/// The lists and reads that are due.
#[derive(Debug)]
pub(super) struct Audit {
    /// Between lists; `None` for none.
    interval: Option<Duration>,
    next_list: Option<Instant>,
    /// Where the list under way goes on, and the revision that it is pinned to.
    cursor: Option<(Key, Revision)>,
    suspects: Vec<Suspect>,
    /// When the watch has had its time.
    settled: Option<Instant>,
    /// Keys to be read, and when.
    reads: BTreeSet<(Instant, Key)>,
    /// No read before.
    next_read: Option<Instant>,
    /// When a key was last doubted from outside.
    doubted: HashMap<Key, Instant>,
    /// Suspects that are being read. If one of them is not as we know it, the watch has lost something.
    confirming: BTreeSet<Key>,
    /// The watch has lost something.
    lossy: bool,
}

/// A key that a list has otherwise than we know it.
#[derive(Debug)]
struct Suspect {
    key: Key,
    /// `None` if the list has it not.
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

    /// A watch begins: the next list comes an interval after the first one, and one that was due meanwhile a while later.
    pub(super) fn on_watch_opened(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        self.cursor = None;
        // It may have to catch up first.
        self.settled = self.settled.map(|_| now + SETTLE);
        let Some(interval) = self.interval else {
            return;
        };
        match self.next_list {
            None => self.next_list = Some(now + jittered(interval, rng)),
            // After an outage it is overdue for everybody at once.
            Some(at) if at <= now => {
                self.next_list = Some(now + jittered(interval.min(OVERDUE), rng));
            }
            Some(_) => {}
        }
    }

    /// A complete list with its values has been taken over: what was in doubt is known now.
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
        // One list at a time, its suspects included.
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

    /// A read has its answer. The next one is counted from it: while one is waited for the watch is not read, and a slow etcd must not keep it
    /// so for a whole row of them.
    fn on_answer(&mut self, failed: bool, now: Instant) {
        let wait = if failed { SETTLE } else { READ_STEP };
        self.next_read = Some(now + wait);
    }
}

impl Machine {
    /// When [`Machine::on_time`] is due, while the watch is being read.
    pub(in crate::resolver) fn due(&self) -> Option<Instant> {
        self.audit.due().filter(|_| self.is_watching())
    }

    fn is_watching(&self) -> bool {
        matches!(&self.state, State::Watching(watching) if watching.opened.is_some())
    }

    /// Says what is due beside the watch.
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

    /// Takes the answer to [`Command::Reconcile`].
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
                // Whether etcd can be asked is for the watch to say. The next list is as good.
                tracing::debug!(%error, "could not list the keys to compare them");
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
            // With too many suspects the outcome is clear.
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

    /// Looks for keys from `start` up to `end` that a page has otherwise.
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

    /// The watch has had its time to bring what the list has seen: what it has not brought is read.
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
                "the watch has lost changes of many keys: listing anew"
            );
            return self.relist(true);
        }
        for key in left {
            self.audit.confirming.insert(key.clone());
            self.audit.reads.insert((now, key));
        }
        Command::Receive
    }

    /// Takes a doubt from outside: the server that a key names refuses connections. One read, a while later and seldom, tells whether the
    /// key is still there.
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

    /// Takes the answer to [`Command::Read`].
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

    /// Remembers that a key was gone at a revision. Without it, a put that was overtaken by the read would bring the key back, and the
    /// delete that follows may be what was lost.
    fn bury(&mut self, key: Key, revision: Revision) {
        self.tombstones.insert(key, revision);
    }

    /// Opens the watch anew: one that loses changes may do so again.
    fn distrust_watch(&mut self) -> Command {
        self.audit.lossy = false;
        let State::Watching(watching) = &self.state else {
            return self.on_wake();
        };
        tracing::warn!(revision = %watching.revision, "the watch has lost changes, which were found by a list: watching anew");
        let revision = watching.revision;
        self.state = State::Resuming { revision };
        self.on_wake()
    }
}

/// Under it, clients would list without a pause.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// A time to come has to fit into an `Instant`.
const INTERVAL_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Over the second half of which clients make the comparisons that were due during an outage.
const OVERDUE: Duration = Duration::from_secs(60);
/// As long as a watch may be silent before it is probed.
const SETTLE: Duration = Duration::from_secs(5);
/// From here on a list costs less than that many reads.
const SUSPECTS_MAX: usize = 100;
/// When a server crashes all its clients notice within the same milliseconds.
const DOUBT_SPREAD: Duration = Duration::from_secs(2);
/// A key whose server goes on refusing connections is not read more often.
const DOUBT_INTERVAL: Duration = Duration::from_secs(10);
/// Between reads, from an answer to the next request: when a thousand servers fail at once, a client asks etcd ten times a second at most.
const READ_STEP: Duration = Duration::from_millis(100);
/// Doubts above it are dropped; what goes on being refused is doubted again.
const READS_MAX: usize = 100;
