//! A simulated server, and calls that arrive at random times. Times are in microseconds.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::limit::gradient::{Bounds, End, Gradient};
use crate::limit::window::Accepted;

/// The bounds of `AdaptiveLimitLayer::new`.
pub(super) const DEFAULT_BOUNDS: Bounds = Bounds {
    min: 1,
    max: 10_000,
};

/// The distribution of the service times.
#[derive(Clone, Copy, Debug)]
pub(super) enum Distribution {
    /// The times differ by a tenth.
    Narrow,
    Exponential,
    /// One of seven calls takes ten times as long as the others.
    Bimodal,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Simulation {
    pub(super) workers: usize,
    /// The mean time that a worker needs for a call.
    pub(super) service: u64,
    pub(super) distribution: Distribution,
    /// The rates of the calls that need a worker, relative to the capacity, one after the other.
    pub(super) loads: &'static [f64],
    /// Of ten calls, so many fail after 20 µs without a worker. They arrive in addition to the load.
    pub(super) rejected: u64,
    /// The time after which a call is dropped.
    pub(super) deadline: Option<u64>,
    pub(super) disturbance: Disturbance,
    pub(super) seconds: u64,
}

/// Calls that are slow without a queue, for example because of a slow database. They begin in the sixth second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Disturbance {
    None,
    /// All calls take this number of times as long.
    Slower(u64),
    /// This percentage of the calls takes ten times as long.
    SlowShare(u64),
    /// All calls take ten times as long for one and a half seconds.
    Stall,
    /// From the start, the process stops for this number of microseconds every second, as for a garbage collection. The calls that arrive
    /// then are accepted afterwards, all at once.
    Pauses(u64),
    /// From the start, this percentage of the calls is dropped after a fifth of the service time.
    EarlyDrops(usize),
}

/// The outcome after the first quarter of the time.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The calls that succeed, relative to the capacity.
    pub(super) goodput: f64,
    pub(super) p99: Duration,
    /// The refused calls, from the start.
    pub(super) refused: usize,
    /// The refused calls after the first quarter of the time.
    pub(super) refused_later: usize,
    /// The limit that the calls of the last second see.
    pub(super) limit: f64,
    /// The smallest limit that is not that of a probe.
    pub(super) smallest_limit: usize,
    /// The seconds in which the controller begins to measure the baseline.
    pub(super) probes: Vec<u64>,
}

/// The time at which a call may end, the call, the time at which it began, and how it ends.
type Ending = (u64, usize, u64, Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Rejected,
    Served,
    /// The deadline passes. If the call still waits for a worker, it ends.
    Deadline,
}

struct Run {
    simulation: Simulation,
    random: fastrand::Rng,
    origin: Instant,
    gradient: Gradient,
    accepted: Vec<Accepted>,
    arrivals: Vec<u64>,
    in_flight: usize,
    busy: usize,
    queue: VecDeque<usize>,
    endings: BinaryHeap<Reverse<Ending>>,
    latencies: Vec<u64>,
    limits: Vec<usize>,
    smallest_limit: usize,
    is_probing: bool,
    probes: Vec<u64>,
    refused: usize,
    refused_later: usize,
}

impl Simulation {
    /// A server at twice its capacity.
    pub(super) fn overloaded(workers: usize, service: Duration) -> Self {
        Self {
            workers,
            service: u64::try_from(service.as_micros()).unwrap(),
            distribution: Distribution::Narrow,
            loads: &[2.0],
            rejected: 0,
            deadline: None,
            disturbance: Disturbance::None,
            seconds: 60,
        }
    }

    /// Runs the server with the controller.
    pub(super) fn run(self, bounds: Bounds, seed: u64) -> Outcome {
        let origin = Instant::now();
        let mut run = Run {
            simulation: self,
            random: fastrand::Rng::with_seed(seed),
            origin,
            gradient: Gradient::new(bounds, origin),
            accepted: Vec::new(),
            arrivals: Vec::new(),
            in_flight: 0,
            busy: 0,
            queue: VecDeque::new(),
            endings: BinaryHeap::new(),
            latencies: Vec::new(),
            limits: Vec::new(),
            smallest_limit: usize::MAX,
            is_probing: false,
            probes: Vec::new(),
            refused: 0,
            refused_later: 0,
        };
        let outcome = run.run();
        println!("seed {seed}, {self:?}: {outcome:?}");
        outcome
    }

    fn capacity(self) -> f64 {
        as_f64(self.workers) * 1e6 / as_f64(self.service)
    }
}

impl Run {
    fn run(&mut self) -> Outcome {
        let end = self.simulation.seconds * 1_000_000;
        let warm = end / 4;
        let rejected = as_f64(self.simulation.rejected);
        let capacity = self.simulation.capacity() * 10.0 / (10.0 - rejected);
        let loads = self.simulation.loads;
        let phase = end / u64::try_from(loads.len()).unwrap();
        let mut now = 0;
        while now < end {
            while let Some(Reverse(ending)) = self.endings.peek().copied()
                && ending.0 <= now
            {
                self.endings.pop();
                self.end(ending, warm);
            }
            self.arrive(self.running(now), warm);
            let load = loads[usize::try_from(now / phase).unwrap()];
            now += self.exponential(1e6 / (load * capacity)).max(1);
        }
        self.outcome(end - warm)
    }

