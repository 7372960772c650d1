//! The watching state: the opening, the check and the messages of a watch.

use tokio::time::Instant;

use super::machine::{Command, Machine};
use super::state::{KeyState, Listing, State, Watching};
use crate::error::EtcdError;
use crate::keyspace::{Event, Header, Key, KeyVersion, LeaseId, Revision, WatchMessage};

impl Machine {
    pub(super) fn watch(&mut self, revision: Revision, check: Option<Key>) -> Command {
        self.report.revision = Some(revision);
        self.state = State::Watching(Watching {
            revision,
            began: revision,
            behind: false,
            opened: None,
            pending: Vec::new(),
            check,
            suspicion_checked: false,
        });
        Command::Watch(revision)
    }

    /// Handles the success of [`Command::Watch`].
    pub(in crate::resolver) fn on_watch_opened(&mut self, now: Instant) -> Command {
        self.report.watches += 1;
        let State::Watching(watching) = &mut self.state else {
            return self.on_wake();
        };
        watching.opened = Some(now);
        self.reconciler.on_watch_opened(now, &mut self.rng);
        match watching.check.take() {
            Some(key) => Command::Check(key),
            None => Command::Receive,
        }
    }

    /// Handles a message that does not cancel the watch.
    pub(in crate::resolver) fn on_message(&mut self, message: WatchMessage) -> Command {
        let State::Watching(watching) = &mut self.state else {
            return self.on_wake();
        };
        // The member responds and serves this prefix, so the earlier failure is over.
        self.report.trouble = None;
        self.token_renewed = false;
        watching.behind |= message.header.revision > watching.revision;
        let lags = message.header.revision != Revision::ZERO
            && message.header.revision < watching.revision;
        let foreign = message.header.cluster_id != 0
            && message.header.cluster_id != self.last_header.cluster_id;
        let suspicious =
            (lags || foreign) && !std::mem::replace(&mut watching.suspicion_checked, true);

        // Events below R (`watching.revision`) are dropped. They are old events that a lagging member delivers again.
        let floor = watching.revision;
        watching.pending.extend(
            message
                .events
                .into_iter()
                .filter(|event| event.mod_revision() >= floor),
        );
        let pending = &mut watching.pending;
        let incomplete = match pending.last() {
            Some(last) if message.fragment => {
                let last = last.mod_revision();
                pending
                    .iter()
                    .rev()
                    .take_while(|event| event.mod_revision() == last)
                    .count()
            }
            _ => 0,
        };
        let ready: Vec<_> = pending.drain(..pending.len() - incomplete).collect();
        let passed = ready.last().map_or(watching.revision, Event::mod_revision);
        watching.revision = passed;
        self.report.revision = Some(passed);
        // An event shows that the store has reached the event's revision. The revision of `last_header` is raised accordingly, so that a
        // store that is restored from an earlier backup is detected.
        if !foreign {
            self.last_header.revision = self.last_header.revision.max(passed);
        }
        for event in ready {
            self.apply(event);
        }
        // Tombstones are removed only after all events are applied. `passed` is the revision of the last event. An earlier event of the same
        // message may be older than a tombstone that `passed` makes obsolete, and the tombstone must still suppress it.
        self.tombstones.retain(|_, gone| *gone > passed);
        if !suspicious {
            return Command::Receive;
        }
        // A lagging member and a wiped store look the same here. A linearizable read distinguishes them.
        if let Some(key) = self.newest() {
            return Command::Check(key);
        }
        self.state = State::Listing(Listing::default());
        Command::Wait(self.backoff.next(&mut self.rng))
    }

    pub(super) fn apply(&mut self, event: Event) {
        match &event {
            Event::Put(kv) => {
                let later = |known: &KeyState| known.mod_revision > kv.mod_revision;
                let buried = |gone: &Revision| *gone >= kv.mod_revision;
                if self.keys.get(&kv.key).is_some_and(later)
                    || self.tombstones.get(&kv.key).is_some_and(buried)
                {
                    return;
                }
                self.tombstones.remove(&kv.key);
                self.keys
                    .insert(kv.key.clone(), KeyState::of(&kv.version()));
            }
            Event::Delete { key, mod_revision } => {
                if self
                    .keys
                    .get(key)
                    .is_none_or(|known| known.mod_revision > *mod_revision)
                {
                    return;
                }
                self.keys.remove(key);
            }
        }
        self.update.push(event);
    }

    /// Handles the result of [`Command::Check`].
    pub(in crate::resolver) fn on_checked(
        &mut self,
        answer: Result<(Header, Option<KeyVersion>), EtcdError>,
        now: Instant,
    ) -> Command {
        let (header, found) = match answer {
            Ok(answer) => answer,
            // A watch that cannot be checked is not trusted.
            Err(error) => return self.on_watch_ended(error, now),
        };
        let State::Watching(watching) = &self.state else {
            return self.on_wake();
        };
        let floor = watching.revision;
        let same = found.is_some_and(|found| {
            self.keys.get(&found.key).is_some_and(|known| {
                // If the key was written after the watch's revision, but under the same lease, its owner wrote it. So the store is the
                // same, and the watch will deliver the write.
                let later = found.mod_revision > floor && known.lease != LeaseId::NONE;
                known.lease == found.lease && (later || known.is_same(&KeyState::of(&found)))
            })
        });
        if self.is_other_store(header) || !same {
            return self.relist(true);
        }
        self.last_header = header;
        Command::Receive
    }
}
