//! Reconciliation finds changes that a watch has lost. While the watch is open, the known keys are periodically compared with those in
//! etcd, and single keys are read.
//!
//! ```text
//!   every few minutes ──▶ changes and count ──▶ as known? ──▶ done
//!                                                   │ no
//!                                                   ▼
//!                         names, page by page ──▶ suspects ── 5 s ──▶ differs? ──────┐
//!                                                                                    ├──▶ read the key, apply the result
//!   an address refuses connections ─────────────────────── within 2 s ───────────────┘
//! ```
//!
//! The last *agreement* is the last revision at which the known keys were verified to be the keys in etcd. One request returns the number
//! of all keys, and the names of the keys written since the last agreement. If the known versions of these keys are those in etcd, and the
//! number of known keys is the number in etcd, then no key differs. The reason: a key that was not written since the last agreement is
//! either unchanged or deleted, and a delete would make the numbers differ. Most reconciliations end here. Every sixteenth reconciliation
//! lists all names nevertheless. With the default interval, this is about once an hour.
//!
//! A difference in a list of names does not show that the watch has lost an event, because the watch may still deliver the change. The key
//! becomes a suspect, and the watch gets 5 s to deliver the change. Only a linearizable read of the key itself is trusted. Its result
//! replaces every event of the key up to the revision of the response. If the watch delivers such an event later, the event is dropped. To
//! recognise such an event, its revision is compared with the mod revision of the key, or with the [tombstone](Machine::add_tombstone) if
//! the key does not exist.

use std::collections::HashMap;
use std::ops::Bound;
use std::time::Duration;

use tokio::time::Instant;

use super::machine::{Command, Machine, PAGE_LIMIT};
use super::reconcile_schedule::{LIST_AGAIN_SPREAD, SETTLE, Suspect};
use super::state::{KeyState, State};
use crate::error::EtcdError;
use crate::keyspace::{Event, Header, Key, KeyValue, ListRequest, Page, Range, Revision};

impl Machine {
    /// Returns the time at which [`Machine::on_time`] is due. `None` if nothing is scheduled, or while no watch is open.
    pub(in crate::resolver) fn due(&self) -> Option<Instant> {
        self.reconciler.due().filter(|_| self.is_watching())
    }

    fn is_watching(&self) -> bool {
        matches!(&self.state, State::Watching(watching) if watching.opened.is_some())
    }

    /// Returns the command that is due. The watch stays open, unless the prefix is listed again.
    pub(in crate::resolver) fn on_time(&mut self, now: Instant) -> Command {
        if !self.is_watching() {
            return self.on_wake();
        }
        if self.reconciler.list_again_at.is_some_and(|at| at <= now) {
            return self.relist(false);
        }
        if let Some(key) = self.reconciler.take_read(now) {
            self.report.reads += 1;
            return Command::Read(key);
        }
        if self.reconciler.settle_at.is_some_and(|at| at <= now) {
            return self.on_settle_time(now);
        }
        if let (Some(at), Some(interval)) = (self.reconciler.next_list, self.reconciler.interval)
            && at <= now
            && self.reconciler.suspects.is_empty()
        {
            self.reconciler.schedule(interval, now, &mut self.rng);
            return match self.reconciler.agreed {
                Some(agreed) if self.reconciler.compared_changes < COMPLETE_LIST_AFTER => {
                    self.reconciler.changes_since = Some(agreed);
                    Command::Reconcile(ListRequest {
                        written_after: agreed,
                        ..self.all_names()
                    })
                }
                _ => Command::Reconcile(self.all_names()),
            };
        }
        Command::Receive
    }

    /// Schedules a list of all keys and values, at a random time within the next minute. All clients of a service notice at the same time
    /// that they must list, so the lists are spread.
    pub(in crate::resolver) fn list_again(&mut self, now: Instant) {
        let at = now + LIST_AGAIN_SPREAD.mul_f64(self.rng.f64());
        self.reconciler.list_again_at.get_or_insert(at);
    }

    fn all_names(&self) -> ListRequest {
        self.names(self.range.start.clone(), Revision::ZERO)
    }

