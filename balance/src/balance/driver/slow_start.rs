//! Slow start: the share of an endpoint that has just become ready grows gradually.
//!
//! A new server has cold caches, empty pools and code that is not compiled yet. It is never flooded, because its first latency estimate is
//! the pool's median. Where that is not enough, its weight grows over a window. The formula is Envoy's with an aggression of 1: the weight
//! is multiplied by the elapsed fraction of the window, at least 0.1.

use std::time::Duration;

use tokio::time::Instant;

use super::driver::{Class, Driver, EndpointEntry};
use crate::address::Address;

impl Driver {
    /// Starts the growth of an endpoint's share if the endpoint has just become ready and its server is not warm.
    pub(super) fn start_slowly(&mut self, address: &Address, now: Instant) {
        if self.options.slow_start.is_none() {
            return;
        }
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        // The server is warm if another connection is ready, or if one was ready since the last failed attempt or registration.
        if entry.class == Class::Ready || std::mem::replace(&mut entry.warm, true) {
            return;
        }
        if entry.started.replace(now).is_none() {
            self.starting.push(address.clone());
        }
    }

    /// Returns the current weight of an endpoint.
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

    /// Updates the shares that still grow.
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

/// Scale of weights with slow start: weights are integers, and a fraction of 1 needs finer steps.
const SCALE: u32 = 100;
/// Envoy's `min_weight_percent`.
const MIN_FACTOR: f64 = 0.1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_grows_from_a_tenth_to_one() {
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
