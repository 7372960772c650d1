//! Many clients and their servers in virtual time. The channels of all clients share the servers, and each channel has its own estimates.
//! A server has a number of workers and one queue.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use tokio::time::Instant;

use super::client::{Client, Policy, Response};
use super::faults::{FAILURE_TIME, Fault, SECOND, WORKERS};
use crate::balance::estimate::Ticks;
use crate::load_report::OrcaLoadReport;

/// How the callers of each client make calls. Times are in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Callers {
    /// A call starts after a random time since the start of the previous one. The value is the mean time.
    EachAfter(u64),
    /// Each of this number of callers starts a call when its previous call has ended.
    Closed(u32),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) fault: Fault,
    pub(super) servers: usize,
    pub(super) clients: usize,
    pub(super) callers: Callers,
    pub(super) policy: Policy,
    pub(super) seed: u64,
    /// The time before the measurement, and the measured time, in microseconds.
    pub(super) warm_up: u64,
    pub(super) time: u64,
}

impl Case {
    fn end(&self) -> u64 {
        self.warm_up + self.time
    }

    /// Returns whether the calls need more than two thirds of the workers: the queues of the servers would hide the policies.
    pub(super) fn is_overload(&self) -> bool {
        let busy = match self.callers {
            Callers::EachAfter(period) => {
                self.clients as u64 * self.fault.service_time(1, 0) / period
            }
            Callers::Closed(callers) => self.clients as u64 * u64::from(callers),
        };
        let workers = |server| self.fault.workers(server).min(WORKERS);
        let workers: usize = (0..self.servers).map(workers).sum();
        busy * 3 > workers as u64 * 2
    }
}

/// What the callers of all clients have observed.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) calls: usize,
    pub(super) failed: usize,
    /// The share of the calls at a server that was slow, failing or weak when the call was sent.
    pub(super) bad: f64,
    /// The latencies of the calls that did not fail, sorted, in microseconds.
    latencies: Vec<u64>,
}

impl Outcome {
    /// Returns a percentile of the latencies, in milliseconds.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index of a short list"
    )]
    pub(super) fn percentile(&self, share: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        let index = ((self.latencies.len() as f64 * share) as usize).min(last);
        self.latencies.get(index).copied().unwrap_or_default() as f64 / 1_000.0
    }
}

struct Server {
    /// When each worker is idle.
    workers: BinaryHeap<Reverse<u64>>,
    in_flight: u32,
    /// The calls that have ended since the last report, those of them that failed, and the time of their workers in microseconds.
    ended: u32,
    failed: u32,
    busy: u32,
    report: OrcaLoadReport,
}

impl Server {
    fn new(workers: usize) -> Self {
        Self {
            workers: std::iter::repeat_n(Reverse(0), workers).collect(),
            in_flight: 0,
            ended: 0,
            failed: 0,
            busy: 0,
            report: OrcaLoadReport::default(),
        }
    }

    /// Computes the report for the responses of the next second, as the server of `benches/policies` does.
    fn update_report(&mut self) {
        let workers = u32::try_from(self.workers.len()).expect("few workers");
        let utilization = f64::from(self.busy) / 1e6 / f64::from(workers);
        self.report = OrcaLoadReport {
            application_utilization: utilization.max(LEAST_UTILIZATION),
            rps_fractional: f64::from(self.ended),
            eps: f64::from(self.failed),
            ..OrcaLoadReport::default()
        };
        (self.ended, self.failed, self.busy) = (0, 0, 0);
    }
}

/// What happens at a time. The order of the variants has no meaning; it makes the queue of events total.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Start {
        client: usize,
    },
    End {
        client: usize,
        server: usize,
        start: u64,
        /// The time of the worker.
        busy: u32,
        failed: bool,
    },
    Refresh {
        client: usize,
    },
    Reweigh {
        client: usize,
    },
    /// The servers compute their reports.
    Report,
}

pub(super) struct World {
    case: Case,
    clients: Vec<Client>,
    servers: Vec<Server>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    /// Makes the order of simultaneous events that of their creation.
    created: u64,
    rng: fastrand::Rng,
    epoch: Instant,
}

/// The refresh intervals of the driver.
const REFRESH: u64 = 200_000;
const IDLE_REFRESH: u64 = 2_000_000;
/// An idle server also uses some of its capacity.
const LEAST_UTILIZATION: f64 = 0.001;

