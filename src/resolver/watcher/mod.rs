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
//! it: in catch-up batches it runs ahead of the events. A watch is opened at R itself, since a revision may have been cut in two;
//! what is then seen twice changes nothing.
//!
//! While it watches, [`audit`] asks now and then whether the watch has brought everything.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::backoff::{Backoff, jittered};
use crate::error::EtcdError;
use crate::keyspace::{Event, Header, Key, KeyVersion, LeaseId, ListRequest, Range, Revision};

mod listing;
mod reconcile;
mod watching;

use listing::{Listing, PAGE_LIMIT};
use reconcile::Audit;
use watching::{Fruitless, Watching};

/// What the owner task is to do next. Each is answered by one call of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Ask for a page; answer with [`Machine::on_page`].
    List(ListRequest),
    /// Open a watch at this revision in place of the one at hand; answer with [`Machine::on_watch_opened`] or
    /// [`Machine::on_watch_ended`].
    Watch(Revision),
    /// Take the next message of the watch; answer with [`Machine::on_message`] or [`Machine::on_watch_ended`], or at the time of
    /// [`Machine::due`] with [`Machine::on_time`].
    Receive,
    /// Read a key linearizably, keeping the watch; answer with [`Machine::on_checked`].
    Check(Key),
    /// Ask for a page of names, keeping the watch; answer with [`Machine::on_names`].
    Reconcile(ListRequest),
    /// Read a key with its value, linearizably, keeping the watch; answer with [`Machine::on_read`].
    Read(Key),
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
    /// Keys that a read has found gone, and when, until the watch is past that.
    tombstones: HashMap<Key, Revision>,
    audit: Audit,
    /// Changes that are to be published.
    update: Vec<Event>,
    backoff: Backoff,
    rng: fastrand::Rng,
    /// Whether the last watch was refused.
    refused: bool,
    fruitless: Fruitless,
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
    /// Comparisons with a list of names.
    pub(super) reconciliations: u64,
    /// Keys read one by one.
    pub(super) reads: u64,
    /// Keys that were not as a read has found them.
    pub(super) repaired: u64,
    /// Keys whose value alone is above the message limit.
    pub(super) oversized: u64,
}

/// A key as last applied, or as it was found.
#[derive(Clone, Copy, Debug)]
struct KeyState {
    create_revision: Revision,
    mod_revision: Revision,
    lease: LeaseId,
    /// Of the value; `None` if that is not known: the key was listed by name, or its value is too large to be received.
    digest: Option<u64>,
}

impl KeyState {
    fn of(version: &KeyVersion) -> Self {
        Self {
            create_revision: version.create_revision,
            mod_revision: version.mod_revision,
            lease: version.lease,
            digest: version.digest,
        }
    }

    /// Whether both are the same write, as far as is known of them.
    fn is_same(&self, other: &Self) -> bool {
        let differs = |(mine, its): (u64, u64)| mine != its;
        self.create_revision == other.create_revision
            && self.mod_revision == other.mod_revision
            && self.lease == other.lease
            && !self.digest.zip(other.digest).is_some_and(differs)
    }

    /// Whether both are there and the same, or both are not.
    fn agree(left: Option<&Self>, right: Option<&Self>) -> bool {
        match (left, right) {
            (Some(left), Some(right)) => left.is_same(right),
            (left, right) => left.is_none() && right.is_none(),
        }
    }
}

#[derive(Debug)]
enum State {
    Listing(Listing),
    Watching(Watching),
    Resuming { revision: Revision },
}

impl Machine {
    /// Begins with a list; `reconcile` is the longest time between comparisons with another one.
    pub(super) fn new(range: Range, reconcile: Option<Duration>, rng: fastrand::Rng) -> Self {
        Self {
            range,
            state: State::Listing(Listing::default()),
            seen: Header::default(),
            keys: BTreeMap::new(),
            tombstones: HashMap::new(),
            audit: Audit::new(reconcile),
            update: Vec::new(),
            backoff: Backoff::new(BACKOFF_FIRST, BACKOFF_MAX),
            rng,
            refused: false,
            fruitless: Fruitless::default(),
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
    pub(super) fn on_token(&mut self, outcome: Result<(), EtcdError>) -> Command {
        // Without a fresh token the last refusal said nothing of it.
        self.refused = outcome.is_ok();
        match outcome {
            // Each try costs etcd a hash of the password.
            Err(error) if error.kind().needs_operator() => self.wait(error),
            _ => self.on_wake(),
        }
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

    /// Whether the value of a key is known, so that it can be compared with another one.
    pub(super) fn knows_value(&self, key: &Key) -> bool {
        let known = self.keys.get(key);
        known.is_some_and(|known| known.digest.is_some())
    }

    /// Whether a linearizable answer comes from another store than the last one: on a healthy cluster they never go back.
    fn is_other_store(&self, header: Header) -> bool {
        header.cluster_id != self.seen.cluster_id
            || header.revision < self.seen.revision
            || header.raft_term < self.seen.raft_term
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

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Between tries where credentials or permissions are refused.
const OPERATOR_WAIT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
