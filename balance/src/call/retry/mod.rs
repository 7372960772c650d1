//! The policies for sending a call more than once, and the decision after a failure.

pub(super) mod budget;
pub(super) mod decision;
mod policy;

pub use budget::RetryBudget;
pub use policy::{HedgingPolicy, RetryPolicy};
