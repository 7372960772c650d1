//! A call off the usual way: waiting for an endpoint, sending again what was certainly not processed, and what a policy adds to that.
//!
//! ```text
//!            call.rs: the first try, as fast as it goes
//!               │ not ready, refused, lost, or an error that a policy may cover      │ hedged
//!               ▼                                                                    ▼
//!            attempts ── one attempt ──▶ replay ──▶ wait, tried ──▶ a pick ──▶ prepare ◀── hedge
//!               │ failed                                                             │
//!               └───▶ verdict (policy, progress, budget, pushback) ◀─────────────────┘
//! ```

mod attempts;
mod budget;
mod hedge;
mod journal;
mod methods;
mod options;
mod policy;
mod prepare;
mod replay;
mod tried;
mod verdict;
mod wait;

pub(super) use attempts::{PREVIOUS_ATTEMPTS, after_first, run};
pub use budget::RetryBudget;
pub(super) use hedge::hedge;
pub(super) use methods::{Plans, Retries};
pub use policy::{HedgingPolicy, RetryPolicy};
pub(super) use prepare::{TRUSTED_METADATA, is_unquestioned};
pub(super) use tried::Tried;
pub(super) use wait::ready;
