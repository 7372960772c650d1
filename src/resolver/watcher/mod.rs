//! The list-and-watch state machine of one prefix. It performs no I/O, so that tests can replay every order of responses.
//!
//! ```text
//!            ┌─────── too large: smaller pages ──────┐
//!            │   compacted, failed: from the start   │
//!            ▼                                       │
//!   ┌─▶ Listing ── last page ──▶ Watching{R} ── end, error ──▶ Resuming{R}
//!   │      ▲                       │  │  ▲                          │
//!   │      └── compacted, or the ──┘  │  └─────── after a wait ─────┤
//!   │       store is another one      └ check after the opening,   │
//!   │                                   or for a suspicious header  │
//!   └───────────────────────── set empty ───────────────────────────┘
//! ```
//!
//! R is the revision at which the next watch is opened. It is the header revision of the list, and later the mod revision of the last
//! applied event. The picture omits further causes of a list; see `resume_or_relist` and `reconcile`.
//!
//! A store that was wiped or restored keeps its cluster id, and often has a similar raft term and revision. Only the state of a key shows
//! whether revision R has the same meaning in that store. When a watch has been opened, the machine therefore reads the key written last,
//! linearizably, before it processes any message of the watch. (After a list, only the keys of its first page are considered.) This read is
//! the check. It must come after the opening, so that its result stays valid for the lifetime of the stream: a store is replaced only while
//! its server is stopped, and the stream ends with the server process.
//!
//! A message whose header has a revision below R, or another cluster id, also causes a check, at most once per watch.
//!
//! Two kinds of watch are not checked when they are opened. The first is the watch after an empty list, because there is no key to read.
//! The second is the watch after a failed check: if a check fails, that is, if it finds signs of another store, the prefix is listed again,
//! and the watch after this list is not checked. If that watch were checked, keys that change constantly could make each check fail, and
//! each failure would cause another list.
//!
//! The header of a watch message never changes R, because the header is ahead of the events while a watch delivers a backlog. A watch is
//! opened at R, not at R + 1, because the previous stream may have ended in the middle of revision R. An event of revision R may then be
//! applied twice, which has no effect. If an event was too large to receive, the prefix is listed, and the next watch is opened at R + 1,
//! so that the event is not delivered again.
//!
//! While the machine watches, `reconcile` checks periodically that the watch has delivered every change.

mod listing;
mod machine;
mod reconcile;
mod reconcile_schedule;
mod resume_or_relist;
mod state;
mod watching;

pub(super) use machine::{Command, Machine, Report};

#[cfg(test)]
mod tests;
