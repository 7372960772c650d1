//! The state machine of one registration: one key or several keys under one lease. It does no I/O, so that tests can run every order of
//! responses.
//!
//! ```text
//!                    ┌──────────── lease lost ────────────┐
//!                    ▼                                    │
//!   start ──▶ Granting ──▶ Reading ──▶ Putting ──▶ Registered ◀─┐ renew at TTL/3
//!               ▲  ▲         │ ▲          │          │ │  └─────┘
//!               │  │ foreign │ └─conflict─┘          │ │
//!               │  │         ▼                       │ └─ deleted, new value, time to verify ──▶ Reading
//!               │  └─── Superseded ◀── foreign put ──┘
//!               │   key deleted
//!               └── resume ── Paused ◀── pause ── Leaving ── deregister ──▶ Deregistered
//! ```
//!
//! `foreign` means that the key belongs to another server. `time to verify` means that a periodic read of the keys is due. A request to
//! pause or to deregister leads from every state to `Leaving`. The two labels after `Leaving` name this request.
//!
//! The state and the current time alone determine the next command ([`Machine::command`]). If the owner task (the task that executes the
//! commands) cancels a command before its result is known, the machine returns the same command again. The repetition is safe because every
//! write is guarded by the mod revision of the key, and by a lease that ends with the registration.

mod answers;
mod machine;
mod next_command;
mod removal;
mod state;

pub(super) use machine::{Command, Found, LEAVE_MARKER_MAX, Machine, Phase, Put};

#[cfg(test)]
mod tests;