impl World {
    pub(super) fn new(case: Case) -> Self {
        let mut rng = fastrand::Rng::with_seed(case.seed);
        let server = |server| Server::new(case.fault.workers(server));
        let mut world = Self {
            clients: (0..case.clients)
                .map(|_| Client::new(case.policy, case.servers, rng.u64(..)))
                .collect(),
            servers: (0..case.servers).map(server).collect(),
            events: BinaryHeap::new(),
            created: 0,
            rng,
            epoch: Instant::now(),
            case,
        };
        for client in 0..case.clients {
            let at = world.rng.u64(..REFRESH);
            world.push(at, Event::Refresh { client });
            let (callers, within) = match case.callers {
                Callers::EachAfter(period) => (1, period),
                Callers::Closed(callers) => (callers, case.fault.service_time(0, 0)),
            };
            for _ in 0..callers {
                let at = world.rng.u64(..within);
                world.push(at, Event::Start { client });
            }
            if case.policy.reweighs() {
                world.push(SECOND + at, Event::Reweigh { client });
            }
        }
        if case.policy.reweighs() {
            world.push(SECOND, Event::Report);
        }
        world
    }

    fn push(&mut self, at: u64, event: Event) {
        self.created += 1;
        self.events.push(Reverse((at, self.created, event)));
    }

    fn instant(&self, now: u64) -> Instant {
        self.epoch + Duration::from_micros(now)
    }

    fn ticks(&self, now: u64) -> Ticks {
        Ticks::at(self.instant(now), self.epoch)
    }

    pub(super) fn run(mut self) -> Outcome {
        let mut outcome = Outcome {
            calls: 0,
            failed: 0,
            bad: 0.0,
            latencies: Vec::new(),
        };
        let mut bad = 0_u32;
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            // Calls that are in flight at the end are counted as well: the slowest calls are among them.
            if now >= self.case.end() && !matches!(event, Event::End { .. }) {
                continue;
            }
            match event {
                Event::Start { client } => {
                    let server = self.start(client, now);
                    if now >= self.case.warm_up {
                        outcome.calls += 1;
                        bad += u32::from(self.case.fault.is_bad(server, now));
                    }
                }
                Event::End {
                    client,
                    server,
                    start,
                    busy,
                    failed,
                } => {
                    self.servers[server].busy += busy;
                    let elapsed = Duration::from_micros(now - start);
                    self.end(client, server, elapsed, failed, now);
                    if start >= self.case.warm_up {
                        outcome.failed += usize::from(failed);
                        if !failed {
                            outcome.latencies.push(now - start);
                        }
                    }
                }
                Event::Refresh { client } => {
                    let ticks = self.ticks(now);
                    let in_use = self.clients[client].refresh(ticks);
                    let next = now + if in_use { REFRESH } else { IDLE_REFRESH };
                    self.push(next, Event::Refresh { client });
                }
                Event::Reweigh { client } => {
                    let instant = self.instant(now);
                    self.clients[client].reweigh(instant);
                    self.push(now + SECOND, event);
                }
                Event::Report => {
                    self.servers.iter_mut().for_each(Server::update_report);
                    self.push(now + SECOND, event);
                }
            }
        }
        outcome.latencies.sort_unstable();
        let calls = u32::try_from(outcome.calls.max(1)).expect("fewer than 2^32 calls");
        outcome.bad = f64::from(bad) / f64::from(calls);
        outcome
    }

    /// Starts a call, and returns its server.
    fn start(&mut self, client: usize, now: u64) -> usize {
        let fault = self.case.fault;
        let index = self.clients[client].pick();
        let server = &mut self.servers[index];
        server.in_flight += 1;
        let failed = fault.fails(index);
        let (end, busy) = if failed {
            (now + FAILURE_TIME, 0)
        } else {
            let Reverse(idle) = server.workers.pop().expect("a server has workers");
            let begin = idle.max(now);
            let busy = fault.service_time(index, begin) * self.rng.u64(80..120) / 100;
            server.workers.push(Reverse(begin + busy));
            (begin + busy, u32::try_from(busy).expect("a short time"))
        };
        let ended = Event::End {
            client,
            server: index,
            start: now,
            busy,
            failed,
        };
        self.push(end, ended);
        if let Callers::EachAfter(period) = self.case.callers {
            let at = now + self.rng.u64(1..2 * period);
            self.push(at, Event::Start { client });
        }
        index
    }

    fn end(&mut self, client: usize, index: usize, elapsed: Duration, failed: bool, now: u64) {
        let (ticks, instant) = (self.ticks(now), self.instant(now));
        let server = &mut self.servers[index];
        let response = Response {
            server: index,
            elapsed,
            failed,
            in_flight: server.in_flight,
        };
        server.in_flight -= 1;
        server.ended += 1;
        server.failed += u32::from(failed);
        let channel = &mut self.clients[client];
        channel.on_response(&response, ticks);
        if self.case.policy.reweighs() {
            channel.on_report(index, &server.report, instant);
        }
        if matches!(self.case.callers, Callers::Closed(_)) && now < self.case.end() {
            self.push(now, Event::Start { client });
        }
    }
}
