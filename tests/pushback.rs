//! A channel and a server that limits its concurrency: the pushback of the server moves calls to the server that has capacity.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::{Greeter, GreeterServer};
use support::greeter::{HelloReply, HelloRequest};
use support::{eventually, hello};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_etcd::limit::AdaptiveLimitLayer;
use tonic_etcd::{BalancedChannel, LbPolicy};

/// A greeter with a number of workers. Each of them serves one call at a time.
struct Workers {
    free: Semaphore,
    service: Duration,
}

#[tonic::async_trait]
impl Greeter for Workers {
    async fn say_hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let _worker = self.free.acquire().await.unwrap();
        sleep(self.service).await;
        Ok(Response::new(HelloReply::default()))
    }

    type SayHellosStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn say_hellos(
        &self,
        _: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        Err(Status::unimplemented("not used"))
    }

    async fn greet_all(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        Err(Status::unimplemented("not used"))
    }

    type ChatStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn chat(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented("not used"))
    }
}

struct Running {
    address: SocketAddr,
    limit: AdaptiveLimitLayer,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts a server that refuses calls while all its workers are busy.
async fn server(workers: usize, service: Duration) -> Running {
    let limit = AdaptiveLimitLayer::with_bounds(workers, workers);
    let free = Semaphore::new(workers);
    let greeter = GreeterServer::new(Workers { free, service });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = TcpIncoming::from(listener);
    let serving = Server::builder().layer(limit.clone()).add_service(greeter);
    let serving = serving.serve_with_incoming(incoming);
    let task = tokio::spawn(async move { serving.await.unwrap() }).abort_handle();
    Running {
        address,
        limit,
        task,
    }
}

/// The outcome of the calls of a channel in some seconds.
#[derive(Debug, Default)]
struct Outcome {
    served: usize,
    refused: usize,
}

/// Makes calls at a constant rate, whether or not earlier calls have ended.
async fn load(channel: &BalancedChannel, rate: u32, time: Duration) -> Outcome {
    let mut ticks = interval(Duration::from_secs(1) / rate);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let end = Instant::now() + time;
    let mut calls = JoinSet::new();
    while Instant::now() < end {
        ticks.tick().await;
        let mut client = GreeterClient::new(channel.clone());
        calls.spawn(async move { client.say_hello(hello()).await });
    }
    let mut outcome = Outcome::default();
    while let Some(ended) = calls.join_next().await {
        match ended.unwrap() {
            Ok(_) => outcome.served += 1,
            Err(status) if status.code() == Code::ResourceExhausted => outcome.refused += 1,
            Err(status) => panic!("{status:?}"),
        }
    }
    outcome
}

async fn channel(servers: &[&Running], policy: LbPolicy, honours: bool) -> BalancedChannel {
    let builder = BalancedChannel::builder().policy(policy).seed(7);
    let builder = if honours {
        builder.max_pushback(Duration::from_secs(10))
    } else {
        builder
    };
    let addresses = servers.iter().map(|server| server.address.to_string());
    let channel = builder.addresses(addresses).connect_lazy();
    eventually("the servers are ready", async || {
        let statuses = channel.endpoints();
        let mut states = statuses.iter().map(|one| one.state.to_string());
        states.all(|state| state == "READY") && statuses.len() == servers.len()
    })
    .await;
    channel
}

const TIME: Duration = Duration::from_secs(4);
const SERVICE: Duration = Duration::from_millis(20);

/// Each test measures a load, so no other test may run at the same time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// One server can serve 100 calls per second, the other one 2 000. The load is 400 calls per second, of which a policy without regard to load
/// sends half to the first server.
#[tokio::test(flavor = "multi_thread")]
async fn the_pushback_of_a_busy_server_moves_calls_to_the_other_server() {
    let _alone = ALONE.lock().await;
    for policy in [LbPolicy::WeightedRoundRobin, LbPolicy::Latency] {
        let mut refused = Vec::new();
        for honours in [false, true] {
            let (busy, large) = (server(2, SERVICE).await, server(40, SERVICE).await);
            let channel = channel(&[&busy, &large], policy, honours).await;
            let outcome = load(&channel, 400, TIME).await;
            let calls_of_busy = channel
                .endpoints()
                .into_iter()
                .find(|one| one.address.to_string() == busy.address.to_string())
                .unwrap()
                .calls;
            println!(
                "{policy:?}, pushback {honours}: {outcome:?}, {calls_of_busy} calls at the busy server, {} refused there",
                busy.limit.refused()
            );
            refused.push(outcome.refused);
        }
        if policy == LbPolicy::WeightedRoundRobin {
            assert!(refused[1] * 2 < refused[0], "{refused:?}");
        }
    }
}

/// Both servers together can serve 200 calls per second, and get 400. The pushbacks must not reduce what they serve.
#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_all_overloaded_serve_as_much_as_without_pushback() {
    let _alone = ALONE.lock().await;
    let mut served = Vec::new();
    for honours in [false, true] {
        let servers = [server(2, SERVICE).await, server(2, SERVICE).await];
        let channel = channel(&servers.each_ref(), LbPolicy::WeightedRoundRobin, honours).await;
        let outcome = load(&channel, 400, TIME).await;
        println!("pushback {honours}: {outcome:?}");
        served.push(outcome.served);
    }
    // The two measurements are made one after the other, so a busy machine affects them differently.
    assert!(served[1] * 10 >= served[0] * 6, "{served:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_server_serves_as_much_as_without_pushback() {
    let _alone = ALONE.lock().await;
    let mut served = Vec::new();
    for honours in [false, true] {
        let only = server(2, SERVICE).await;
        let channel = channel(&[&only], LbPolicy::Latency, honours).await;
        let outcome = load(&channel, 200, TIME).await;
        println!("pushback {honours}: {outcome:?}");
        served.push(outcome.served);
    }
    // The two measurements are made one after the other, so a busy machine affects them differently.
    assert!(served[1] * 10 >= served[0] * 6, "{served:?}");
}
