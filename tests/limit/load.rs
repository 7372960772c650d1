//! Load on a server from several clients, each with a connection of its own.

use std::fmt;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_etcd::BalancedChannel;

use crate::support::greeter::HelloRequest;
use crate::support::greeter::greeter_client::GreeterClient;
use crate::support::{connect, hello};

/// A client that makes the calls.
pub trait Client: Clone + Send + 'static {
    fn call(
        self,
        request: Request<HelloRequest>,
    ) -> impl Future<Output = Result<(), Status>> + Send;
}

impl Client for GreeterClient<Channel> {
    async fn call(mut self, request: Request<HelloRequest>) -> Result<(), Status> {
        self.say_hello(request).await.map(drop)
    }
}

impl Client for GreeterClient<BalancedChannel> {
    async fn call(mut self, request: Request<HelloRequest>) -> Result<(), Status> {
        self.say_hello(request).await.map(drop)
    }
}

/// The kinds of load.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// This number of calls in a second at random times, whether or not earlier calls have ended.
    Open(f64),
    /// This number of callers. Each of them makes one call after the other. After a refusal, a caller waits for the time of the pushback.
    Closed(usize),
}

/// The calls of the clients.
#[derive(Clone, Copy, Debug)]
pub struct Calls {
    pub kind: Kind,
    pub deadline: Duration,
    /// The time before the calls that count.
    pub warm_up: Duration,
    pub time: Duration,
}

/// The outcome of the calls that start after the warm-up.
#[derive(Debug, Default)]
pub struct Outcome {
    time: Duration,
    /// The latencies of the calls that succeed, in ascending order.
    latencies: Vec<Duration>,
    /// The refused attempts.
    pub refused: usize,
    pub late: usize,
}

impl Outcome {
    /// Returns the number of successful calls in a second.
    pub fn goodput(&self) -> f64 {
        f64::from(u32::try_from(self.latencies.len()).unwrap()) / self.time.as_secs_f64()
    }

    /// Returns the latency that one of hundred successful calls exceeds.
    pub fn p99(&self) -> Duration {
        self.percentile(99)
    }

    pub fn percentile(&self, percent: usize) -> Duration {
        let rank = self.latencies.len() * percent / 100;
        self.latencies.get(rank).copied().unwrap_or(Duration::MAX)
    }

    fn count(&mut self, latency: Duration, outcome: Result<(), Status>) {
        let Err(status) = outcome else {
            self.latencies.push(latency);
            return;
        };
        match status.code() {
            Code::ResourceExhausted => self.refused += 1,
            // A server of tonic reports `CANCELLED`.
            Code::DeadlineExceeded | Code::Cancelled => self.late += 1,
            _ => panic!("{status:?}"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let goodput = self.goodput();
        let rank = |percent| {
            let latency = self.latencies.get(self.latencies.len() * percent / 100);
            latency.copied().unwrap_or_default()
        };
        let (median, p99) = (rank(50), rank(99));
        let Self { refused, late, .. } = self;
        write!(
            f,
            "{goodput:.1} calls/s succeed, median {median:.1?}, p99 {p99:.1?}, {refused} refused, {late} late"
        )
    }
}

const CLIENTS: usize = 4;

/// Connects the clients.
pub async fn clients(address: &str) -> Vec<GreeterClient<Channel>> {
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(connect(address).await);
    }
    clients
}

impl Calls {
    /// Makes the calls.
    pub async fn make(self, clients: &[impl Client]) -> Outcome {
        let begin = Instant::now() + self.warm_up;
        let mut running = JoinSet::new();
        for (number, client) in clients.iter().cloned().enumerate() {
            match self.kind {
                Kind::Open(rate) => {
                    let rate = rate / f64::from(u32::try_from(clients.len()).unwrap());
                    let random = fastrand::Rng::with_seed(u64::try_from(number).unwrap());
                    running.spawn(self.open(client, rate, random, begin));
                }
                Kind::Closed(callers) => {
                    for _ in 0..callers / clients.len() {
                        running.spawn(self.closed(client.clone(), begin));
                    }
                }
            }
        }
        let mut total = Outcome {
            time: self.time,
            ..Outcome::default()
        };
        while let Some(outcome) = running.join_next().await {
            let outcome = outcome.unwrap();
            total.latencies.extend(outcome.latencies);
            total.refused += outcome.refused;
            total.late += outcome.late;
        }
        total.latencies.sort_unstable();
        total
    }

    async fn open(
        self,
        client: impl Client,
        rate: f64,
        mut random: fastrand::Rng,
        begin: Instant,
    ) -> Outcome {
        let mut calls = JoinSet::new();
        let mut next = Instant::now();
        while next < begin + self.time {
            sleep_until(next).await;
            let client = client.clone();
            calls.spawn(self.call(client));
            next += Duration::from_secs_f64(-(1.0 - random.f64()).ln() / rate);
        }
        let mut total = Outcome::default();
        while let Some(call) = calls.join_next().await {
            let (start, latency, outcome) = call.unwrap();
            if start >= begin {
                total.count(latency, outcome);
            }
        }
        total
    }

    async fn closed(self, client: impl Client, begin: Instant) -> Outcome {
        let mut total = Outcome::default();
        while Instant::now() < begin + self.time {
            let (start, latency, outcome) = self.call(client.clone()).await;
            let pushback = outcome.as_ref().err().and_then(pushback);
            if start >= begin {
                total.count(latency, outcome);
            }
            if let Some(pushback) = pushback {
                sleep(pushback).await;
            }
        }
        total
    }

    /// Makes a call. Returns its start, its latency and its outcome.
    async fn call(self, client: impl Client) -> (Instant, Duration, Result<(), Status>) {
        let mut request = Request::new(hello());
        request.set_timeout(self.deadline);
        let start = Instant::now();
        let outcome = client.call(request).await;
        let latency = Instant::now().saturating_duration_since(start);
        (start, latency, outcome)
    }
}

/// Returns the time after which a refused call may be sent again.
pub fn pushback(status: &Status) -> Option<Duration> {
    let pushback = status.metadata().get("grpc-retry-pushback-ms")?;
    let milliseconds = pushback.to_str().unwrap().parse().unwrap();
    Some(Duration::from_millis(milliseconds))
}