    fn names(&self, start: Key, revision: Revision) -> ListRequest {
        let end = self.range.end.clone();
        ListRequest {
            range: Range { start, end },
            limit: PAGE_LIMIT,
            revision,
            written_after: Revision::ZERO,
            keys_only: true,
        }
    }

    /// Handles the result of [`Command::Reconcile`].
    pub(in crate::resolver) fn on_names(
        &mut self,
        answer: Result<Page, EtcdError>,
        now: Instant,
    ) -> Command {
        let cursor = self.reconciler.cursor.take();
        let changes_since = self.reconciler.changes_since.take();
        if !self.is_watching() {
            return self.on_wake();
        }
        let page = match answer {
            Ok(page) => page,
            Err(error) => {
                // The failure is not added to the status, because only the watch shows whether etcd is reachable. The next reconciliation
                // repeats the comparison.
                tracing::debug!(%error, "could not list the keys for reconciliation");
                return self.finish_names(now);
            }
        };
        if self.is_other_store(page.header) {
            return self.relist(true);
        }
        self.last_header = page.header;
        if let Some(since) = changes_since {
            if !self.agrees(since, &page) {
                // The watch may still deliver the changes. So no key is read yet: all names are compared, to find the keys that differ.
                return Command::Reconcile(self.all_names());
            }
            self.reconciler.on_agreed(page.header.revision);
            self.reconciler.compared_changes += 1;
            self.report.reconciliations += 1;
            return Command::Receive;
        }
        let (start, revision) =
            cursor.unwrap_or_else(|| (self.range.start.clone(), page.header.revision));
        let next = page.kvs.last().filter(|_| page.more);
        let next = next.map(|kv| kv.key.successor());
        self.compare(&start, next.as_ref(), &page, revision);
        match next {
            // With too many suspects, the whole prefix will probably be listed again, so the remaining pages are not needed.
            Some(next) if self.reconciler.suspects.len() <= SUSPECTS_MAX => {
                self.reconciler.cursor = Some((next.clone(), revision));
                Command::Reconcile(self.names(next, revision))
            }
            _ => {
                if self.reconciler.suspects.is_empty() {
                    self.reconciler.on_agreed(revision);
                    self.reconciler.compared_changes = 0;
                }
                self.report.reconciliations += 1;
                self.finish_names(now)
            }
        }
    }

    /// Returns whether the known keys are the keys in etcd. `since` is the last revision at which this was the case. `page` contains the
    /// keys that were written after `since`.
    fn agrees(&self, since: Revision, page: &Page) -> bool {
        let changed = |known: &&KeyState| known.mod_revision > since;
        let is_known = |kv: &KeyValue| {
            KeyState::agree(Some(&KeyState::of(&kv.named())), self.keys.get(&kv.key))
        };
        !page.more
            && page.count == self.keys.len()
            && page.kvs.len() == self.keys.values().filter(changed).count()
            && page.kvs.iter().all(is_known)
    }

    fn finish_names(&mut self, now: Instant) -> Command {
        if !self.reconciler.suspects.is_empty() {
            self.reconciler.settle_at = Some(now + SETTLE);
        }
        Command::Receive
    }

    /// Compares the known keys from `start` up to `end` with a page, and records each key that differs as a suspect.
    fn compare(&mut self, start: &Key, end: Option<&Key>, page: &Page, at: Revision) {
        let mut listed: HashMap<_, _> = page.kvs.iter().map(|kv| (&kv.key, kv)).collect();
        let end = end.map_or(Bound::Unbounded, Bound::Excluded);
        for (key, known) in self.keys.range((Bound::Included(start), end)) {
            let found = listed.remove(key).map(|kv| KeyState::of(&kv.named()));
            if !KeyState::agree(found.as_ref(), Some(known)) {
                let key = key.clone();
                self.reconciler.suspects.push(Suspect { key, found, at });
            }
        }
        let unknown = listed.into_values();
        let unknown = unknown.map(|kv| Suspect {
            key: kv.key.clone(),
            found: Some(KeyState::of(&kv.named())),
            at,
        });
        self.reconciler.suspects.extend(unknown);
    }

