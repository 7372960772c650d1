//! The latencies of all connections of a channel: their median, and how fast they are forgotten. Also the median of the loads that the
//! servers report.

use super::estimate::{Estimate, MIN_TIME_CONSTANT, Reference, Ticks, median};
use super::load::{Load, LoadHandle, Loads};
use super::server_load::{self, ServerLoad};

/// Creates the [`Load`] of each connection, and refreshes the latency that picks compare.
#[derive(Debug)]
pub(super) struct Latencies {
    loads: Loads,
    /// The median latency and the time constant as of the last refresh. If the median were computed for each new connection, connecting a
    /// large set would take quadratic time.
    reference: Reference,
    interval: SampleInterval,
    refreshed: Ticks,
    /// The median number of calls of other clients at a server, as of the last refresh. 0 without load reports.
    others: u32,
}

impl Latencies {
    pub(super) fn new() -> Self {
        Self {
            loads: Loads::new(),
            reference: Reference::default(),
            interval: SampleInterval::default(),
            refreshed: Ticks::default(),
            others: 0,
        }
    }

    pub(super) fn reference(&self) -> Reference {
        self.reference
    }

    /// Returns the load of a new connection. It starts with the estimate of an earlier connection to the endpoint if there was one, and
    /// else with the median.
    pub(super) fn begin(&mut self, inherited: Option<Estimate>) -> LoadHandle {
        let load = self.loads.begin(inherited, self.reference);
        load.set_others(self.others);
        load
    }

    /// Updates the calls of other clients that picks count, from the load reports of the servers.
    pub(super) fn refresh_server_loads<'a>(
        &mut self,
        primary: impl Iterator<Item = &'a Load>,
        all: impl Iterator<Item = &'a Load>,
        now: Ticks,
    ) {
        let recent = primary
            .filter_map(Load::server_load)
            .filter(|load| load.is_recent(now));
        let mut others: Vec<_> = recent.map(ServerLoad::others).collect();
        self.others = server_load::median(&mut others);
        for load in all {
            load.refresh_others(self.others, now);
        }
    }

    /// Computes the median latency and the time constant from the primary set, which contains the connections that calls normally pick
    /// from. For each ready connection, updates the latency that picks compare. Returns whether any ready connection has a call in flight,
    /// or has recorded a latency sample within the last 10 s.
    pub(super) fn refresh<'a>(
        &mut self,
        primary: impl Iterator<Item = &'a Load>,
        all: impl Iterator<Item = &'a Load>,
        now: Ticks,
    ) -> bool {
        let elapsed = now.since(self.refreshed);
        self.refreshed = now;
        let (mut means, mut connections, mut sampled) = (Vec::new(), 0.0, 0.0);
        for load in primary {
            connections += 1.0;
            if let Some(estimate) = load.estimate() {
                means.push(estimate.mean());
                if now.since(estimate.updated()) < elapsed {
                    sampled += 1.0;
                }
            }
        }
        self.interval.record(sampled, connections, elapsed);
        self.reference = Reference {
            median: median(&mut means),
            time_constant: self.interval.time_constant(),
        };
        let mut in_use = false;
        for load in all {
            in_use |= load.in_flight() > 0 || load.since_last_sample(now) < RECENT_USE;
            load.refresh(self.reference, now);
        }
        in_use
    }
}

/// The mean interval between two samples of one connection, over the last [`WINDOW`] seconds.
///
/// It is measured by the driver, so that a call need not count its sample. Several samples of a connection between two refreshes count as
/// one. This makes no difference, because the time constant has a minimum that is longer than several refreshes.
#[derive(Debug, Default)]
struct SampleInterval {
    samples: f32,
    /// The sum of the times for which the connections could have had samples, in seconds.
    time: f32,
}

impl SampleInterval {
    /// Records how many of the connections have had samples in the last `elapsed` seconds.
    fn record(&mut self, sampled: f32, connections: f32, elapsed: f32) {
        let left = (-elapsed / WINDOW).exp();
        self.samples = self.samples * left + sampled;
        // The time of the interval decays within it as well, so that a long pause of the driver does not count in full.
        self.time = self.time * left + connections * WINDOW * (1.0 - left);
    }

    /// Returns the time constant of the estimates, in seconds.
    fn time_constant(&self) -> f32 {
        if self.samples <= 0.0 {
            return MIN_TIME_CONSTANT;
        }
        (REMEMBERED * self.time / self.samples).clamp(MIN_TIME_CONSTANT, MAX_TIME_CONSTANT)
    }
}

