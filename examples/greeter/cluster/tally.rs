//! What the callers of the cluster have observed.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;
use tonic_etcd::Address;

/// The number of calls that each server has answered, the number of failed calls, and the latest calls.
#[derive(Default)]
pub struct Tally {
    pub served: BTreeMap<String, u64>,
    /// The name of the server at each address.
    pub names: BTreeMap<String, String>,
    /// Number of calls that failed outside the [`Kill`] period.
    pub failed: u64,
    /// Number of calls that failed in the [`Kill`] period.
    pub caught: u64,
    pub kill: Option<Kill>,
    pub last_failure: String,
    /// The successful calls of the last [`WINDOW`], in the order of their ends.
    recent: VecDeque<Sample>,
}

/// A successful call.
struct Sample {
    end: Instant,
    latency: Duration,
    server: Option<Address>,
}

/// The rate of the calls in the last [`WINDOW`], and two percentiles of their latencies.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// Calls per second.
    pub rate: f64,
    pub p50: Option<Duration>,
    pub p99: Option<Duration>,
    /// Calls per second of each server.
    pub servers: BTreeMap<String, f64>,
}

impl Tally {
    pub fn servers(&self) -> usize {
        self.served.len()
    }

    pub fn calls(&self) -> u64 {
        self.served.values().sum::<u64>() + self.failed + self.caught
    }

    pub fn count(&self, name: &str) -> u64 {
        self.served.get(name).copied().unwrap_or_default()
    }

    /// Counts a reply from the server `name`.
    pub fn on_reply(&mut self, name: String, server: Option<Address>, start: Instant) {
        let end = Instant::now();
        if let Some(server) = &server
            && !self.names.contains_key(server.as_str())
        {
            self.names.insert(server.to_string(), name.clone());
        }
        *self.served.entry(name).or_default() += 1;
        self.forget_before(end);
        self.recent.push_back(Sample {
            end,
            latency: end.saturating_duration_since(start),
            server,
        });
    }

    /// Counts a failed call that began at `start`.
    pub fn on_failure(&mut self, status: &tonic::Status, start: Instant) {
        if self.kill.as_ref().is_some_and(|kill| kill.caught(start)) {
            self.caught += 1;
        } else {
            self.failed += 1;
            self.last_failure = format!("{status:?}");
        }
    }

    /// Returns the pace of the last [`WINDOW`].
    pub fn pace(&mut self, now: Instant) -> Pace {
        self.forget_before(now);
        let mut latencies: Vec<_> = self.recent.iter().map(|sample| sample.latency).collect();
        latencies.sort_unstable();
        let per_second = 1.0 / WINDOW.as_secs_f64();
        let mut pace = Pace {
            p50: percentile(&latencies, 50),
            p99: percentile(&latencies, 99),
            ..Pace::default()
        };
        for sample in &self.recent {
            pace.rate += per_second;
            if let Some(server) = &sample.server {
                *pace.servers.entry(server.to_string()).or_default() += per_second;
            }
        }
        pace
    }

    fn forget_before(&mut self, now: Instant) {
        while let Some(sample) = self.recent.front()
            && now.saturating_duration_since(sample.end) > WINDOW
        {
            self.recent.pop_front();
        }
    }
}

/// Returns the latency that `percent` of the sorted latencies do not exceed.
fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

/// The period in which calls may fail because beta was killed. It begins just before the SIGKILL,
/// and ends 250 ms after the exit of the process. By then, the client has detected the closed
/// connections.
pub struct Kill {
    pub from: Instant,
    pub until: Option<Instant>,
}

impl Kill {
    /// Returns whether a call that began at `start` and ends now was in flight in this period.
    fn caught(&self, start: Instant) -> bool {
        self.until.is_none_or(|until| start <= until) && Instant::now() >= self.from
    }
}

/// The period of the rates and the percentiles. It is long enough for a steady number, and short enough to show a change at once.
const WINDOW: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_covers_the_last_second() {
        let mut tally = Tally::default();
        let start = Instant::now();
        for latency in 1..=100 {
            tally.recent.push_back(Sample {
                end: start,
                latency: Duration::from_millis(latency),
                server: "10.0.0.5:80".parse().ok(),
            });
        }
        let pace = tally.pace(start);
        assert!((pace.rate - 100.0).abs() < 1e-6, "{pace:?}");
        assert!((pace.servers["10.0.0.5:80"] - 100.0).abs() < 1e-6);
        assert_eq!(pace.p50, Some(Duration::from_millis(50)));
        assert_eq!(pace.p99, Some(Duration::from_millis(99)));
        let pace = tally.pace(start + Duration::from_millis(1_001));
        assert!(pace.rate.abs() < 1e-6 && pace.p50.is_none(), "{pace:?}");
    }
}
