//! Simulates callers and servers in virtual time, to measure the share of the calls that each server gets.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use tokio::time::Instant;

use crate::balance::estimate::Ticks;
use crate::balance::latencies::Latencies;
use crate::balance::load::LoadHandle;
use crate::balance::picker::{Candidate, LbPolicy, Pick, Picker, SCAN_LIMIT};
use crate::balance::ready_set::{ReadySet, ReadySetBuilder};

/// How calls arrive.
#[derive(Clone, Copy, Debug)]
pub(super) enum Callers {
    /// One call is started per period. The value is the period in microseconds.
    OpenLoop(u64),
    /// The value is the number of callers. Each caller starts a call when its previous call has ended.
    ClosedLoop(u32),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Server {
    pub(super) weight: u32,
    /// The mean time of a call to an idle server, in microseconds. The time of each call is up to 20 % longer or shorter.
    pub(super) service_time_us: f64,
    /// The time that each other call in flight adds, as a multiple of `service_time_us`.
    pub(super) queueing: f64,
    /// The time that each second of idleness adds to the next call, as a multiple of `service_time_us`. Idleness of more than a second
    /// counts as a second.
    pub(super) idle_penalty: f64,
    /// The share of expensive calls. The time of such a call does not depend on the server.
    pub(super) expensive_share: f64,
}

pub(super) const EQUAL: Server = Server {
    weight: 1,
    service_time_us: 100.0,
    queueing: 0.01,
    idle_penalty: 0.0,
    expensive_share: 0.0,
};

#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub(super) server: usize,
    pub(super) load: LoadHandle,
}

impl Candidate for Connection {
    fn latency(&self) -> f32 {
        self.load.latency()
    }

    fn in_flight(&self) -> u32 {
        self.load.in_flight()
    }

    fn server_in_flight(&self) -> u32 {
        self.load.server_in_flight()
    }

    fn acquire(&self) -> bool {
        self.load.acquire()
    }
}

/// A channel with one connection to each server, and its callers.
pub(super) struct Simulation {
    /// A test may replace a server between two calls.
    pub(super) servers: Vec<Server>,
    callers: Callers,
    connections: Vec<Connection>,
    latencies: Latencies,
    set: ReadySet<Connection>,
    picker: Picker,
    rng: fastrand::Rng,
    /// When the last call of each server ended, in microseconds.
    ended: Vec<u64>,
    /// The end, the server and the start of each call in flight.
    running: BinaryHeap<Reverse<(u64, usize, u64)>>,
    /// When the next call of an open loop starts.
    due: u64,
    refresh_at: u64,
    epoch: Instant,
}

impl Simulation {
    pub(super) fn new(policy: LbPolicy, servers: &[Server], callers: Callers, seed: u64) -> Self {
        let (mut latencies, mut builder) = (Latencies::new(), ReadySetBuilder::new(false));
        let mut connections = Vec::new();
        for (server, Server { weight, .. }) in servers.iter().enumerate() {
            let load = latencies.begin(None);
            load.set_limit(usize::MAX);
            let connection = Connection { server, load };
            connections.push(connection.clone());
            builder.insert(server, connection, *weight);
        }
        let mut rng = fastrand::Rng::with_seed(seed);
        let due = match callers {
            Callers::OpenLoop(period) => rng.u64(..period),
            Callers::ClosedLoop(_) => u64::MAX,
        };
        let mut simulation = Self {
            servers: servers.to_vec(),
            callers,
            connections,
            latencies,
            set: builder.freeze(),
            picker: Picker::new(policy, Some(seed)),
            rng,
            ended: vec![0; servers.len()],
            running: BinaryHeap::new(),
            due,
            refresh_at: REFRESH,
            epoch: Instant::now(),
        };
        if let Callers::ClosedLoop(callers) = callers {
            for _ in 0..callers {
                simulation.start(0);
            }
        }
        simulation
    }

    /// Runs until the next call starts. Returns the time in microseconds, and the server that gets the call.
    pub(super) fn next_call(&mut self) -> (u64, usize) {
        loop {
            let end = self
                .running
                .peek()
                .map_or(u64::MAX, |Reverse((end, ..))| *end);
            let now = end.min(self.due).min(self.refresh_at);
            if now == self.refresh_at {
                self.refresh(now);
                continue;
            }
            if now == end {
                self.end(now);
            }
            match self.callers {
                Callers::OpenLoop(period) if now == self.due => self.due += period,
                Callers::ClosedLoop(_) => {}
                Callers::OpenLoop(_) => continue,
            }
            return (now, self.start(now));
        }
    }

    /// Returns the share of [`CALLS`] calls that each server gets. The first fifth of the calls is not counted.
    fn shares(mut self) -> Vec<f64> {
        for _ in 0..CALLS / 5 {
            self.next_call();
        }
        let counted = CALLS - CALLS / 5;
        let mut calls = vec![0; self.servers.len()];
        for _ in 0..counted {
            calls[self.next_call().1] += 1;
        }
        let share = |calls| f64::from(calls) / f64::from(counted);
        calls.into_iter().map(share).collect()
    }

