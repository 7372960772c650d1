//! The list-and-watch machine of one prefix: its commands, its fields, and the first command.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use super::reconcile_schedule::Reconciler;
use super::state::{FruitlessWatches, KeyState, Listing, State};
use crate::backoff::Backoff;
use crate::error::EtcdError;
use crate::keyspace::{Event, Header, Key, ListRequest, Range, Revision};
use crate::slots::Slots;

/// The next action of the task that owns the [`Machine`]. The task reports the result of each command with one call to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::resolver) enum Command {
    /// Request a page of the list; report the result with [`Machine::on_page`].
    List(ListRequest),
    /// Replace the current watch by a watch that starts at this revision; report the result with [`Machine::on_watch_opened`] or
    /// [`Machine::on_watch_ended`].
    Watch(Revision),
    /// Receive the next message of the watch; report it with [`Machine::on_message`], or the end of the watch with
    /// [`Machine::on_watch_ended`]. If the time of [`Machine::due`] is reached first, call [`Machine::on_time`].
    Receive,
    /// Read the version of a key linearizably and keep the watch open; report the result with [`Machine::on_checked`].
    Check(Key),
    /// Request a page of keys without values and keep the watch open; report the result with [`Machine::on_names`].
    Reconcile(ListRequest),
    /// Read a key with its value, linearizably, and keep the watch open; report the result with [`Machine::on_read`].
    Read(Key),
    /// Drop the watch, wait, and fetch a fresh token; report the result with [`Machine::on_token`].
    RenewToken(Duration),
    /// Drop the watch and wait; then call [`Machine::on_wake`].
    Wait(Duration),
}

/// The list-and-watch state machine of one prefix, without I/O.
#[derive(Debug)]
pub(in crate::resolver) struct Machine {
    pub(super) range: Range,
    pub(super) state: State,
    /// Header of the last linearizable response. Later events raise its revision. On a healthy cluster, the revision and the term of
    /// linearizable responses never decrease.
    pub(super) last_header: Header,
    /// Every key of the prefix as last applied, whether or not its value can be decoded.
    pub(super) keys: BTreeMap<Key, KeyState>,
    /// Tombstones: keys that did not exist when they were read, with the revision of the read. A tombstone is removed when the watch has
    /// reached its revision.
    pub(super) tombstones: HashMap<Key, Revision>,
    pub(super) reconciler: Reconciler,
    /// Changes that are not published yet.
    pub(super) update: Vec<Event>,
    pub(super) backoff: Backoff,
    pub(super) rng: fastrand::Rng,
    /// Whether the token was renewed because the last watch was rejected. If the next watch is rejected as well, the permission is missing.
    pub(super) token_renewed: bool,
    pub(super) fruitless: FruitlessWatches,
    /// Number of keys to request per page. Halved when a response is too large, and doubled after each page, up to `page_cap`.
    pub(super) page_limit: i64,
    /// Upper limit of `page_limit`. Halved when the request for a page times out, and reset when a list is complete.
    pub(super) page_cap: i64,
    pub(in crate::resolver) report: Report,
}

/// The part of the resolver's status that one machine contributes.
#[derive(Clone, Debug, Default)]
pub(in crate::resolver) struct Report {
    /// Whether the prefix has been listed once.
    pub(in crate::resolver) listed: bool,
    /// Revision at which the set is known to be correct; `None` before the first list is complete.
    pub(in crate::resolver) revision: Option<Revision>,
    /// The failure that currently prevents the list or the watch of the prefix, if any.
    pub(in crate::resolver) trouble: Option<EtcdError>,
    pub(in crate::resolver) lists: u64,
    pub(in crate::resolver) watches: u64,
    /// Number of reconciliations.
    pub(in crate::resolver) reconciliations: u64,
    /// Number of individual key reads.
    pub(in crate::resolver) reads: u64,
    /// Number of reads whose result differed from the known state of the key.
    pub(in crate::resolver) repaired: u64,
    /// Number of writes whose value is too large to receive, even as the only key of a page.
    pub(in crate::resolver) oversized: u64,
}

impl Machine {
    /// Creates a machine that begins with a list. `reconcile` is the maximum time between two reconciliations. `slots` are the times at
    /// which the services of the registry are reconciled together.
    pub(in crate::resolver) fn new(
        range: Range,
        reconcile: Option<Duration>,
        slots: Slots,
        rng: fastrand::Rng,
    ) -> Self {
        Self {
            range,
            state: State::Listing(Listing::default()),
            last_header: Header::default(),
            keys: BTreeMap::new(),
            tombstones: HashMap::new(),
            reconciler: Reconciler::new(reconcile, slots),
            update: Vec::new(),
            backoff: Backoff::new(BACKOFF_FIRST, BACKOFF_MAX),
            rng,
            token_renewed: false,
            fruitless: FruitlessWatches::default(),
            page_limit: PAGE_LIMIT,
            page_cap: PAGE_LIMIT,
            report: Report::default(),
        }
    }

    pub(in crate::resolver) fn range(&self) -> &Range {
        &self.range
    }

    /// Returns the number of known keys.
    pub(in crate::resolver) fn known(&self) -> usize {
        self.keys.len()
    }

    /// Returns the changes since the last call, in order.
    pub(in crate::resolver) fn take_update(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.update)
    }

    /// Returns the first command, or the next command after a wait.
    pub(in crate::resolver) fn on_wake(&mut self) -> Command {
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

    /// Returns the key that was written last. Of all keys, this key is the least likely to exist unchanged in a store with another history.
    pub(super) fn newest(&self) -> Option<Key> {
        let newest = self.keys.iter().max_by_key(|(_, state)| state.mod_revision);
        newest.map(|(key, _)| key.clone())
    }

    /// Returns whether the header of a linearizable response is from another store than `last_header`. In one store, the revision and the
    /// term never decrease.
    pub(super) fn is_other_store(&self, header: Header) -> bool {
        header.cluster_id != self.last_header.cluster_id
            || header.revision < self.last_header.revision
            || header.raft_term < self.last_header.raft_term
    }

    /// Returns whether the value of a key is known, so that it can be compared.
    pub(in crate::resolver) fn knows_value(&self, key: &Key) -> bool {
        let known = self.keys.get(key);
        known.is_some_and(|known| known.digest.is_some())
    }
}

pub(super) const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Maximum number of keys per page. 500 values of the usual 150 bytes are 75 kB. If values are larger, the page size is halved until a
/// page can be received.
pub(super) const PAGE_LIMIT: i64 = 500;
