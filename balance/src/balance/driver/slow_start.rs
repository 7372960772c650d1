//! Slow start: the weight of an endpoint that has just become ready grows gradually.
//!
//! A new server has cold caches, empty pools and code that is not compiled yet. Even without slow start, the default policy does not flood
//! a new server, because a connection without samples counts as hardly faster than the median of all endpoints. For servers that need a
//! gentler start, slow start lets the weight grow over a configured time, the *window*. The formula is Envoy's with an aggression of 1: the
//! weight is multiplied by the elapsed fraction of the window, but by no less than 0.1.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::address::Address;

/// The endpoints whose weight still grows.
#[derive(Debug)]
pub(super) struct SlowStart {
    /// The time in which a weight grows to its full value; `None` if slow start is disabled.
    window: Option<Duration>,
    /// The time when the weight of each endpoint began to grow.
    started: HashMap<Address, Instant>,
}

impl SlowStart {
    pub(super) fn new(window: Option<Duration>) -> Self {
        Self {
            window,
            started: HashMap::new(),
        }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.window.is_some()
    }

    /// Returns whether a weight still grows.
    pub(super) fn is_waiting(&self) -> bool {
        !self.started.is_empty()
    }

    /// Starts the growth of an endpoint's weight.
    pub(super) fn start(&mut self, address: &Address, now: Instant) {
        if self.is_enabled() {
            self.started.insert(address.clone(), now);
        }
    }

    pub(super) fn forget(&mut self, address: &Address) {
        self.started.remove(address);
    }

    /// Returns the endpoints whose weight may have grown since this function was last called. An endpoint that has reached its full weight
    /// is returned once more and then forgotten.
    pub(super) fn grow(&mut self, now: Instant) -> Vec<Address> {
        let grown = self.started.keys().cloned().collect();
        let window = self.window.unwrap_or_default();
        self.started
            .retain(|_, started| now.saturating_duration_since(*started) < window);
        grown
    }

    /// Returns the current weight of an endpoint whose full weight is `weight`. If slow start is enabled, the result is multiplied by
    /// [`SCALE`], even for an endpoint that has its full weight.
    pub(super) fn current_weight(&self, address: &Address, weight: u32, now: Instant) -> u32 {
        let Some(window) = self.window else {
            return weight;
        };
        match self.started.get(address) {
            None => weight.saturating_mul(SCALE),
            Some(started) => grown(weight, now.saturating_duration_since(*started), window),
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
    let grown = (f64::from(weight.saturating_mul(SCALE)) * factor) as u32;
    grown
}

/// Factor of all weights if slow start is enabled. Weights are integers, so without the factor, a weight of 1 could not be reduced.
const SCALE: u32 = 100;
/// Minimum fraction of the full weight, as in Envoy's `min_weight_percent`.
const MIN_FACTOR: f64 = 0.1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_grows_from_a_tenth_to_its_full_value() {
        let window = Duration::from_secs(10);
        let at = |seconds| grown(2, Duration::from_secs(seconds), window);
        assert_eq!(
            [at(0), at(1), at(5), at(10), at(99)],
            [20, 20, 100, 200, 200]
        );
        assert_eq!(grown(1, Duration::ZERO, Duration::ZERO), 10);
        assert_eq!(grown(u32::MAX, window, window), u32::MAX);
    }

    #[test]
    fn grow_returns_an_endpoint_for_the_last_time_when_its_weight_is_full() {
        let address: Address = "10.0.0.5:80".parse().expect("a valid address");
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut slow_start = SlowStart::new(Some(Duration::from_secs(10)));
        assert_eq!(slow_start.current_weight(&address, 3, now), 300);
        slow_start.start(&address, now);
        assert_eq!(slow_start.current_weight(&address, 3, now), 30);
        assert_eq!(slow_start.grow(at(5)), std::slice::from_ref(&address));
        assert_eq!(slow_start.current_weight(&address, 3, at(5)), 150);
        assert_eq!(slow_start.grow(at(10)), std::slice::from_ref(&address));
        assert_eq!(slow_start.current_weight(&address, 3, at(10)), 300);
        assert!(slow_start.grow(at(11)).is_empty());
    }

    #[test]
    fn without_slow_start_weights_are_those_of_the_endpoints() {
        let address: Address = "10.0.0.5:80".parse().expect("a valid address");
        let mut slow_start = SlowStart::new(None);
        slow_start.start(&address, Instant::now());
        assert_eq!(slow_start.current_weight(&address, 3, Instant::now()), 3);
        assert!(slow_start.grow(Instant::now()).is_empty());
    }
}
