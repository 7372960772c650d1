//! The list-and-watch state machine of one prefix. It performs no I/O, so that tests can replay every order of responses.
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
//! A store that was wiped or restored keeps its cluster id, and often its raft term and revisions. Only a key shows whether revision R has
//! the same meaning in that store. After each opening of a watch, the machine therefore reads the key written last, linearizably, before it
//! processes any message of the watch. The read must follow the opening: the stream ends with the server process, so the result stays valid
//! for the lifetime of the stream.
//!
//! R is the header revision of the list, and later the mod revision of the last applied event. The header of a watch message never changes
//! R: in catch-up batches, the header is ahead of the events. A watch is opened at R, not at R + 1, because the previous stream may have
//! ended in the middle of revision R. Applying an event twice has no effect.
//!
//! While the machine watches, `reconcile` checks periodically that the watch has delivered every change.

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

/// The next action of the task that owns the machine. The task reports the result of each command with one call to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Request a page; report the result with [`Machine::on_page`].
    List(ListRequest),
    /// Replace the current watch by a watch that starts at this revision; report the result with [`Machine::on_watch_opened`] or
    /// [`Machine::on_watch_ended`].
    Watch(Revision),
    /// Receive the next message of the watch; report it with [`Machine::on_message`], or the end of the watch with
    /// [`Machine::on_watch_ended`]. If the time of [`Machine::due`] is reached first, call [`Machine::on_time`].
    Receive,
    /// Read a key linearizably and keep the watch open; report the result with [`Machine::on_checked`].
    Check(Key),
    /// Request a page of key names and keep the watch open; report the result with [`Machine::on_names`].
    Reconcile(ListRequest),
    /// Read a key with its value, linearizably, and keep the watch open; report the result with [`Machine::on_read`].
    Read(Key),
    /// Drop the watch, wait, and fetch a fresh token; report the result with [`Machine::on_token`].
    RenewToken(Duration),
    /// Drop the watch and wait; then call [`Machine::on_wake`].
    Wait(Duration),
}

/// The state machine of one prefix.
#[derive(Debug)]
pub(super) struct Machine {
    range: Range,
    state: State,
    /// Header of the last linearizable response; later events raise its revision. On a healthy cluster, the revision and the term of
    /// linearizable responses never decrease.
    seen: Header,
    /// Every key of the prefix as last applied, whether or not its value can be decoded.
    keys: BTreeMap<Key, KeyState>,
    /// Keys that a read found deleted, with the revision of the read. An entry is removed when the watch has passed that revision.
    tombstones: HashMap<Key, Revision>,
    audit: Audit,
    /// Changes that are not published yet.
    update: Vec<Event>,
    backoff: Backoff,
    rng: fastrand::Rng,
    /// Whether the last watch was rejected with an auth error, and the token was renewed for the next attempt.
    refused: bool,
    fruitless: Fruitless,
    /// Number of keys requested per page. Halved when a response is too large, doubled after each page.
    page_limit: i64,
    /// Upper limit of `page_limit`. Halved when a page exceeds the call timeout.
    page_cap: i64,
    pub(super) report: Report,
}

/// The part of the resolver's status that one machine contributes.
#[derive(Clone, Debug, Default)]
pub(super) struct Report {
    /// Whether the prefix has been listed once.
    pub(super) listed: bool,
    /// Revision at which the set is known to be correct.
    pub(super) revision: Revision,
    /// The failure because of which the prefix is not watched now.
    pub(super) trouble: Option<EtcdError>,
    pub(super) lists: u64,
    pub(super) watches: u64,
    /// Number of reconciliations: comparisons of the keys with a list of their names.
    pub(super) reconciliations: u64,
    /// Number of individual key reads.
    pub(super) reads: u64,
    /// Number of reads whose result differed from the known state of the key.
    pub(super) repaired: u64,
    /// Number of writes whose value alone exceeds the message limit.
    pub(super) oversized: u64,
}

/// The version of a key, as last applied or as read.
#[derive(Clone, Copy, Debug)]
struct KeyState {
    create_revision: Revision,
    mod_revision: Revision,
    lease: LeaseId,
    /// Digest of the value. `None` if the value is unknown: the key was listed by name only, or its value is too large to receive.
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

    /// Returns whether both are the same write. Digests are compared only if both are known.
    fn is_same(&self, other: &Self) -> bool {
        let differs = |(mine, its): (u64, u64)| mine != its;
        self.create_revision == other.create_revision
            && self.mod_revision == other.mod_revision
            && self.lease == other.lease
            && !self.digest.zip(other.digest).is_some_and(differs)
    }

    /// Returns whether both exist and are the same write, or neither exists.
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
    /// Creates a machine that begins with a list. `reconcile` is the longest time between two reconciliations.
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

    /// Returns the changes since the last call, in order.
    pub(super) fn take_update(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.update)
    }

    /// Handles the result of [`Command::RenewToken`].
    pub(super) fn on_token(&mut self, outcome: Result<(), EtcdError>) -> Command {
        // The last rejection counts only if the next attempt uses a fresh token.
        self.refused = outcome.is_ok();
        match outcome {
            // Retried slowly, because each attempt costs etcd a password hash.
            Err(error) if error.kind().needs_operator() => self.wait(error),
            _ => self.on_wake(),
        }
    }

    /// Returns the first command, and the next command after a wait.
    pub(super) fn on_wake(&mut self) -> Command {
        match &self.state {
            State::Listing(listing) => Command::List(self.request(listing)),
            State::Watching(watching) => Command::Watch(watching.revision),
            State::Resuming { revision } => {
                let revision = *revision;
                match self.newest() {
                    Some(key) => self.watch(revision, Some(key)),
                    // An empty set has no key that could identify the store, so the prefix is listed again.
                    None => self.relist(false),
                }
            }
        }
    }

    /// Returns the key written last. A store with another history is least likely to contain that write.
    fn newest(&self) -> Option<Key> {
        let newest = self.keys.iter().max_by_key(|(_, state)| state.mod_revision);
        newest.map(|(key, _)| key.clone())
    }

    /// Returns whether the value of a key is known, so that it can be compared.
    pub(super) fn knows_value(&self, key: &Key) -> bool {
        let known = self.keys.get(key);
        known.is_some_and(|known| known.digest.is_some())
    }

    /// Returns whether a linearizable response comes from another store than the last one. On a healthy cluster, the revision and the term
    /// never decrease.
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

    /// Returns a wait after a failure. The wait is jittered and prevents a busy loop. It is long if only an operator can fix the failure.
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
/// Wait between attempts if only an operator can help, as with rejected credentials or permissions.
const OPERATOR_WAIT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