    /// Handles the end of the 5 s in which the watch could deliver the changes of the suspects. Suspects that still differ are read.
    fn on_settle_time(&mut self, now: Instant) -> Command {
        self.reconciler.settle_at = None;
        let suspects = std::mem::take(&mut self.reconciler.suspects);
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
            self.reconciler.confirming.insert(key.clone());
            self.reconciler.reads.insert((now, key));
        }
        Command::Receive
    }

    /// Handles a report that the address in the value of a key refuses connections. One read shows whether the key still exists. The read
    /// is delayed and rate-limited.
    pub(in crate::resolver) fn on_refused_connection(&mut self, key: &Key, now: Instant) {
        let reconciler = &mut self.reconciler;
        let lately = |at: &Instant| now.saturating_duration_since(*at) < REPORT_INTERVAL;
        if !self.keys.contains_key(key)
            || reconciler.reads.len() >= READS_MAX
            || reconciler.reported.get(key).is_some_and(lately)
        {
            return;
        }
        if reconciler.reported.len() >= READS_MAX {
            reconciler.reported.retain(|_, at| lately(at));
        }
        reconciler.reported.insert(key.clone(), now);
        let wait = REPORT_SPREAD.mul_f64(self.rng.f64());
        reconciler.reads.insert((now + wait, key.clone()));
    }

    /// Handles the result of [`Command::Read`].
    pub(in crate::resolver) fn on_read(
        &mut self,
        key: Key,
        answer: Result<(Header, Option<KeyValue>), EtcdError>,
        now: Instant,
    ) -> Command {
        self.reconciler.on_answer(answer.is_err(), now);
        let confirms = self.reconciler.confirming.remove(&key);
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
                self.last_header = header;
                let read = found.as_ref().map(|kv| KeyState::of(&kv.version()));
                if !KeyState::agree(read.as_ref(), known.as_ref()) {
                    self.report.repaired += 1;
                    self.reconciler.has_lost_event |= confirms;
                    tracing::debug!(?key, revision = %header.revision, there = found.is_some(), "a read found a change that the watch has not delivered");
                    self.apply_read(key, found, header.revision);
                }
            }
            Err(error) => tracing::debug!(?key, %error, "could not read a key to compare it"),
        }
        if self.reconciler.has_lost_event && self.reconciler.confirming.is_empty() {
            return self.reopen_watch();
        }
        Command::Receive
    }

    fn apply_read(&mut self, key: Key, found: Option<KeyValue>, revision: Revision) {
        if let Some(kv) = found {
            return self.apply(Event::Put(kv));
        }
        self.apply(Event::Delete {
            key: key.clone(),
            mod_revision: revision,
        });
        self.add_tombstone(key, revision);
    }

    /// Records that a key did not exist at a revision. Without this record, a put that is older than the read but is delivered after the
    /// read would restore the key. The key might then never be removed, because the watch may have lost the delete of this very key.
    fn add_tombstone(&mut self, key: Key, revision: Revision) {
        self.tombstones.insert(key, revision);
    }

    /// Opens a new watch, because a watch that has lost events may lose more.
    fn reopen_watch(&mut self) -> Command {
        self.reconciler.has_lost_event = false;
        let State::Watching(watching) = &self.state else {
            return self.on_wake();
        };
        tracing::warn!(revision = %watching.revision, "reconciliation found changes that the watch has lost: opening a new watch");
        let revision = watching.revision;
        self.state = State::Resuming { revision };
        self.on_wake()
    }
}

/// A reconciliation lists all names after this many reconciliations in a row that compared only the changes. With the default interval, all
/// names are listed about once an hour.
const COMPLETE_LIST_AFTER: u32 = 15;
/// Maximum number of suspects that are read individually. With more suspects, a list of the whole prefix costs less than the reads.
const SUSPECTS_MAX: usize = 100;
/// The time over which the reads after reports are spread. When a server crashes, all of its clients detect it within the same
/// milliseconds.
const REPORT_SPREAD: Duration = Duration::from_secs(2);
/// After a report that causes a read, further reports about the same key are ignored for this time.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// While this many reads are pending, further reports are dropped. An address that keeps refusing connections is reported again.
const READS_MAX: usize = 100;
