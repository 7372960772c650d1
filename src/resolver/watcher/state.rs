//! The state of the machine: the version of each key, and the progress of the list or of the watch.

use tokio::time::Instant;

use crate::keyspace::{Event, Header, Key, KeyValue, KeyVersion, LeaseId, Revision};

/// The state of a machine.
#[derive(Debug)]
pub(super) enum State {
    Listing(Listing),
    Watching(Watching),
    Resuming { revision: Revision },
}

/// A list in progress.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) kvs: Vec<KeyValue>,
    /// Header of the first page.
    pub(super) header: Option<Header>,
    /// First key of the next page; `None` for the start of the range.
    pub(super) next: Option<Key>,
    /// Number of times that the list was interrupted because its revision was compacted, or was ahead of the store. From the third time on,
    /// the pages are not pinned to one revision. The result is still exact, because the watch starts at the revision of the first page and
    /// delivers all later changes.
    pub(super) compacted: u32,
    /// Whether the next request reads only the name of a key that is too large to receive.
    pub(super) reads_name_only: bool,
    /// Of the keys on the first page, the one with the highest mod revision. The check of the watch after the list reads this key.
    pub(super) check: Option<Key>,
    /// Keys whose value is too large to receive.
    pub(super) oversized: Vec<KeyVersion>,
    /// Whether an event that was too large to receive has caused this list. If so, the watch begins after the revision of the list, so that
    /// the event is not delivered again.
    pub(super) skips_oversized_event: bool,
    /// Whether a failed check or a reconciliation has caused this list. If so, the watch after this list is not checked. If it were
    /// checked, keys that change constantly could make every check fail, and lists would be repeated without end.
    pub(super) after_failed_check: bool,
}

/// An open watch, or the watch to open next.
#[derive(Debug)]
pub(super) struct Watching {
    /// R: the revision of the list, and later that of the last applied event. If the watch ends, the next one is opened at R.
    pub(super) revision: Revision,
    /// Revision at which the watch was opened.
    pub(super) began: Revision,
    /// Time at which the watch was opened; `None` until then.
    pub(super) opened: Option<Instant>,
    /// Whether the header of a message had a higher revision than R. If so, the watch possibly has a backlog to deliver.
    pub(super) behind: bool,
    /// Events of a revision that has not been received completely.
    pub(super) pending: Vec<Event>,
    /// The key that the check reads when the watch has been opened. The check finds out whether the store is still the one that the set was
    /// listed from. `None` once the check is requested, and for a watch without a check.
    pub(super) check: Option<Key>,
    /// Whether a header with a revision below R, or with another cluster id, has already caused a check on this watch.
    pub(super) suspicion_checked: bool,
}

/// Counts consecutive watches that delivered nothing although the store was ahead of R, the revision that the set has reached. The backlog
/// of such a watch may be larger than a server or a link can deliver in time. A further watch would then fail in the same way. A list can
/// succeed, because it is split into pages, which shrink on a slow link.
#[derive(Debug)]
pub(super) struct FruitlessWatches {
    watches: u32,
    /// The number of watches after which the prefix is listed. It doubles each time that it is reached, up to [`FRUITLESS_MAX`].
    limit: u32,
}

impl Default for FruitlessWatches {
    fn default() -> Self {
        Self {
            watches: 0,
            limit: FRUITLESS_FIRST,
        }
    }
}

impl FruitlessWatches {
    /// Counts one more watch. A watch that ended by a timeout (`silent`) counts twice. Returns whether the prefix must be listed before the
    /// next watch.
    pub(super) fn must_list(&mut self, silent: bool) -> bool {
        self.watches += if silent { 2 } else { 1 };
        let too_much = self.watches >= self.limit;
        if too_much {
            self.watches = 0;
            self.limit = (self.limit * 2).min(FRUITLESS_MAX);
        }
        too_much
    }
}

/// The version of a key, as last applied or as read.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyState {
    create_revision: Revision,
    pub(super) mod_revision: Revision,
    pub(super) lease: LeaseId,
    /// Digest of the value. `None` if the value is unknown: the key was listed by name only, or its value is too large to receive.
    pub(super) digest: Option<u64>,
}

impl KeyState {
    pub(super) fn of(version: &KeyVersion) -> Self {
        Self {
            create_revision: version.create_revision,
            mod_revision: version.mod_revision,
            lease: version.lease,
            digest: version.digest,
        }
    }

    /// Returns whether both states result from the same write. Digests are compared only if both are known.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let differs = |(mine, its): (u64, u64)| mine != its;
        self.create_revision == other.create_revision
            && self.mod_revision == other.mod_revision
            && self.lease == other.lease
            && !self.digest.zip(other.digest).is_some_and(differs)
    }

    /// Returns whether both states exist and result from the same write, or neither exists.
    pub(super) fn agree(left: Option<&Self>, right: Option<&Self>) -> bool {
        match (left, right) {
            (Some(left), Some(right)) => left.is_same(right),
            (left, right) => left.is_none() && right.is_none(),
        }
    }
}

/// Number of consecutive fruitless watches after which the prefix is listed for the first time. A watch that ended by a timeout counts
/// twice.
const FRUITLESS_FIRST: u32 = 3;
/// Upper limit of the number of fruitless watches after which the prefix is listed. The number grows because a fruitless watch does not
/// prove a backlog: the revision of the store also increases with writes to keys of other prefixes.
const FRUITLESS_MAX: u32 = 48;
