//! The policies for sending a call more than once, and the decision after a failure.

mod budget;
pub(super) mod decision;
pub(crate) mod method_config;
mod policy;

pub use budget::RetryBudget;
pub use policy::{HedgingPolicy, RetryPolicy};
