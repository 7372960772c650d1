//! The target of all spans and events.

pub(super) const TARGET: &str = "tonic_balance::traces";
