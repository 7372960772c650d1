//! The time since the start of the channels, which all processes share.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The start of the channels of a batch, in milliseconds since 1970.
#[derive(Clone, Copy)]
pub struct Epoch(u64);

impl Epoch {
    pub fn after(wait: Duration) -> Self {
        let start = SystemTime::now() + wait;
        Self(start.duration_since(UNIX_EPOCH).unwrap().as_millis() as u64)
    }

    pub fn parse(argument: &str) -> Self {
        Self(argument.parse().unwrap())
    }

    /// Returns the time that has passed, or 0 before the start.
    pub fn micros(self) -> u64 {
        let elapsed = SystemTime::now().duration_since(self.time());
        elapsed.map_or(0, |elapsed| elapsed.as_micros() as u64)
    }

    /// Returns the time until the start.
    pub fn remaining(self) -> Duration {
        let remaining = self.time().duration_since(SystemTime::now());
        remaining.unwrap_or_default()
    }

    fn time(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.0)
    }
}

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
