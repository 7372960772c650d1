//! The listing state. Pages are collected, and the complete list replaces the set.

use super::machine::{Command, Machine, PAGE_LIMIT};
use super::state::{KeyState, Listing, State};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Event, Header, KeyValue, KeyVersion, ListRequest, Page, Range, Revision};

impl Machine {
    /// Handles the result of [`Command::List`].
    pub(in crate::resolver) fn on_page(&mut self, answer: Result<Page, EtcdError>) -> Command {
        let State::Listing(listing) = &mut self.state else {
            return self.on_wake();
        };
        match answer {
            Ok(page) => {
                self.page_limit = (self.page_limit * 2).min(self.page_cap);
                let is_first = listing.header.is_none();
                let header = *listing.header.get_or_insert(page.header);
                let more = page.more && !page.kvs.is_empty();
                listing.next = page.kvs.last().map(|kv| kv.key.successor());
                if is_first {
                    let newest = page.kvs.iter().max_by_key(|kv| kv.mod_revision);
                    listing.check = newest.map(|kv| kv.key.clone());
                }
                if std::mem::take(&mut listing.reads_name_only) {
                    listing
                        .oversized
                        .extend(page.kvs.iter().map(KeyValue::named));
                } else {
                    listing.kvs.extend(page.kvs);
                }
                if more {
                    return self.on_wake();
                }
                let listing = std::mem::take(listing);
                // After the watch is opened, the check reads this key to find out whether the store is still the same. The key is from the
                // first page: if the store is wiped between two pages, a key of a later page is from the new store, so a check of that key
                // would not detect the wipe.
                let check = listing.check.filter(|_| !listing.after_failed_check);
                self.complete(header, listing.kvs, listing.oversized);
                self.page_cap = PAGE_LIMIT;
                let command = self.watch(header.revision, check);
                match command {
                    Command::Watch(revision) if listing.skips_oversized_event => {
                        Command::Watch(Revision::new(revision.get() + 1))
                    }
                    command => command,
                }
            }
            Err(error) => self.on_list_failed(error),
        }
    }

    pub(super) fn on_list_failed(&mut self, error: EtcdError) -> Command {
        let State::Listing(listing) = &mut self.state else {
            return self.on_wake();
        };
        match error.kind() {
            EtcdErrorKind::ResponseTooLarge if self.page_limit > 1 => {
                self.page_limit /= 2;
                self.on_wake()
            }
            EtcdErrorKind::ResponseTooLarge if !listing.reads_name_only => {
                listing.reads_name_only = true;
                self.on_wake()
            }
            EtcdErrorKind::Compacted | EtcdErrorKind::FutureRevision => {
                *listing = Listing {
                    compacted: listing.compacted + 1,
                    after_failed_check: listing.after_failed_check,
                    skips_oversized_event: listing.skips_oversized_event,
                    ..Listing::default()
                };
                let wait = self.backoff.next(&mut self.rng);
                Command::Wait(wait)
            }
            _ => {
                // The list starts again with the first page, because the store may be replaced before the next request.
                *listing = Listing {
                    after_failed_check: listing.after_failed_check,
                    skips_oversized_event: listing.skips_oversized_event,
                    ..Listing::default()
                };
                if error.kind() == EtcdErrorKind::DeadlineExceeded {
                    // Over a slow link, the transfer of a page of large values can exceed the call timeout.
                    self.page_cap = (self.page_cap / 2).max(PAGE_CAP_MIN);
                    self.page_limit = self.page_limit.min(self.page_cap);
                }
                self.wait(error)
            }
        }
    }

    pub(super) fn request(&self, listing: &Listing) -> ListRequest {
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
            limit: if listing.reads_name_only {
                1
            } else {
                self.page_limit
            },
            revision: pinned.map_or(Revision::ZERO, |header| header.revision),
            written_after: Revision::ZERO,
            keys_only: listing.reads_name_only,
        }
    }

    /// Applies a complete list: the listed keys are put, and all other keys are deleted.
    pub(super) fn complete(
        &mut self,
        header: Header,
        kvs: Vec<KeyValue>,
        oversized: Vec<KeyVersion>,
    ) {
        // The header is replaced even if the new one is lower. After a wipe, the history of the store starts again, and later responses
        // must be compared with the new history.
        self.last_header = header;
        self.tombstones.clear();
        self.reconciler.on_listed(header.revision);
        self.report.listed = true;
        self.report.lists += 1;
        self.report.trouble = None;
        let mut gone = std::mem::take(&mut self.keys);
        for kv in kvs {
            gone.remove(&kv.key);
            self.keys
                .insert(kv.key.clone(), KeyState::of(&kv.version()));
            self.update.push(Event::Put(kv));
        }
        for version in oversized {
            let state = KeyState::of(&version);
            let KeyVersion {
                key, mod_revision, ..
            } = version;
            // The last good value of the key, if any, stays in use.
            let before = gone.remove(&key);
            if before.is_none_or(|before| before.mod_revision != mod_revision) {
                tracing::warn!(?key, revision = %mod_revision, "skipped a value that is too large to be received");
                self.report.oversized += 1;
            }
            self.keys.insert(key, state);
        }
        let deleted = gone.into_keys().map(|key| Event::Delete {
            key,
            mod_revision: header.revision,
        });
        self.update.extend(deleted);
    }
}

/// Minimum of `page_cap`, in keys. Ten values of the usual 150 bytes are 1.5 kB, so an even smaller page would not help on a slow link.
pub(super) const PAGE_CAP_MIN: i64 = 10;
/// A list that was interrupted this many times, usually by compaction, is no longer pinned to one revision.
const UNPINNED_AFTER: u32 = 3;
