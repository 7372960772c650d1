//! Compares the policies on processes: many channels, four servers, one of which is slow or none. `make bench-policies` also runs the same
//! cases in virtual time, and draws the pictures of `docs/policies.md` from both.
//!
//! Each server is a separate process with a fixed response time. A call that takes long was sent to the slow server, so the share of such
//! calls is known for every channel, also for those of tonic. The channels of all policies run at the same time, each against its own
//! servers: the machine is far from busy.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::pedantic,
    reason = "this is a benchmark, and a failed step ends it with a panic"
)]

#[path = "../../examples/greeter/mod.rs"]
mod greeter;
#[path = "../load/server.rs"]
mod server;

use std::time::Duration;

use greeter::HelloRequest;
use greeter::greeter_client::GreeterClient;
use server::ServerProcess;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::transport::{Channel, Endpoint};
use tonic_etcd::{BalancedChannel, LbPolicy};

/// The response times of the servers in microseconds, as in the simulation.
const FAST: u64 = 5_000;
const SLOW: u64 = 250_000;
/// A call that takes longer was sent to the slow server.
const IS_SLOW: Duration = Duration::from_millis(125);
/// The channels run for this time before the measurement, and then again for the measurement.
const TIME: Duration = Duration::from_secs(30);

#[derive(Clone, Copy)]
enum Callers {
    /// The mean time between the starts of two calls.
    EachAfter(Duration),
    Closed,
}

#[derive(Clone)]
enum Peer {
    Stock,
    Policy(LbPolicy),
}

const PEERS: [(&str, Peer); 4] = [
    ("latency", Peer::Policy(LbPolicy::Latency)),
    ("least request", Peer::Policy(LbPolicy::LeastRequest)),
    ("round robin", Peer::Policy(LbPolicy::WeightedRoundRobin)),
    ("stock tonic", Peer::Stock),
];

const CASES: [(&str, usize, Callers); 6] = [
    ("1/s", 1, Callers::EachAfter(Duration::from_secs(1))),
    ("1/s", 40, Callers::EachAfter(Duration::from_secs(1))),
    ("10/s", 4, Callers::EachAfter(Duration::from_millis(100))),
    ("10/s", 40, Callers::EachAfter(Duration::from_millis(100))),
    ("closed", 1, Callers::Closed),
    ("closed", 4, Callers::Closed),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(position) = args.iter().position(|arg| arg == "serve") {
        return server::serve(args[position + 1].parse().unwrap(), &args[position + 2]);
    }
    println!(
        "source,fault,servers,clients,callers,policy,calls,bad_percent,p50_ms,p99_ms,p999_ms,failed"
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for (fault, slowest) in [("None", FAST), ("Slow", SLOW)] {
            for (callers_name, clients, callers) in CASES {
                let runs =
                    PEERS.map(|(_, peer)| tokio::spawn(run(peer, slowest, clients, callers)));
                for (run, (name, _)) in runs.into_iter().zip(PEERS) {
                    let outcome = run.await.unwrap();
                    println!("processes,{fault},4,{clients},{callers_name},{name},{outcome}");
                }
            }
        }
    });
}

/// Runs one case, and returns the columns of its line.
async fn run(peer: Peer, slowest: u64, clients: usize, callers: Callers) -> String {
    let servers = ServerProcess::start_many(&[slowest, FAST, FAST, FAST]);
    let addresses = ServerProcess::addresses(&servers);
    let tasks: Vec<_> = (0..clients)
        .map(|_| tokio::spawn(client(peer.clone(), addresses.clone(), callers)))
        .collect();
    let (mut latencies, mut failed) = (Vec::new(), 0);
    for task in tasks {
        let calls = task.await.unwrap();
        failed += calls.iter().filter(|call| call.is_none()).count();
        latencies.extend(calls.into_iter().flatten());
    }
    latencies.sort_unstable();
    let bad = latencies.iter().filter(|took| **took > IS_SLOW).count();
    let percentile = |share: f64| {
        let index = (latencies.len() as f64 * share) as usize;
        let took = latencies[index.min(latencies.len() - 1)];
        took.as_secs_f64() * 1e3
    };
    format!(
        "{},{:.2},{:.1},{:.1},{:.1},{failed}",
        latencies.len() + failed,
        bad as f64 * 100.0 / latencies.len() as f64,
        percentile(0.5),
        percentile(0.99),
        percentile(0.999)
    )
}

/// Makes the calls of one client. Returns the latency of each measured call, or `None` if it has failed.
async fn client(peer: Peer, addresses: Vec<String>, callers: Callers) -> Vec<Option<Duration>> {
    match peer {
        Peer::Stock => {
            let endpoint = |address| Endpoint::from_shared(format!("http://{address}")).unwrap();
            let endpoints: Vec<_> = addresses.iter().map(endpoint).collect();
            calls(
                GreeterClient::new(Channel::balance_list(endpoints.into_iter())),
                callers,
            )
            .await
        }
        Peer::Policy(policy) => {
            let channel = BalancedChannel::builder()
                .policy(policy)
                .addresses(addresses);
            calls(GreeterClient::new(channel.connect_lazy()), callers).await
        }
    }
}

/// A client of either channel.
trait Greet: Clone + Send + 'static {
    fn greet(&mut self) -> impl Future<Output = Result<(), tonic::Status>> + Send;
}

macro_rules! greet {
    ($channel:ty) => {
        impl Greet for GreeterClient<$channel> {
            async fn greet(&mut self) -> Result<(), tonic::Status> {
                self.say_hello(HelloRequest::default()).await.map(drop)
            }
        }
    };
}
greet!(Channel);
greet!(BalancedChannel);

async fn calls(client: impl Greet, callers: Callers) -> Vec<Option<Duration>> {
    let begin = Instant::now();
    let (from, until) = (begin + TIME, begin + 2 * TIME);
    let mut measured = Vec::new();
    match callers {
        Callers::Closed => {
            while Instant::now() < until {
                measured.extend(one(client.clone(), from).await);
            }
        }
        Callers::EachAfter(period) => {
            let mut tasks = Vec::new();
            let mut due = begin + period.mul_f64(fastrand::f64());
            while due < until {
                sleep_until(due).await;
                tasks.push(tokio::spawn(one(client.clone(), from)));
                due += period.mul_f64(2.0 * fastrand::f64());
            }
            sleep(Duration::from_secs(1)).await;
            for task in tasks {
                measured.extend(task.await.unwrap());
            }
        }
    }
    measured
}

/// Makes one call. Returns its latency, or `None` if it has failed; nothing for a call that started before `from`.
async fn one(mut client: impl Greet, from: Instant) -> Option<Option<Duration>> {
    let start = Instant::now();
    let outcome = client.greet().await;
    let took = Instant::now().saturating_duration_since(start);
    (start >= from).then(|| outcome.ok().map(|()| took))
}
