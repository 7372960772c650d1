//! The policies by which a call is sent more than once, and the decision whether it is.

mod budget;
pub(super) mod decision;
pub(crate) mod method_config;
mod policy;

pub use budget::RetryBudget;
pub use policy::{HedgingPolicy, RetryPolicy};
