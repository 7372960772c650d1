//! A bounded load: a number of calls, at a limited rate, for a limited time.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::arguments::CallArguments;
use super::command::Call;
use super::latencies::Latencies;
use crate::error::{Failure, code};
use crate::escape::escaped;
use crate::output::Output;
use crate::probe::millis;

/// What the calls have returned.
#[derive(Debug, Default)]
struct Summary {
    latencies: Vec<Duration>,
    servers: BTreeMap<String, u64>,
    failures: BTreeMap<String, u64>,
}

pub(super) async fn run(
    call: Call,
    arguments: &CallArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let start = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut callers = JoinSet::new();
    for _ in 0..arguments.concurrency {
        let schedule = Schedule {
            next: Arc::clone(&next),
            calls: arguments.load.unwrap_or(1),
            rate: arguments.rate,
            start,
            end: start + arguments.duration,
        };
        callers.spawn(caller(call.clone(), schedule));
    }
    let mut summary = Summary::default();
    for part in callers.join_all().await {
        summary.add(part);
    }
    let elapsed = Instant::now().saturating_duration_since(start);
    summary.print(elapsed, output)?;
    Ok(if summary.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(code::NEGATIVE)
    })
}

/// The times of the calls, which all callers share.
struct Schedule {
    next: Arc<AtomicU64>,
    calls: u64,
    rate: u32,
    start: Instant,
    end: Instant,
}

impl Schedule {
    /// Returns the time of the next call; `None` if there is none.
    fn next(&self) -> Option<Instant> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        if index >= self.calls {
            return None;
        }
        let nanos = u128::from(index) * 1_000_000_000 / u128::from(self.rate);
        let after = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let time = self.start.checked_add(after)?;
        (time < self.end && Instant::now() < self.end).then_some(time)
    }
}

async fn caller(call: Call, schedule: Schedule) -> Summary {
    let mut summary = Summary::default();
    while let Some(time) = schedule.next() {
        sleep_until(time).await;
        let result = call.send().await;
        match result.outcome {
            Ok(_) => {
                // The latency counts from the time in the schedule. Otherwise a slow server would delay the next calls, and these delays
                // would be missing in the percentiles.
                let latency = Instant::now().saturating_duration_since(time);
                summary.latencies.push(latency);
            }
            Err(status) => {
                let text = format!("{:?}: {}", status.code(), status.message());
                *summary.failures.entry(text).or_default() += 1;
            }
        }
        let server = result.server.unwrap_or_else(|| "no server".to_owned());
        *summary.servers.entry(server).or_default() += 1;
    }
    summary
}

impl Summary {
    fn add(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        for (server, calls) in other.servers {
            *self.servers.entry(server).or_default() += calls;
        }
        for (failure, calls) in other.failures {
            *self.failures.entry(failure).or_default() += calls;
        }
    }

    fn print(&self, elapsed: Duration, output: &mut Output) -> Result<(), Failure> {
        let latencies = Latencies::new(self.latencies.clone());
        let calls: u64 = self.servers.values().sum();
        let percentiles: Vec<_> = [50.0, 90.0, 99.0, 99.9, 100.0]
            .into_iter()
            .filter_map(|percent| Some((percent, latencies.percentile(percent)?)))
            .collect();
        if output.is_json() {
            let percentiles: BTreeMap<_, _> = percentiles
                .iter()
                .map(|(percent, latency)| (percent.to_string(), latency.as_secs_f64() * 1_000.0))
                .collect();
            output.json(&json!({
                "calls": calls,
                "seconds": elapsed.as_secs_f64(),
                "latency_ms": percentiles,
                "servers": self.servers,
                "failures": self.failures,
            }))?;
            return Ok(());
        }
        output.line(&format!("{calls} calls in {:.2} s", elapsed.as_secs_f64()))?;
        for (percent, latency) in percentiles {
            output.line(&format!("  {percent:>5} %  {}", millis(latency)))?;
        }
        let histogram = latencies.histogram();
        let most = histogram.iter().map(|(_, count)| *count).max().unwrap_or(1);
        for (limit, count) in histogram {
            let bar = "#".repeat((count * BAR_WIDTH).div_ceil(most.max(1)));
            output.line(&format!("  <= {:>12} {count:>8} {bar}", millis(limit)))?;
        }
        for (server, calls) in &self.servers {
            output.line(&format!("  {}: {calls} calls", escaped(server)))?;
        }
        for (failure, calls) in &self.failures {
            output.line(&format!("  failed {calls} times: {}", escaped(failure)))?;
        }
        Ok(())
    }
}

const BAR_WIDTH: usize = 40;
