//! Slow start: an endpoint that has just become ready gets its share little by little.
//!
//! What is new is cold: caches, pools, a just-in-time compiler. It is never flooded, since its first latency is the pool's; where that is not
//! enough, its weight grows over a window. The formula is Envoy's with an aggression of 1: the elapsed part of the window, a tenth at least.

use std::time::Duration;

use tokio::time::Instant;

use super::{Class, Driver, EndpointEntry};
use crate::address::Address;

impl Driver {
    /// An endpoint has a connection: if it is its first, its share begins to grow.
    pub(super) fn start_slowly(&mut self, address: &Address, now: Instant) {
        if self.options.slow_start.is_none() {
            return;
        }
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        // A connection beside another one, or after one that was closed in order, is to a server that is warm.
        if entry.class == Class::Ready || std::mem::replace(&mut entry.warm, true) {
            return;
        }
        if entry.started.replace(now).is_none() {
            self.starting.push(address.clone());
        }
    }

    /// What an endpoint weighs now.
    pub(super) fn share(&self, entry: &EndpointEntry, now: Instant) -> u32 {
        let weight = entry.attributes.weight();
        match (self.options.slow_start, entry.started) {
            (None, _) => weight,
            (Some(_), None) => weight.saturating_mul(SCALE),
            (Some(window), Some(started)) => {
                grown(weight, now.saturating_duration_since(started), window)
            }
        }
    }

    /// Brings the shares that grow up to date.
    pub(super) fn grow_shares(&mut self, now: Instant) {
        let Some(window) = self.options.slow_start else {
            return;
        };
        for address in std::mem::take(&mut self.starting) {
            let Some(entry) = self.endpoints.get_mut(&address) else {
                continue;
            };
            let Some(started) = entry.started else {
                continue;
            };
            if now.saturating_duration_since(started) >= window {
                entry.started = None;
            } else {
                self.starting.push(address);
            }
            for id in entry.subchannels.clone() {
                self.update_ready_set(id);
            }
        }
    }
}

fn grown(weight: u32, elapsed: Duration, window: Duration) -> u32 {
    let part = elapsed.as_secs_f64() / window.as_secs_f64().max(f64::MIN_POSITIVE);
    let factor = part.clamp(MIN_FACTOR, 1.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast to an integer saturates, and nothing here is negative"
    )]
    let share = (f64::from(weight.saturating_mul(SCALE)) * factor) as u32;
    share
}

/// Weights are integers and often 1: a part of one needs finer steps.
const SCALE: u32 = 100;
/// Envoy's `min_weight_percent`.
const MIN_FACTOR: f64 = 0.1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_grows_from_a_tenth_to_the_whole() {
        let window = Duration::from_secs(10);
        let at = |seconds| grown(2, Duration::from_secs(seconds), window);
        assert_eq!(
            [at(0), at(1), at(5), at(10), at(99)],
            [20, 20, 100, 200, 200]
        );
        assert_eq!(grown(1, Duration::ZERO, Duration::ZERO), 10);
        assert_eq!(grown(u32::MAX, window, window), u32::MAX);
    }
}
