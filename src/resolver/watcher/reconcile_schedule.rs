//! The schedule and the state of reconciliations and key reads.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use super::state::KeyState;
use crate::backoff::jittered;
use crate::keyspace::{Key, Revision};
use crate::slots::Slots;

/// The schedule and the state of reconciliations and key reads.
#[derive(Debug)]
pub(super) struct Reconciler {
    /// Maximum time between two reconciliations; `None` disables them.
    pub(super) interval: Option<Duration>,
    slots: Slots,
    /// The time of the next reconciliation.
    pub(super) next_list: Option<Instant>,
    /// The time at which all keys and values are listed again, if that is necessary.
    pub(super) list_again_at: Option<Instant>,
    /// While names are listed: the first key of the next page, and the revision that the list is pinned to.
    pub(super) cursor: Option<(Key, Revision)>,
    /// The last revision at which the keys were known to be those in etcd.
    pub(super) agreed: Option<Revision>,
    /// A copy of `agreed` while the changes since that revision are requested, and `None` at other times.
    pub(super) changes_since: Option<Revision>,
    /// Number of reconciliations in a row that compared only the changes. A complete list without a difference resets it to 0.
    pub(super) compared_changes: u32,
    pub(super) suspects: Vec<Suspect>,
    /// The time until which the watch may deliver the changes of the suspects.
    pub(super) settle_at: Option<Instant>,
    /// Keys to read, with the earliest time of each read.
    pub(super) reads: BTreeSet<(Instant, Key)>,
    /// Earliest time of the next read of any key.
    next_read: Option<Instant>,
    /// Time of the last accepted report about each key, from [`ResolverFeedback`](crate::resolver::ResolverFeedback).
    pub(super) reported: HashMap<Key, Instant>,
    /// Former suspects whose read is pending. If the result of such a read differs from the known state, the watch has lost an event.
    pub(super) confirming: BTreeSet<Key>,
    /// Whether the read of a key in `confirming` has shown that the watch has lost an event.
    pub(super) has_lost_event: bool,
}

/// A key whose listed version differs from the known version. The watch may still deliver the change.
#[derive(Debug)]
pub(super) struct Suspect {
    pub(super) key: Key,
    /// The listed version; `None` if the list does not contain the key.
    pub(super) found: Option<KeyState>,
    /// The revision of the list.
    pub(super) at: Revision,
}

impl Reconciler {
    pub(super) fn new(interval: Option<Duration>, slots: Slots) -> Self {
        Self {
            interval: interval.map(|interval| interval.clamp(INTERVAL_MIN, INTERVAL_MAX)),
            slots,
            next_list: None,
            list_again_at: None,
            cursor: None,
            agreed: None,
            changes_since: None,
            compared_changes: 0,
            suspects: Vec::new(),
            settle_at: None,
            reads: BTreeSet::new(),
            next_read: None,
            reported: HashMap::new(),
            confirming: BTreeSet::new(),
            has_lost_event: false,
        }
    }

    /// Handles the opening of a watch. The first opening schedules the first reconciliation, half an interval to one interval later. A
    /// reconciliation that became due while no watch was open is postponed.
    pub(super) fn on_watch_opened(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        self.cursor = None;
        self.changes_since = None;
        // The time for the delivery of the suspects' changes (5 s) starts again, because the new watch possibly delivers a backlog first.
        self.settle_at = self.settle_at.map(|_| now + SETTLE);
        // A list that became due during an outage is spread again, because it is due for all clients.
        if self.list_again_at.is_some_and(|at| at <= now) {
            self.list_again_at = Some(now + LIST_AGAIN_SPREAD.mul_f64(rng.f64()));
        }
        let Some(interval) = self.interval else {
            return;
        };
        match self.next_list {
            None => self.schedule(interval, now, rng),
            // After an outage that is longer than the interval, the reconciliations of all clients are overdue at the same time, so they
            // are spread over one interval again.
            Some(at) if at <= now => {
                let wait = interval.mul_f64(rng.f64());
                let earliest = now + SETTLE.min(interval);
                let width = interval / SLOTS;
                self.next_list = Some(self.slots.align(now + wait, earliest, width));
            }
            Some(_) => {}
        }
    }

    /// Schedules the next reconciliation, half an interval to one interval from now.
    pub(super) fn schedule(&mut self, interval: Duration, now: Instant, rng: &mut fastrand::Rng) {
        let at = now + jittered(interval, rng);
        let earliest = now + interval / 2;
        self.next_list = Some(self.slots.align(at, earliest, interval / SLOTS));
    }

    /// Handles a complete list with values. After such a list, no key is suspect and no read is pending.
    pub(super) fn on_listed(&mut self, revision: Revision) {
        self.on_agreed(revision);
        self.compared_changes = 0;
        self.cursor = None;
        self.changes_since = None;
        self.list_again_at = None;
        self.suspects.clear();
        self.settle_at = None;
        self.reads.clear();
        self.confirming.clear();
        self.has_lost_event = false;
    }

    /// Records that the keys are those in etcd at this revision.
    pub(super) fn on_agreed(&mut self, revision: Revision) {
        self.agreed = Some(revision);
    }

    pub(super) fn due(&self) -> Option<Instant> {
        let read = self.reads.first().map(|(at, _)| *at);
        let read = read.map(|at| self.next_read.map_or(at, |next| at.max(next)));
        // No reconciliation starts while the previous one still has suspects.
        let list = self.next_list.filter(|_| self.suspects.is_empty());
        let times = [read, self.settle_at, list, self.list_again_at];
        times.into_iter().flatten().min()
    }

    pub(super) fn take_read(&mut self, now: Instant) -> Option<Key> {
        let (at, _) = self.reads.first()?;
        if *at > now || self.next_read.is_some_and(|next| next > now) {
            return None;
        }
        self.reads.pop_first().map(|(_, key)| key)
    }

    /// Handles the response to a read: sets the earliest time of the next read. No message of the watch is received while a key is read.
    /// Without a pause between the reads, a slow etcd would block the watch for several reads in a row.
    pub(super) fn on_answer(&mut self, failed: bool, now: Instant) {
        let wait = if failed { SETTLE } else { READ_STEP };
        self.next_read = Some(now + wait);
    }
}

/// The time over which the further lists of all clients are spread.
pub(super) const LIST_AGAIN_SPREAD: Duration = Duration::from_secs(60);
/// Number of slots in one interval. The services of a registry that are reconciled in the same slot (see [`Slots`]) send their requests for
/// changes together, in transactions of up to a hundred services.
const SLOTS: u32 = 16;
/// Limit on the interval, so that the time of the next reconciliation fits into an `Instant`.
pub(super) const INTERVAL_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Minimum interval. With an interval near zero, clients would send requests to etcd without a pause.
pub(super) const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Minimum time from the response to a read to the next read. Even if a thousand servers fail at once, a client sends etcd at most ten
/// reads per second for each prefix.
pub(super) const READ_STEP: Duration = Duration::from_millis(100);
/// The time that the watch gets to deliver the changes of suspects. Also the minimum time from a failed read to the next read.
pub(super) const SETTLE: Duration = Duration::from_secs(5);
