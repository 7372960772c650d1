//! The load that a client process makes, and the line in which it reports the result. The client in Go does the same in `go/client.go`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use tokio::time::Instant;

/// Makes one call at a time.
pub trait Caller: Clone + Send + 'static {
    /// Makes a call with the name given. Returns whether the call succeeded.
    fn call(&mut self, name: String) -> impl Future<Output = bool> + Send;
}

/// The load of one client process.
#[derive(Clone, Copy)]
pub struct Load {
    pub callers: usize,
    /// The size of the name in a request, in bytes.
    pub size: usize,
    /// The time before the measurement, in which the client also connects.
    pub warm_up: Duration,
    /// The time of the measurement.
    pub duration: Duration,
    /// The time from one call of a caller to the next. If it is zero, a caller makes a call as soon as its last call has ended.
    pub period: Duration,
}

impl Load {
    /// Returns the arguments from which [`parse`](Self::parse) makes the load.
    #[allow(
        dead_code,
        reason = "only the program that starts the clients writes the arguments"
    )]
    pub fn args(&self) -> [String; 5] {
        [
            self.callers.to_string(),
            self.size.to_string(),
            self.warm_up.as_millis().to_string(),
            self.duration.as_millis().to_string(),
            self.period.as_micros().to_string(),
        ]
    }

    pub fn parse(args: &[String]) -> Self {
        let numbers: Vec<u64> = args.iter().map(|arg| arg.parse().unwrap()).collect();
        let [callers, size, warm_up, duration, period] = numbers[..] else {
            panic!("five numbers are required: {args:?}");
        };
        Self {
            callers: callers as usize,
            size: size as usize,
            warm_up: Duration::from_millis(warm_up),
            duration: Duration::from_millis(duration),
            period: Duration::from_micros(period),
        }
    }

    /// Makes the calls. Prints a line when the measurement begins, and the result when it ends: calls, failed calls, CPU time of the
    /// program, CPU time of the kernel, and the 50th, 99th and 99.9th percentile of the latency. Times are in microseconds.
    pub async fn run<C: Caller>(self, caller: C) {
        let flags = Arc::new(Flags::default());
        let callers: Vec<_> = (0..self.callers)
            .map(|index| tokio::spawn(self.calls(index, caller.clone(), Arc::clone(&flags))))
            .collect();
        tokio::time::sleep(self.warm_up).await;
        println!("measuring");
        let before = cpu();
        flags.counting.store(true, Ordering::Relaxed);
        tokio::time::sleep(self.duration).await;
        flags.counting.store(false, Ordering::Relaxed);
        let after = cpu();
        let [user, system] = [after.0 - before.0, after.1 - before.1];
        flags.stop.store(true, Ordering::Relaxed);
        let (mut calls, mut failed, mut latencies) = (0, 0, Vec::new());
        for caller in callers {
            let counted = caller.await.unwrap();
            calls += counted.calls;
            failed += counted.failed;
            latencies.extend(counted.latencies);
        }
        latencies.sort_unstable();
        let percentile = |share: f64| {
            let index = (latencies.len() as f64 * share) as usize;
            latencies
                .get(index.min(latencies.len().saturating_sub(1)))
                .copied()
                .unwrap_or(0)
        };
        println!(
            "{calls} {failed} {} {} {} {} {}",
            user.as_micros(),
            system.as_micros(),
            percentile(0.5),
            percentile(0.99),
            percentile(0.999),
        );
    }

    async fn calls<C: Caller>(self, index: usize, mut caller: C, flags: Arc<Flags>) -> Counted {
        let name = "x".repeat(self.size);
        let mut counted = Counted::default();
        // The first turns of the callers are spread over the period. Otherwise all calls would be made at the same time.
        let first = self.period * index as u32 / self.callers as u32;
        tokio::time::sleep(first).await;
        let mut turns = (!self.period.is_zero()).then(|| tokio::time::interval(self.period));
        while !flags.stop.load(Ordering::Relaxed) {
            if let Some(turns) = &mut turns {
                turns.tick().await;
            }
            let start = Instant::now();
            let succeeded = caller.call(name.clone()).await;
            if !flags.counting.load(Ordering::Relaxed) {
                continue;
            }
            counted.calls += 1;
            if succeeded {
                let took = Instant::now().saturating_duration_since(start);
                counted.latencies.push(took.as_micros() as u32);
            } else {
                counted.failed += 1;
            }
        }
        counted
    }
}

#[derive(Default)]
struct Flags {
    counting: AtomicBool,
    stop: AtomicBool,
}

/// What one caller counts during the measurement.
#[derive(Default)]
struct Counted {
    calls: u64,
    failed: u64,
    /// Latencies in microseconds.
    latencies: Vec<u32>,
}

/// Returns the CPU time that the operating system accounts to this process: that of its own code, and that of the kernel on its behalf.
fn cpu() -> (Duration, Duration) {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let duration = |time: nix::sys::time::TimeVal| {
        Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()) as u64)
    };
    (duration(usage.user_time()), duration(usage.system_time()))
}
