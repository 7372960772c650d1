//! The internals of a channel for the benches. Not part of the public interface.

use std::time::Duration;

use tokio::time::Instant;

use super::BalancedChannel;
use super::HashKey;
use crate::balance::{Details, Permit, Pick, PickKey, Select, SplitDraw};

/// Picks an endpoint and releases the permit. The cost of this function is the cost that balancing adds to a call. Returns whether an
/// endpoint was picked.
// Never inlined, so that a loop of picks is not optimized as a whole.
#[inline(never)]
#[must_use]
pub fn pick(channel: &BalancedChannel) -> bool {
    permit(channel, &PickKey::Any).is_some()
}

/// Picks the endpoint of a key and releases the permit.
#[inline(never)]
#[must_use]
pub fn pick_hashed(channel: &BalancedChannel, key: &[u8]) -> bool {
    let key = PickKey::Hash(HashKey::new(key).hash());
    permit(channel, &key).is_some()
}

/// Picks a selected endpoint and releases the permit.
#[inline(never)]
#[must_use]
pub fn pick_selected(channel: &BalancedChannel, select: &Select) -> bool {
    let key = PickKey::new(Details {
        select: Some(select.clone()),
        hash: None,
        call: None,
    });
    permit(channel, &key).is_some()
}

/// Picks an endpoint and records a call on it whose response head was received after `latency`.
pub fn answered(channel: &BalancedChannel, latency: Duration) {
    let now = Instant::now();
    if let Some(mut permit) = permit(channel, &PickKey::Any) {
        permit.on_sent(now.checked_sub(latency).unwrap_or(now));
        permit.on_head(now, None);
    }
}

/// Returns the number of endpoints that picks can use.
#[must_use]
pub fn ready(channel: &BalancedChannel) -> usize {
    channel.0.shared().summary().ready
}

fn permit(channel: &BalancedChannel, key: &PickKey) -> Option<Permit> {
    match channel
        .0
        .shared()
        .pick(key, &SplitDraw::default(), |_| true)
    {
        Pick::Taken(permit) => Some(permit),
        _ => None,
    }
}
