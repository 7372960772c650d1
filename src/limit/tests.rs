//! The controller with a simulated server in virtual time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::gradient::{Bounds, Gradient};

const BOUNDS: Bounds = Bounds { min: 1, max: 1_000 };

/// A server with a number of workers, and calls that arrive at random times. Times are in microseconds.
struct Simulation {
    workers: usize,
    service: u64,
    /// The mean time between two calls.
    interval: u64,
    seconds: u64,
}

struct Outcome {
    accepted_per_second: f64,
    p99: Duration,
    limit: usize,
}

impl Simulation {
    /// Runs the server with the controller, and returns the outcome after the first half of the time.
    fn run(&self, seed: u64) -> Outcome {
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let origin = Instant::now();
        let at = |micros: u64| origin + Duration::from_micros(micros);
        let mut gradient = Gradient::new(BOUNDS, origin);
        let end = self.seconds * 1_000_000;
        let mut next_arrival = 0;
        // The ends of the calls that are being served, with their arrivals, and the calls that wait.
        let mut served = BinaryHeap::new();
        let mut queue = VecDeque::new();
        let mut latencies = Vec::new();
        while next_arrival < end {
            let next_end = served.peek().map(|Reverse((end, _))| *end);
            if let Some(now) = next_end.filter(|now| *now <= next_arrival) {
                let Some(Reverse((_, arrival))) = served.pop() else {
                    break;
                };
                gradient.on_end(at(arrival), at(now), served.len() + queue.len() + 1);
                if now > end / 2 {
                    latencies.push(now - arrival);
                }
                if let Some(waiting) = queue.pop_front() {
                    served.push(Reverse((now + self.service(&mut random), waiting)));
                }
                continue;
            }
            let now = next_arrival;
            next_arrival += self.gap(&mut random);
            if served.len() + queue.len() >= gradient.limit() {
                continue;
            }
            if served.len() < self.workers {
                served.push(Reverse((now + self.service(&mut random), now)));
            } else {
                queue.push_back(now);
            }
        }
        latencies.sort_unstable();
        let p99 = latencies[latencies.len() * 99 / 100];
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let accepted_per_second = latencies.len() as f64 / (self.seconds as f64 / 2.0);
        Outcome {
            accepted_per_second,
            p99: Duration::from_micros(p99),
            limit: gradient.limit(),
        }
    }

    /// The service time varies by a tenth.
    fn service(&self, random: &mut fastrand::Rng) -> u64 {
        self.service * random.u64(90..=110) / 100
    }

    /// The time to the next arrival of a Poisson process.
    fn gap(&self, random: &mut fastrand::Rng) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "small positive numbers"
        )]
        let gap = (-(1.0 - random.f64()).ln() * self.interval as f64) as u64;
        gap
    }
}

/// Eight workers and 10 ms: the capacity is 800 calls per second.
fn server(load: f64, seconds: u64) -> Simulation {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "small positive numbers"
    )]
    let interval = (1e6 / (800.0 * load)) as u64;
    Simulation {
        workers: 8,
        service: 10_000,
        interval,
        seconds,
    }
}

#[test]
fn a_server_at_twice_its_capacity_keeps_its_goodput_and_its_latency() {
    for seed in 0..20 {
        let outcome = server(2.0, 240).run(seed);
        let Outcome {
            accepted_per_second,
            p99,
            limit,
        } = outcome;
        println!("{accepted_per_second:.0} calls/s, p99 {p99:?}, limit {limit}");
        assert!(accepted_per_second >= 0.9 * 800.0);
        assert!(p99 <= Duration::from_millis(20));
    }
}

#[test]
fn a_server_below_its_capacity_refuses_nothing() {
    let outcome = server(0.5, 60).run(1);
    assert!(outcome.accepted_per_second >= 0.98 * 400.0);
}

/// Also if it has been idle, or has served other calls before.
#[test]
fn the_limit_follows_a_change_of_the_service_time() {
    let origin = Instant::now();
    let mut gradient = Gradient::new(BOUNDS, origin);
    let mut now = origin;
    for latency in [Duration::from_millis(1), Duration::from_millis(50)] {
        // The server is not loaded.
        for _ in 0..1_000 {
            let start = now;
            now += latency;
            gradient.on_end(start, now, 3);
        }
        assert_eq!(gradient.baseline(), Some(latency));
    }
}

#[test]
fn the_limit_stays_within_its_bounds() {
    let origin = Instant::now();
    let bounds = Bounds { min: 4, max: 40 };
    let mut gradient = Gradient::new(bounds, origin);
    let mut now = origin;
    for call in 0..100_000_u32 {
        let start = now;
        // The latency grows without end at first, and is then constant.
        now += Duration::from_micros(u64::from(call.min(50_000)));
        gradient.on_end(start, now, gradient.limit());
        assert!((4..=40).contains(&gradient.limit()));
    }
    assert_eq!(gradient.limit(), 40);
}