    fn start(&mut self, now: u64) -> usize {
        let Pick::Taken(connection) = self.picker.pick(&self.set, |_| true, SCAN_LIMIT) else {
            panic!("a connection without a limit should take the call");
        };
        let index = connection.server;
        let server = &self.servers[index];
        let others = connection.load.in_flight() - 1;
        let idle = if others == 0 {
            now - self.ended[index]
        } else {
            0
        };
        let idle = Duration::from_micros(idle).as_secs_f64().min(1.0);
        let slower =
            (1.0 + server.queueing * f64::from(others)) * (1.0 + server.idle_penalty * idle);
        let noise = 0.8 + 0.4 * self.rng.f64();
        let service_time_us = if self.rng.f64() < server.expensive_share {
            EXPENSIVE_US
        } else {
            server.service_time_us
        };
        let took = Duration::from_secs_f64(service_time_us * slower * noise / 1e6);
        let end = now + u64::try_from(took.as_micros()).expect("fits into 64 bits");
        self.running.push(Reverse((end, index, now)));
        index
    }

    fn end(&mut self, now: u64) {
        let Some(Reverse((_, index, start))) = self.running.pop() else {
            return;
        };
        let load = &self.connections[index].load;
        load.release();
        load.on_head(Duration::from_micros(now - start), self.ticks(now));
        self.ended[index] = now;
    }

    /// Updates the estimates as the driver does.
    fn refresh(&mut self, now: u64) {
        let ticks = self.ticks(now);
        let loads = || self.connections.iter().map(|connection| &*connection.load);
        let in_use = self.latencies.refresh(loads(), loads(), ticks);
        self.refresh_at = now + if in_use { REFRESH } else { IDLE_REFRESH };
    }

    fn ticks(&self, now: u64) -> Ticks {
        Ticks::at(self.epoch + Duration::from_micros(now), self.epoch)
    }
}

/// The refresh intervals of the driver, in microseconds.
const REFRESH: u64 = 200_000;
const IDLE_REFRESH: u64 = 2_000_000;
const CALLS: u32 = 10_000;
/// The time of an expensive call to an idle server, in microseconds.
const EXPENSIVE_US: f64 = 50_000.0;

const CALLERS: [Callers; 10] = [
    Callers::OpenLoop(1_000),
    Callers::OpenLoop(20_000),
    Callers::OpenLoop(200_000),
    Callers::ClosedLoop(1),
    Callers::ClosedLoop(2),
    Callers::ClosedLoop(3),
    Callers::ClosedLoop(4),
    Callers::ClosedLoop(6),
    Callers::ClosedLoop(16),
    Callers::ClosedLoop(64),
];

/// Asserts, for every pattern of callers, that each of two servers gets a share of the calls in proportion to its weight, to within three
/// percentage points.
fn assert_fair(policy: LbPolicy, servers: [Server; 2]) {
    let weights = servers.map(|server| f64::from(server.weight));
    let fair = weights[1] / (weights[0] + weights[1]);
    for callers in CALLERS {
        let share = Simulation::new(policy, &servers, callers, 7).shares()[1];
        println!("{weights:?}, {callers:?}: share {share:.3}, fair {fair:.3}");
        assert!(
            (share - fair).abs() < 0.03,
            "{callers:?}: share {share} instead of {fair}, {servers:?}"
        );
    }
}

#[test]
fn equal_servers_get_shares_by_weight_for_every_arrival_pattern() {
    for policy in [LbPolicy::Latency, LbPolicy::LeastRequest] {
        for (heavy, light) in [(100, 30), (10, 1), (3, 2), (2, 1)] {
            assert_fair(
                policy,
                [heavy, light].map(|weight| Server { weight, ..EQUAL }),
            );
        }
    }
}

#[test]
fn a_rarely_called_cold_server_keeps_its_share() {
    // A call to a server that was idle for a second takes eleven times as long as without idleness. With one call every 20 ms and the
    // weights 100 and 30, a call to the server with the smaller weight takes about one and a half times as long as a call to the other
    // server.
    let cold = Server {
        idle_penalty: 10.0,
        ..EQUAL
    };
    for (heavy, light) in [(100, 30), (3, 2), (2, 1)] {
        let servers = [heavy, light].map(|weight| Server { weight, ..cold });
        assert_fair(LbPolicy::Latency, servers);
    }
}

#[test]
fn a_slow_server_is_avoided_at_every_weight() {
    let fast = Server {
        service_time_us: 1_000.0,
        ..EQUAL
    };
    let slow = Server {
        service_time_us: 50_000.0,
        ..EQUAL
    };
    for (heavy, light) in [(1, 1), (100, 30), (30, 100), (1, 9)] {
        let others = Server {
            weight: heavy,
            ..fast
        };
        let servers = [
            others,
            Server {
                weight: light,
                ..slow
            },
            others,
            others,
        ];
        for callers in [
            Callers::OpenLoop(2_000),
            Callers::ClosedLoop(4),
            Callers::ClosedLoop(32),
        ] {
            let share = Simulation::new(LbPolicy::Latency, &servers, callers, 7).shares()[1];
            assert!(share < 0.01, "{callers:?}: share {share}, {servers:?}");
        }
    }
}
