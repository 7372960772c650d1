//! The process with the channels of one compared client. `benches/peers/go/policies.go` does the same with grpc-go.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tonic_etcd::channel::LoadReports;
use tonic_etcd::{BalancedChannel, LbPolicy};

use super::clock::Epoch;
use super::greeter::HelloRequest;
use super::greeter::greeter_client::GreeterClient;
use super::server::BAD;

/// The time after the measurement in which the last calls end. A call that takes longer counts as failed.
const DRAIN: Duration = Duration::from_secs(5);

/// What the process does. The period is zero if a caller starts a call when its previous call has ended.
#[derive(Clone, Copy)]
struct Load {
    period: Duration,
    warm_up: Duration,
    time: Duration,
}

#[derive(Clone, Copy)]
struct Call {
    bad: bool,
    /// `None` if the call has failed.
    took: Option<Duration>,
}

/// Prints a line: the calls, those of them that a server with a disadvantage received, those that failed, and the 50th, 99th and 99.9th
/// percentile of the latency of the others in microseconds.
///
/// The arguments are the policy, the addresses of the servers with commas, the number of channels, the epoch, the period in microseconds,
/// and the times before and of the measurement in milliseconds.
pub fn run(args: &[String]) {
    let [policy, addresses, clients, epoch, period, warm_up, time] = args else {
        panic!("seven arguments are required: {args:?}");
    };
    let number = |argument: &String| argument.parse::<u64>().unwrap();
    let load = Load {
        period: Duration::from_micros(number(period)),
        warm_up: Duration::from_millis(number(warm_up)),
        time: Duration::from_millis(number(time)),
    };
    let addresses: Vec<String> = addresses.split(',').map(str::to_owned).collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let calls = runtime.block_on(async {
        sleep(Epoch::parse(epoch).remaining()).await;
        let channels: Vec<_> = (0..number(clients))
            .map(|_| tokio::spawn(client(policy.clone(), addresses.clone(), load)))
            .collect();
        let mut calls = Vec::new();
        for channel in channels {
            calls.extend(channel.await.unwrap());
        }
        calls
    });
    let mut latencies: Vec<_> = calls.iter().filter_map(|call| call.took).collect();
    latencies.sort_unstable();
    let percentile = |share: f64| {
        let index = (latencies.len() as f64 * share) as usize;
        let took = latencies.get(index.min(latencies.len().saturating_sub(1)));
        took.copied().unwrap_or_default().as_micros()
    };
    println!(
        "{} {} {} {} {} {}",
        calls.len(),
        calls.iter().filter(|call| call.bad).count(),
        calls.len() - latencies.len(),
        percentile(0.5),
        percentile(0.99),
        percentile(0.999)
    );
}

async fn client(policy: String, addresses: Vec<String>, load: Load) -> Vec<Call> {
    if policy == "stock" {
        let endpoint = |address| Endpoint::from_shared(format!("http://{address}")).unwrap();
        let endpoints: Vec<_> = addresses.iter().map(endpoint).collect();
        let channel = Channel::balance_list(endpoints.into_iter());
        return load.calls(GreeterClient::new(channel)).await;
    }
    let builder = BalancedChannel::builder();
    let builder = match policy.as_str() {
        "latency" => builder.policy(LbPolicy::Latency),
        "latency_reports" => builder
            .policy(LbPolicy::Latency)
            .load_reports(LoadReports::new()),
        "least_request" => builder.policy(LbPolicy::LeastRequest),
        "round_robin" => builder.policy(LbPolicy::WeightedRoundRobin),
        "round_robin_reports" => builder
            .policy(LbPolicy::WeightedRoundRobin)
            .load_reports(LoadReports::new()),
        policy => panic!("unknown policy {policy}"),
    };
    let channel = builder.addresses(addresses).connect_lazy();
    load.calls(GreeterClient::new(channel)).await
}

/// A client of either channel.
trait Greet: Clone + Send + 'static {
    /// Makes a call, and returns the message of its response.
    fn greet(&mut self) -> impl Future<Output = Result<String, tonic::Status>> + Send;
}

macro_rules! greet {
    ($channel:ty) => {
        impl Greet for GreeterClient<$channel> {
            async fn greet(&mut self) -> Result<String, tonic::Status> {
                let reply = self.say_hello(HelloRequest::default()).await?;
                Ok(reply.into_inner().message)
            }
        }
    };
}
greet!(Channel);
greet!(BalancedChannel);

impl Load {
    /// Makes the calls of one channel. Returns those that started in the measured time.
    async fn calls(self, client: impl Greet) -> Vec<Call> {
        let begin = Instant::now();
        let (from, until) = (begin + self.warm_up, begin + self.warm_up + self.time);
        let mut measured = Vec::new();
        if self.period.is_zero() {
            while Instant::now() < until {
                measured.extend(one(client.clone(), from, until).await);
            }
            return measured;
        }
        let mut tasks = Vec::new();
        let mut due = begin + self.period.mul_f64(fastrand::f64());
        while due < until {
            sleep_until(due).await;
            tasks.push(tokio::spawn(one(client.clone(), from, until)));
            due += self.period.mul_f64(2.0 * fastrand::f64());
        }
        for task in tasks {
            measured.extend(task.await.unwrap());
        }
        measured
    }
}

/// Makes one call. Returns nothing for a call that started before `from`.
async fn one(mut client: impl Greet, from: Instant, until: Instant) -> Option<Call> {
    let start = Instant::now();
    let outcome = timeout_at(until + DRAIN, client.greet()).await;
    let took = Instant::now().saturating_duration_since(start);
    let (bad, failed) = match outcome {
        Ok(Ok(message)) => (message == BAD, false),
        Ok(Err(status)) => (status.message() == BAD, true),
        Err(_) => (false, true),
    };
    let took = (!failed).then_some(took);
    (start >= from).then_some(Call { bad, took })
}
