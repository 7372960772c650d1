//! The calls of a server: how many are in flight, and their rates.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::cpu;

/// Counts the calls of a server.
///
/// The rates cover the last second. They are computed again with the first report after [`STEP`], so a server without calls needs no timer.
/// If calls are rare, the rates cover the time since the last computation, and so each call counts once.
///
/// The rates must not be much older than the utilization in the same report: a client divides the two (gRFC A58). If it divided the calls of
/// an earlier second by the current utilization, each change of the shares would be followed by a larger one in the opposite direction.
#[derive(Debug)]
pub(super) struct Traffic {
    in_flight: AtomicU32,
    ended: AtomicU64,
    failed: AtomicU64,
    rates: Rates,
    cpus: f64,
    started: Instant,
    /// The time of the next computation, in milliseconds since `started`.
    due: AtomicU64,
    history: Mutex<History>,
}

/// The rates as of the last computation, as the bits of `f64`. 0 in the first second.
#[derive(Debug, Default)]
struct Rates {
    calls: AtomicU64,
    failures: AtomicU64,
    cpu: AtomicU64,
}

/// The data from which the rates are computed.
#[derive(Debug)]
struct History {
    /// The counters at the times of the last computations, from the oldest. Never empty.
    counts: VecDeque<Counts>,
    /// The time at which the CPU time was read, and the CPU time.
    cpu: (Instant, Option<Duration>),
}

#[derive(Clone, Copy, Debug)]
struct Counts {
    at: Instant,
    ended: u64,
    failed: u64,
}

/// The numbers of a report.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) in_flight: u32,
    pub(super) calls_per_second: f64,
    pub(super) failures_per_second: f64,
    /// 0 if it is unknown.
    pub(super) cpu_utilization: f64,
}

impl Traffic {
    pub(super) fn new(now: Instant) -> Self {
        let none = Counts {
            at: now,
            ended: 0,
            failed: 0,
        };
        Self {
            in_flight: AtomicU32::new(0),
            ended: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            rates: Rates::default(),
            cpus: cpu::cpus(),
            started: now,
            due: AtomicU64::new(millis(STEP)),
            history: Mutex::new(History {
                counts: VecDeque::from([none]),
                cpu: (now, cpu::process_time()),
            }),
        }
    }

    pub(super) fn on_start(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn on_failure(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn on_end(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Returns the numbers of a report at `now`.
    pub(super) fn sample(&self, now: Instant) -> Sample {
        if millis(now.saturating_duration_since(self.started)) >= self.due.load(Ordering::Relaxed) {
            self.compute(now);
        }
        let rate = |rate: &AtomicU64| f64::from_bits(rate.load(Ordering::Relaxed));
        Sample {
            in_flight: self.in_flight(),
            calls_per_second: rate(&self.rates.calls),
            failures_per_second: rate(&self.rates.failures),
            cpu_utilization: rate(&self.rates.cpu),
        }
    }

    // Not inlined, because only a few reports per second need it.
    #[inline(never)]
    fn compute(&self, now: Instant) {
        // No call waits for the lock: the call that has it computes the rates.
        let Ok(mut history) = self.history.try_lock() else {
            return;
        };
        let counts = Counts {
            at: now,
            ended: self.ended.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        };
        let store = |to: &AtomicU64, rate: f64| to.store(rate.to_bits(), Ordering::Relaxed);
        if let Some((calls, failures)) = history.rates(counts) {
            store(&self.rates.calls, calls);
            store(&self.rates.failures, failures);
        }
        if let Some(used) = history.cpu_time(now) {
            store(&self.rates.cpu, used / self.cpus);
        }
        let due = now.saturating_duration_since(self.started) + STEP;
        self.due.store(millis(due), Ordering::Relaxed);
    }
}

impl History {
    /// Adds the current counters. Returns the calls and the failures per second, if they are known for at least [`SPAN`].
    fn rates(&mut self, now: Counts) -> Option<(f64, f64)> {
        let age = |counts: &Counts| now.at.saturating_duration_since(counts.at);
        while self.counts.get(1).is_some_and(|next| age(next) >= SPAN) {
            self.counts.pop_front();
        }
        let base = *self.counts.front()?;
        self.counts.push_back(now);
        let span = age(&base);
        let rate = |now: u64, before: u64| {
            let number = u32::try_from(now.saturating_sub(before)).unwrap_or(u32::MAX);
            f64::from(number) / span.as_secs_f64()
        };
        (span >= SPAN).then(|| (rate(now.ended, base.ended), rate(now.failed, base.failed)))
    }

    /// Returns the CPU time per second since the last result, if at least [`SPAN`] has passed.
    fn cpu_time(&mut self, now: Instant) -> Option<f64> {
        let (since, before) = self.cpu;
        let span = now.saturating_duration_since(since);
        if span < SPAN {
            return None;
        }
        self.cpu = (now, cpu::process_time());
        let used = self.cpu.1?.saturating_sub(before?);
        Some(used.as_secs_f64() / span.as_secs_f64())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The time that the rates cover. Over a shorter time, the CPU time would have too few ticks of 10 ms.
const SPAN: Duration = Duration::from_secs(1);
/// The time between two computations of the rates of the calls.
const STEP: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_cover_the_last_second() {
        let start = Instant::now();
        let traffic = Traffic::new(start);
        let end = |calls, failures| {
            for _ in 0..calls {
                traffic.on_start();
                traffic.on_end();
            }
            for _ in 0..failures {
                traffic.on_failure();
            }
        };
        let rates = |millis| {
            let sample = traffic.sample(start + Duration::from_millis(millis));
            (sample.calls_per_second, sample.failures_per_second)
        };
        end(10, 3);
        assert_eq!(rates(100), (0.0, 0.0), "the first second has not ended");
        assert_eq!(rates(1_000), (10.0, 3.0));
        end(1, 0);
        assert_eq!(rates(1_200), (10.0, 3.0), "the next step has not begun");
        assert_eq!(rates(1_250), (8.8, 2.4));
        assert_eq!(rates(2_000), (1.0, 0.0));
    }

    #[test]
    fn the_rates_of_rare_calls_cover_the_time_between_them() {
        let start = Instant::now();
        let traffic = Traffic::new(start);
        for call in 1..10 {
            traffic.on_start();
            traffic.sample(start + Duration::from_secs(10 * call));
            traffic.on_end();
        }
        let sample = traffic.sample(start + Duration::from_secs(100));
        assert!((sample.calls_per_second - 0.1).abs() < f64::EPSILON);
    }

    #[test]
    fn the_history_is_bounded() {
        let start = Instant::now();
        let traffic = Traffic::new(start);
        for millis in 0..10_000 {
            traffic.sample(start + Duration::from_millis(millis));
        }
        let history = traffic.history.lock().expect("no panic");
        assert!(history.counts.len() <= 6, "{history:?}");
    }

    #[test]
    fn calls_are_in_flight_until_they_end() {
        let traffic = Traffic::new(Instant::now());
        traffic.on_start();
        traffic.on_start();
        traffic.on_end();
        assert_eq!(traffic.in_flight(), 1);
    }
}
