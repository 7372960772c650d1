//! The mass-removal hold, without I/O. Instances that vanish from the registry together with most others are kept for a limited time, as a
//! last resort.
//!
//! ```text
//!               vanished, less than half is left            the hold is over, or half is back
//!   registered ──────────────────────────────────▶ held ──────────────────────────────────────▶ gone
//!      ▲  │                                         │                                            ▲
//!      │  └──── vanished otherwise, or was marked as leaving ────────────────────────────────────┤
//!      └──────────────── registered again ──────────┘
//! ```
//!
//! *Half* means half of the largest set of the last 10 s. A set that etcd loses through a bug or a stuck leader does not vanish in one
//! step: leases that expire together are delivered as separate deletes. Only the sum over a period distinguishes such a loss from normal
//! turnover of servers. The comparison is by size, so a fleet that is replaced by a fleet at other addresses is not a loss.
//!
//! If the last value of an instance marks a planned departure, the instance does not count as vanished, and is also subtracted from the
//! earlier size of the set.

mod hold;

pub(super) use hold::{Hold, News, Outcome};

#[cfg(test)]
mod tests;
