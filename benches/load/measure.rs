//! Measures each peer in turn under the same load, and prints a comparison.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use tokio::time::Instant;
use tokio_stream::StreamExt;

use super::greeter::HelloRequest;
use super::greeter::greeter_client::GreeterClient;
use super::peers::{Peer, Target};

const ROUNDS: usize = 11;
/// A value of the usual length of a trace id.
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const ROUND: Duration = Duration::from_millis(800);

#[derive(Clone)]
pub struct Load {
    callers: usize,
    warm_up: Duration,
    kind: Kind,
    /// Whether unary calls have a deadline and three metadata entries.
    production: bool,
}

#[derive(Clone)]
enum Kind {
    Unary(HelloRequest),
    /// Unary calls of two durations in microseconds. On average, nine calls in ten take the first duration, and one call in ten takes the
    /// second.
    Mixed(u32, u32),
    ServerStreaming(HelloRequest),
    ClientStreaming(usize, HelloRequest),
    Bidi(usize, HelloRequest),
}

impl Load {
    fn new(callers: usize, kind: Kind) -> Self {
        Self {
            callers,
            warm_up: Duration::from_millis(200),
            kind,
            production: false,
        }
    }

    pub fn unary(callers: usize, request: HelloRequest) -> Self {
        Self::new(callers, Kind::Unary(request))
    }

    pub fn mixed(callers: usize, short: u32, long: u32) -> Self {
        Self::new(callers, Kind::Mixed(short, long))
    }

    pub fn server_streaming(callers: usize, messages: u32, size: usize) -> Self {
        Self::new(
            callers,
            Kind::ServerStreaming(HelloRequest {
                name: "x".repeat(size),
                replies: messages,
            }),
        )
    }

    pub fn client_streaming(callers: usize, messages: usize, size: usize) -> Self {
        Self::new(
            callers,
            Kind::ClientStreaming(
                messages,
                HelloRequest {
                    name: "x".repeat(size),
                    replies: 0,
                },
            ),
        )
    }

    pub fn bidi(callers: usize, messages: usize, size: usize) -> Self {
        Self::new(
            callers,
            Kind::Bidi(
                messages,
                HelloRequest {
                    name: "x".repeat(size),
                    replies: 0,
                },
            ),
        )
    }

    pub fn production(mut self) -> Self {
        self.production = true;
        self
    }

    pub fn warm_up(mut self, warm_up: Duration) -> Self {
        self.warm_up = warm_up;
        self
    }
}

/// Makes one call. Returns whether the latency of the call is recorded.
async fn call<S: Target>(
    client: &mut GreeterClient<S>,
    kind: &Kind,
    production: bool,
    rng: &mut fastrand::Rng,
) -> Result<bool, tonic::Status> {
    match kind {
        Kind::Unary(request) if production => {
            let mut request = tonic::Request::new(request.clone());
            request.set_timeout(Duration::from_secs(5));
            let metadata = request.metadata_mut();
            metadata.insert("x-request-id", TRACE.parse().unwrap());
            metadata.insert("traceparent", TRACE.parse().unwrap());
            metadata.insert("x-tenant", "tenant-17".parse().unwrap());
            client.say_hello(request).await.map(|_| true)
        }
        Kind::Unary(request) => client.say_hello(request.clone()).await.map(|_| true),
        Kind::Mixed(short, long) => {
            let is_long = rng.u8(..10) == 0;
            let replies = if is_long { *long } else { *short };
            client
                .say_hello(HelloRequest {
                    name: String::new(),
                    replies,
                })
                .await
                .map(|_| !is_long)
        }
        Kind::ServerStreaming(request) => {
            let mut replies = client.say_hellos(request.clone()).await?.into_inner();
            let mut received = 0;
            while replies.message().await?.is_some() {
                received += 1;
            }
            assert_eq!(received, request.replies);
            Ok(true)
        }
        Kind::ClientStreaming(messages, request) => {
            let requests = vec![request.clone(); *messages];
            client
                .greet_all(tokio_stream::iter(requests))
                .await
                .map(|_| true)
        }
        Kind::Bidi(messages, request) => {
            let requests = vec![request.clone(); *messages];
            let replies = client
                .chat(tokio_stream::iter(requests))
                .await?
                .into_inner();
            assert_eq!(replies.fold(0, |received, _| received + 1).await, *messages);
            Ok(true)
        }
    }
}

/// The result of one round of one peer.
#[derive(Default)]
pub struct Sample {
    calls: f64,
    cpu: f64,
    failed: u64,
    /// Latencies in microseconds, sorted.
    latencies: Vec<u32>,
}

impl Sample {
    fn rate(&self) -> f64 {
        self.calls / ROUND.as_secs_f64()
    }

    fn cpu_per_call(&self) -> f64 {
        self.cpu / self.calls
    }

