//! A list under way, and how it becomes the set.

use super::{Command, KeyState, Machine, State};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{
    Event, Header, Key, KeyValue, KeyVersion, ListRequest, Page, Range, Revision,
};

/// A list under way.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) kvs: Vec<KeyValue>,
    /// The first page's header.
    pub(super) header: Option<Header>,
    /// Where the next page begins; `None` at the range's start.
    pub(super) next: Option<Key>,
    /// How often compaction has overtaken it. From the third time on the pages are not pinned to one revision; watching from the first
    /// page's revision makes the outcome exact all the same.
    pub(super) compacted: u32,
    /// The next request asks for the name alone of a key that is too large to be read.
    pub(super) naming: bool,
    /// The key written last among those of the first page.
    pub(super) check: Option<Key>,
    /// Keys that are there with a value that cannot be read.
    pub(super) oversized: Vec<KeyVersion>,
    /// An event was too large to be received: the watch begins after the list's revision, or it would come again.
    pub(super) skipping: bool,
    /// The list before this one did not stand up to the check. This one is not checked again: where keys change all the time, a
    /// check would find them changed after every list.
    pub(super) distrusted: bool,
}

impl Machine {
    /// Takes the answer to [`Command::List`].
    pub(in crate::resolver) fn on_page(&mut self, answer: Result<Page, EtcdError>) -> Command {
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
                        .extend(page.kvs.iter().map(KeyValue::named));
                } else {
                    if listing.kvs.is_empty() {
                        let newest = page.kvs.iter().max_by_key(|kv| kv.mod_revision);
                        listing.check = newest.map(|kv| kv.key.clone());
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
                let command = self.watch(header.revision, check);
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

    pub(super) fn on_list_failed(&mut self, error: EtcdError) -> Command {
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
            limit: if listing.naming { 1 } else { self.page_limit },
            revision: pinned.map_or(Revision::ZERO, |header| header.revision),
            keys_only: listing.naming,
        }
    }

    /// Takes a whole list over: what is in it is put, what is not is deleted.
    pub(super) fn complete(
        &mut self,
        header: Header,
        kvs: Vec<KeyValue>,
        oversized: Vec<KeyVersion>,
    ) {
        // Not the maximum: after a wipe the store's history begins anew, and with it what can be held against it.
        self.seen = header;
        self.tombstones.clear();
        self.audit.on_listed();
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
            // Its last good value, if there was one, stays.
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

/// Keys per page: 500 values of the usual 150 bytes are 75 KiB, and a page halves itself where values are large.
pub(super) const PAGE_LIMIT: i64 = 500;
/// Small enough for any link that carries a call's answer at all.
pub(super) const PAGE_CAP_MIN: i64 = 10;
/// Lists that compaction overtook before pages are no longer pinned to one revision.
const UNPINNED_AFTER: u32 = 3;
