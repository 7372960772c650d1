//! The mass-removal hold, without I/O. An instance that vanishes from the registry together with most other instances is held: it is kept
//! for a limited time, as a last resort.
//!
//! ```text
//!               vanished, less than half is left            the hold is over, or half is back
//!   registered ──────────────────────────────────▶ held ──────────────────────────────────────▶ gone
//!      ▲  │                                         │                                            ▲
//!      │  └──── vanished otherwise, or was marked as leaving ────────────────────────────────────┤
//!      └──────────────── registered again ──────────┘
//! ```
//!
//! *Half* means half of the largest set of the last 10 s. If etcd loses the keys of a set through a bug or a stuck leader, the keys do not
//! vanish at once, because keys whose leases expire together are deleted in separate events. Only the sum of the removals over a period
//! distinguishes such a loss from the normal turnover of servers. Only sizes are compared, so the replacement of a fleet by one at other
//! addresses is not a loss.
//!
//! An instance whose last value marks a planned departure does not count as vanished. It is also subtracted from the size that *half*
//! refers to, so that planned departures do not count as a loss.

mod hold;

pub(super) use hold::{Hold, News, Outcome};

#[cfg(test)]
mod tests;