    fn percentile(&self, share: f64) -> f64 {
        let index = ((self.latencies.len() as f64 * share) as usize)
            .min(self.latencies.len().saturating_sub(1));
        self.latencies
            .get(index)
            .copied()
            .unwrap_or_default()
            .into()
    }
}

fn cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

pub async fn round<S: Target>(load: Load, service: S) -> Sample {
    let counting = Arc::new(AtomicBool::new(false));
    let stop = Arc::new(AtomicBool::new(false));
    let calls = Arc::new(AtomicU64::new(0));
    let failed = Arc::new(AtomicU64::new(0));
    let callers: Vec<_> = (0..load.callers)
        .map(|_| {
            let client = GreeterClient::new(service.clone());
            let mut client = client
                .max_decoding_message_size(64 << 20)
                .max_encoding_message_size(64 << 20);
            let (kind, production) = (load.kind.clone(), load.production);
            let (counting, stop, calls, failed) = (
                counting.clone(),
                stop.clone(),
                calls.clone(),
                failed.clone(),
            );
            tokio::spawn(async move {
                let mut latencies = Vec::new();
                let mut rng = fastrand::Rng::new();
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    let outcome = call(&mut client, &kind, production, &mut rng).await;
                    if !counting.load(Ordering::Relaxed) {
                        continue;
                    }
                    calls.fetch_add(1, Ordering::Relaxed);
                    match outcome {
                        Ok(true) => {
                            let took = Instant::now().saturating_duration_since(start).as_micros();
                            latencies.push(u32::try_from(took).unwrap_or(u32::MAX));
                        }
                        Ok(false) => {}
                        Err(_) => {
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
                latencies
            })
        })
        .collect();
    tokio::time::sleep(load.warm_up).await;
    let before = cpu();
    counting.store(true, Ordering::Relaxed);
    tokio::time::sleep(ROUND).await;
    counting.store(false, Ordering::Relaxed);
    let cpu = cpu() - before;
    stop.store(true, Ordering::Relaxed);
    let mut sample = Sample {
        calls: calls.load(Ordering::Relaxed) as f64,
        cpu,
        failed: failed.load(Ordering::Relaxed),
        ..Sample::default()
    };
    for caller in callers {
        sample.latencies.extend(caller.await.unwrap());
    }
    sample.latencies.sort_unstable();
    sample
}

/// Columns of the printed table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Table {
    Ratios,
    Latencies,
}

/// Runs the peers in turn and prints the medians. The ratios are relative to the first peer.
pub async fn compare(title: &str, load: &Load, peers: &[Peer], table: Table) {
    let mut samples: Vec<Vec<Sample>> = peers.iter().map(|_| Vec::new()).collect();
    let mut order: Vec<_> = (0..peers.len()).collect();
    for _ in 0..ROUNDS {
        // The order is shuffled in each round, because a peer affects the caches and the scheduler state of the next peer.
        fastrand::shuffle(&mut order);
        for &index in &order {
            samples[index].push(peers[index].round(load.clone()).await);
        }
    }
    println!("\n{title}\n");
    match table {
        Table::Ratios => println!(
            "| peer | calls/s | CPU per call | p50 | ratio of calls/s | ratio of CPU per call | ratio of p50 | failed |\n|---|---|---|---|---|---|---|---|"
        ),
        Table::Latencies => println!(
            "| peer | calls/s | p50 | p75 | p90 | p95 | p98 | p99 | p99.9 | ratio of calls/s | failed |\n|---|---|---|---|---|---|---|---|---|---|---|"
        ),
    }
    for (peer, own) in peers.iter().zip(&samples) {
        let ratio = |figure: &dyn Fn(&Sample) -> f64| {
            median(
                own.iter()
                    .zip(&samples[0])
                    .map(|(own, base)| figure(own) / figure(base))
                    .collect(),
            )
        };
        let middle = |figure: &dyn Fn(&Sample) -> f64| median(own.iter().map(figure).collect());
        let failed: u64 = own.iter().map(|sample| sample.failed).sum();
        let (rate, p50) = (
            middle(&Sample::rate),
            middle(&|sample| sample.percentile(0.5)),
        );
        let name = peer.name();
        match table {
            Table::Ratios => println!(
                "| {name} | {rate:.0} | {:.1} us | {p50:.0} us | {:.2} | {:.2} | {:.2} | {failed} |",
                middle(&Sample::cpu_per_call) * 1e6,
                ratio(&Sample::rate),
                ratio(&Sample::cpu_per_call),
                ratio(&|sample| sample.percentile(0.5)),
            ),
            Table::Latencies => {
                let percentiles = [0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.999].map(|share| {
                    let latency = middle(&|sample| sample.percentile(share));
                    format!("{:.2} ms", latency / 1e3)
                });
                println!(
                    "| {name} | {rate:.0} | {} | {:.2} | {failed} |",
                    percentiles.join(" | "),
                    ratio(&Sample::rate),
                );
            }
        }
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}
