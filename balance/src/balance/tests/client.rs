//! The channel of one client in virtual time.

use std::time::Duration;

use prost::Message;
use tokio::time::Instant;

use super::simulation::Connection;
use crate::balance::estimate::Ticks;
use crate::balance::latencies::Latencies;
use crate::balance::load_weights::{LoadReports, Series, factors, has_weight};
use crate::balance::picker::{LbPolicy, Pick, Picker, SCAN_LIMIT};
use crate::balance::ready_set::{ReadySet, ReadySetBuilder};
use crate::load_report::{LoadReport, OrcaLoadReport};

/// A policy, with or without load reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) policy: LbPolicy,
    pub(super) load_reports: bool,
}

impl Policy {
    /// Returns whether the weights of the servers are computed from their load reports.
    pub(super) fn reweighs(self) -> bool {
        self.load_reports && self.policy == LbPolicy::WeightedRoundRobin
    }
}

/// How a call has ended.
#[derive(Clone, Debug)]
pub(super) struct Response {
    pub(super) server: usize,
    pub(super) elapsed: Duration,
    pub(super) failed: bool,
    /// The calls in flight that the server reports, with this call.
    pub(super) in_flight: u32,
}

pub(super) struct Client {
    policy: Policy,
    connections: Vec<Connection>,
    latencies: Latencies,
    builder: ReadySetBuilder<usize, Connection>,
    set: ReadySet<Connection>,
    picker: Picker,
    /// For each server, the last report from which a weight can be computed.
    reports: Vec<(Series, Option<LoadReport>)>,
}

impl Client {
    pub(super) fn new(policy: Policy, servers: usize, seed: u64) -> Self {
        let takes_turns = policy.policy == LbPolicy::WeightedRoundRobin;
        let (mut latencies, mut builder) = (Latencies::new(), ReadySetBuilder::new(takes_turns));
        let mut connections = Vec::new();
        for server in 0..servers {
            let load = latencies.begin(None);
            load.set_limit(usize::MAX);
            let connection = Connection { server, load };
            connections.push(connection.clone());
            builder.insert(server, connection, 1);
        }
        Self {
            policy,
            connections,
            latencies,
            set: builder.freeze(),
            builder,
            picker: Picker::new(policy.policy, Some(seed)).with_load_reports(policy.load_reports),
            reports: vec![(Series::default(), None); servers],
        }
    }

    /// Returns the server of the next call.
    pub(super) fn pick(&self) -> usize {
        let Pick::Taken(connection) = self.picker.pick(&self.set, |_| true, SCAN_LIMIT) else {
            panic!("a connection without a limit should take the call");
        };
        connection.server
    }

    /// Records a response, as the permit of a call does.
    pub(super) fn on_response(&mut self, response: &Response, now: Ticks) {
        let load = &self.connections[response.server].load;
        if self.policy.load_reports {
            load.on_server_load(response.in_flight, now);
        }
        load.release();
        if response.failed {
            load.on_failure(response.elapsed, now);
        } else {
            load.on_head(response.elapsed, now);
        }
    }

    /// Records a report that contains more than the calls in flight.
    pub(super) fn on_report(&mut self, server: usize, report: &OrcaLoadReport, now: Instant) {
        let report = LoadReport::decode(&report.encode_to_vec(), now).expect("a report");
        if has_weight(&report) {
            self.reports[server].1 = Some(report);
        }
    }

    /// Updates the estimates as the driver does. Returns whether the channel was in use.
    pub(super) fn refresh(&mut self, now: Ticks) -> bool {
        let loads = || self.connections.iter().map(|connection| &*connection.load);
        let in_use = self.latencies.refresh(loads(), loads(), now);
        if self.policy.load_reports {
            self.latencies.refresh_server_loads(loads(), loads(), now);
        }
        in_use
    }

    /// Computes the weights from the reports.
    pub(super) fn reweigh(&mut self, now: Instant) {
        let config = LoadReports::new();
        let weight = |(series, report): &mut (Series, Option<LoadReport>)| {
            (series.weight(report.as_ref(), now, &config), true)
        };
        let weights: Vec<_> = self.reports.iter_mut().map(weight).collect();
        let factors = factors(&weights).unwrap_or_else(|| vec![1; weights.len()]);
        let mut changed = false;
        for (server, factor) in factors.into_iter().enumerate() {
            changed |= self.builder.reweigh(&server, factor);
        }
        if changed {
            self.set = self.builder.freeze();
        }
    }
}
