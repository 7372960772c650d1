//! The latencies of all connections, and their median.

use super::ready_set_pair::ReadySets;
use crate::balance::load::{Estimate, LoadHandle, Loads, Ticks, median};
use crate::balance::ready_connection::ReadyEntry;

/// Creates the [`Load`](crate::balance::load::Load) of each connection, and refreshes the latency that picks compare.
#[derive(Debug)]
pub(super) struct Latencies {
    loads: Loads,
    /// The median latency as of the last refresh. If it were computed for each new connection, connecting a large set would take quadratic
    /// time.
    median: f32,
}

impl Latencies {
    pub(super) fn new() -> Self {
        Self {
            loads: Loads::new(),
            median: 0.0,
        }
    }

    pub(super) fn median(&self) -> f32 {
        self.median
    }

    /// Returns the load of a new connection. It starts with the estimate of an earlier connection to the endpoint if there was one, and
    /// else with the median.
    pub(super) fn begin(&mut self, inherited: Option<Estimate>) -> LoadHandle {
        self.loads.begin(inherited, self.median)
    }

    /// Computes the median latency of the primary set, which contains the connections that calls normally pick from. For each ready
    /// connection, updates the latency that picks compare. Returns whether any ready connection has a call in flight, or has recorded a
    /// latency sample within the last 10 s.
    pub(super) fn refresh(&mut self, sets: &ReadySets<ReadyEntry>, now: Ticks) -> bool {
        let primary = sets.primary();
        let estimates = primary.filter_map(|entry| entry.load().estimate());
        let mut latencies: Vec<_> = estimates.map(|estimate| estimate.mean()).collect();
        self.median = median(&mut latencies);
        let mut in_use = false;
        for entry in sets.all() {
            let load = entry.load();
            in_use |= load.in_flight() > 0 || load.since_last_sample(now) < RECENT_USE;
            load.refresh(self.median, now);
        }
        in_use
    }
}

/// Time for which a connection counts as in use after its last call, in seconds. Most callers send the next call within this time, even if
/// they send few calls.
const RECENT_USE: f32 = 10.0;
