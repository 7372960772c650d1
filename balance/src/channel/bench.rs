//! What the benches see of a channel that nobody else does. Not part of the public interface.

use std::time::Duration;

use tokio::time::Instant;

use super::BalancedChannel;
use crate::balance::{Permit, Pick};

/// Picks an endpoint and lets it go again: what balancing adds to a call. Says whether there was one.
// A function of its own wherever it is called from, so that its instructions can be counted.
#[inline(never)]
#[must_use]
pub fn pick(channel: &BalancedChannel) -> bool {
    permit(channel).is_some()
}

/// Notes a call whose response's head came after this time, on whichever endpoint is picked.
pub fn answered(channel: &BalancedChannel, latency: Duration) {
    let now = Instant::now();
    if let Some(mut permit) = permit(channel) {
        permit.on_sent(now.checked_sub(latency).unwrap_or(now));
        permit.on_head(now, None);
    }
}

/// How many endpoints the picker sees.
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
