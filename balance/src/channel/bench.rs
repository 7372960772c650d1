//! The internals of a channel for the benches. Not part of the public interface.

use std::time::Duration;

use tokio::time::Instant;

use super::BalancedChannel;
use crate::balance::{Permit, Pick};

/// Picks an endpoint and releases the permit. The cost of this function is the cost that balancing adds to a call. Returns whether an
/// endpoint was picked.
// Never inlined, so that a loop of picks is not optimized as a whole.
#[inline(never)]
#[must_use]
pub fn pick(channel: &BalancedChannel) -> bool {
    permit(channel).is_some()
}

/// Picks an endpoint and records a call on it whose response head was received after `latency`.
pub fn answered(channel: &BalancedChannel, latency: Duration) {
    let now = Instant::now();
    if let Some(mut permit) = permit(channel) {
        permit.on_sent(now.checked_sub(latency).unwrap_or(now));
        permit.on_head(now, None);
    }
}

/// Returns the number of endpoints that picks can use.
#[must_use]
pub fn ready(channel: &BalancedChannel) -> usize {
    channel.0.shared().summary().ready
}

fn permit(channel: &BalancedChannel) -> Option<Permit> {
    match channel.0.shared().pick(|_| true) {
        Pick::Taken(permit) => Some(permit),
        _ => None,
    }
}