/// Time for which a connection counts as in use after its last call, in seconds. Most callers send the next call within this time, even if
/// they send few calls.
const RECENT_USE: f32 = 10.0;
/// Time over which the interval between samples is averaged, in seconds.
const WINDOW: f32 = 10.0;
/// The time constant of the estimates, as a multiple of the interval between two samples of a connection.
const REMEMBERED: f32 = 4.0;
/// Maximum time constant of the estimates, in seconds. An endpoint that is fifty times as slow as the median is tried again after 5.3 time
/// constants.
const MAX_TIME_CONSTANT: f32 = 30.0;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;

    /// Refreshes four connections every 200 ms for a minute. In each refresh interval, as many calls are made as `calls` returns, to the
    /// connections in turn. Returns the time constant at the end.
    fn time_constant_after(seconds: u64, calls: impl Fn(u64) -> u64) -> f32 {
        let start = Instant::now();
        let mut latencies = Latencies::new();
        let loads: Vec<_> = (0..4).map(|_| latencies.begin(None)).collect();
        let mut turns = loads.iter().cycle();
        for refresh in 0..seconds * 5 {
            let at = |millis| Ticks::at(start + Duration::from_millis(millis), start);
            for _ in 0..calls(refresh) {
                let load = turns.next().expect("has connections");
                load.on_head(Duration::from_millis(1), at(refresh * 200 + 100));
            }
            let all = || loads.iter().map(|load| &**load);
            latencies.refresh(all(), all(), at((refresh + 1) * 200));
        }
        latencies.reference().time_constant
    }

    fn near(left: f32, right: f32) -> bool {
        (left - right).abs() <= right * 0.2
    }

    #[test]
    fn the_time_constant_of_a_busy_channel_is_the_minimum() {
        for calls in [4, 40] {
            let constant = time_constant_after(60, |_| calls);
            assert!((constant - MIN_TIME_CONSTANT).abs() < f32::EPSILON);
        }
    }

    #[test]
    fn the_time_constant_is_four_sample_intervals_of_a_connection() {
        // One call every 200 ms, and every second. A connection gets every fourth call.
        assert!(near(time_constant_after(60, |_| 1), 4.0 * 0.8));
        let every_second = |refresh| u64::from(refresh % 5 == 0);
        let constant = time_constant_after(60, every_second);
        assert!(near(constant, 4.0 * 4.0), "{constant} s");
    }

    #[test]
    fn the_time_constant_has_a_maximum() {
        let every_minute = |refresh| u64::from(refresh % 300 == 0);
        let constant = time_constant_after(600, every_minute);
        assert!((constant - MAX_TIME_CONSTANT).abs() < f32::EPSILON);
    }

    #[test]
    fn the_time_constant_follows_a_change_of_the_call_rate_within_seconds() {
        let constant = time_constant_after(66, |refresh| {
            if refresh < 300 {
                u64::from(refresh % 20 == 0)
            } else {
                40
            }
        });
        assert!((constant - MIN_TIME_CONSTANT).abs() < f32::EPSILON);
    }

    #[test]
    fn a_server_that_reports_nothing_counts_as_busy_as_the_median_server() {
        let start = Instant::now();
        let at = |seconds| Ticks::at(start + Duration::from_secs(seconds), start);
        let mut latencies = Latencies::new();
        let loads: Vec<_> = (0..4).map(|_| latencies.begin(None)).collect();
        for (load, reported) in loads.iter().zip([10, 30, 50]) {
            load.on_server_load(reported, at(100));
        }
        let all = || loads.iter().map(|load| &**load);
        latencies.refresh_server_loads(all(), all(), at(100));
        let in_flight: Vec<_> = all().map(Load::server_in_flight).collect();
        assert_eq!(in_flight, [10, 30, 50, 30]);
        assert_eq!(latencies.begin(None).server_in_flight(), 30);
        latencies.refresh_server_loads(all(), all(), at(200));
        let in_flight: Vec<_> = all().map(Load::server_in_flight).collect();
        assert_eq!(in_flight, [0; 4], "old reports count no longer");
    }

    #[test]
    fn a_channel_without_calls_is_not_in_use_after_ten_seconds() {
        let start = Instant::now();
        let at = |seconds| Ticks::at(start + Duration::from_secs(seconds), start);
        let mut latencies = Latencies::new();
        let load = latencies.begin(None);
        load.on_head(Duration::from_millis(1), at(100));
        let mut in_use = |now| {
            let all = || std::iter::once(&*load);
            latencies.refresh(all(), all(), at(now))
        };
        assert!(in_use(101));
        assert!(!in_use(111));
    }
}