    fn arrive(&mut self, now: u64, warm: u64) {
        let limit = self.gradient.limit();
        if !self.gradient.is_probing() {
            self.smallest_limit = self.smallest_limit.min(limit);
        }
        if now + 1_000_000 >= self.simulation.seconds * 1_000_000 {
            self.limits.push(limit);
        }
        if self.in_flight >= limit {
            self.refused += 1;
            self.refused_later += usize::from(now > warm);
            let accepted = self.accepted.len();
            self.gradient.on_refusal(self.at(now), accepted);
            return;
        }
        self.in_flight += 1;
        let number = self.accepted.len();
        self.accepted.push(Accepted {
            number,
            at: self.at(now),
            in_flight: self.in_flight,
        });
        self.arrivals.push(now);
        if self.random.u64(0..10) < self.simulation.rejected {
            self.endings
                .push(Reverse((now + 20, number, now, Kind::Rejected)));
        } else if self.busy < self.simulation.workers {
            self.serve(number, now);
        } else {
            self.queue.push_back(number);
            let deadline = now + self.deadline(number);
            self.endings
                .push(Reverse((deadline, number, now, Kind::Deadline)));
        }
    }

    fn serve(&mut self, number: usize, now: u64) {
        self.busy += 1;
        let end = now + self.disturbed(now);
        let end = self.running(end);
        let deadline = self.arrivals[number] + self.deadline(number);
        let ending = (
            end.min(deadline).max(now),
            number,
            self.arrivals[number],
            Kind::Served,
        );
        self.endings.push(Reverse(ending));
    }

    /// Returns the time for which a worker serves the next call.
    fn disturbed(&mut self, now: u64) -> u64 {
        let service = self.service();
        match self.simulation.disturbance {
            Disturbance::Slower(factor) if now > 5_000_000 => service * factor,
            Disturbance::SlowShare(percent)
                if now > 5_000_000 && self.random.u64(0..100) < percent =>
            {
                service * 10
            }
            Disturbance::Stall if (5_000_000..6_500_000).contains(&now) => service * 10,
            _ => service,
        }
    }

    /// Returns the time at which the process does what it has to do at a time.
    fn running(&self, now: u64) -> u64 {
        let time = now % 1_000_000;
        match self.simulation.disturbance {
            Disturbance::Pauses(pause) if time < pause => now + pause - time,
            _ => now,
        }
    }

    /// Returns the time after which a call is dropped.
    fn deadline(&self, number: usize) -> u64 {
        match self.simulation.disturbance {
            // 61 has no common factor with 100, so the calls are spread evenly.
            Disturbance::EarlyDrops(percent) if number * 61 % 100 < percent => {
                self.simulation.service / 5
            }
            // Timers are late by up to a millisecond.
            _ => self.simulation.deadline.map_or(u64::MAX / 2, |deadline| {
                deadline + u64::try_from(number * 619 % 1_000).unwrap()
            }),
        }
    }

    fn end(&mut self, (now, number, arrival, kind): Ending, warm: u64) {
        if kind == Kind::Deadline {
            if let Some(position) = self.queue.iter().position(|call| *call == number) {
                self.queue.remove(position);
                self.finish(number, End::Overrun, now);
            }
            return;
        }
        let latency = now - arrival;
        let end = if kind == Kind::Rejected {
            End::Unsampled
        } else if latency >= self.deadline(number) {
            End::Overrun
        } else {
            End::Success
        };
        if end == End::Success && now > warm {
            self.latencies.push(latency);
        }
        self.finish(number, end, now);
        if kind == Kind::Served {
            self.busy -= 1;
            if let Some(next) = self.queue.pop_front() {
                self.serve(next, now);
            }
        }
    }

    fn finish(&mut self, number: usize, end: End, now: u64) {
        self.in_flight -= 1;
        let now = self.at(now);
        let accepted = self.accepted.len();
        self.gradient
            .on_end(&self.accepted[number], end, now, accepted);
        if self.gradient.is_probing() && !self.is_probing {
            let time = now.saturating_duration_since(self.origin);
            self.probes.push(time.as_secs());
        }
        self.is_probing = self.gradient.is_probing();
    }

    fn outcome(&mut self, measured: u64) -> Outcome {
        let successes = as_f64(u64::try_from(self.latencies.len()).unwrap());
        let seconds = as_f64(measured) / 1e6;
        Outcome {
            goodput: successes / seconds / self.simulation.capacity(),
            p99: Duration::from_micros(p99(&mut self.latencies).unwrap_or(0)),
            refused: self.refused,
            refused_later: self.refused_later,
            limit: as_f64(self.limits.iter().sum::<usize>()) / as_f64(self.limits.len()),
            smallest_limit: self.smallest_limit,
            probes: self.probes.clone(),
        }
    }

    fn service(&mut self) -> u64 {
        let service = self.simulation.service;
        match self.simulation.distribution {
            Distribution::Narrow => service * self.random.u64(90..=110) / 100,
            Distribution::Exponential => self.exponential(as_f64(service)),
            // The mean is 16/7 of the time of a fast call.
            Distribution::Bimodal if self.random.u64(0..7) == 0 => service * 70 / 16,
            Distribution::Bimodal => service * 7 / 16,
        }
    }

    fn exponential(&mut self, mean: f64) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "small positive numbers"
        )]
        let time = (-(1.0 - self.random.f64()).ln() * mean) as u64;
        time
    }

    fn at(&self, micros: u64) -> Instant {
        self.origin + Duration::from_micros(micros)
    }
}

fn p99(values: &mut [u64]) -> Option<u64> {
    values.sort_unstable();
    values.get(values.len() * 99 / 100).copied()
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn as_f64(number: impl TryInto<u64>) -> f64 {
    number.try_into().unwrap_or(u64::MAX) as f64
}
