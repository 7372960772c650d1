//! The layer that limits the concurrency of a server, with real servers under load.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]
#![cfg(feature = "health")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::{Greeter, GreeterServer};
use support::greeter::{HelloReply, HelloRequest};
use support::{Registered, SERVICE, eventually, hello, registry};
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tonic::transport::{Channel, Server};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_etcd::limit::AdaptiveLimitLayer;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, ServeRegistered};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// A greeter with a number of workers, each of which serves one call at a time.
struct Workers {
    free: Arc<Semaphore>,
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
        Ok(Response::new(tokio_stream::empty()))
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
        Ok(Response::new(tokio_stream::empty()))
    }
}

/// A registered server with the layer, and a channel to it.
struct World {
    client: GreeterClient<BalancedChannel>,
    address: String,
    free: Arc<Semaphore>,
    limit: AdaptiveLimitLayer,
    server: Registered,
    _etcd: Etcd,
}

impl World {
    async fn new(limit: AdaptiveLimitLayer, workers: usize, service: Duration) -> Self {
        let etcd = support::etcd().await;
        let registry = registry(&etcd).await;
        let free = Arc::new(Semaphore::new(workers));
        let greeter = GreeterServer::new(Workers {
            free: Arc::clone(&free),
            service,
        });
        let router = Server::builder().layer(limit.clone()).add_service(greeter);
        let registration = registry.registration(SERVICE);
        let registration = registration
            .grace_period(Duration::from_millis(10))
            .health();
        let server = Registered::serve_with(|stopped| async move {
            let address = "127.0.0.1:0".parse().unwrap();
            router
                .serve_registered_with_shutdown(address, registration, stopped)
                .await
        });
        let channel = registry.channel(SERVICE).wait_for_ready(true);
        let channel = channel.connect().await.unwrap();
        let address = channel.endpoints()[0].address.to_string();
        Self {
            client: GreeterClient::new(channel),
            address,
            free,
            limit,
            server,
            _etcd: etcd,
        }
    }

    /// Makes calls at a constant rate, whether or not earlier calls have ended. Returns the latencies of those that succeed and start after
    /// `warm_up`, and the number of those that fail.
    async fn load(&self, rate: u32, warm_up: Duration, time: Duration) -> (Vec<Duration>, usize) {
        let mut ticks = interval(Duration::from_secs(1) / rate);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let begin = Instant::now() + warm_up;
        let end = begin + time;
        let mut calls = tokio::task::JoinSet::new();
        while Instant::now() < end {
            ticks.tick().await;
            let mut client = self.client.clone();
            calls.spawn(async move {
                let start = Instant::now();
                let outcome = client.say_hello(hello()).await;
                (start >= begin).then(|| outcome.map(|_| Instant::now() - start))
            });
        }
        let mut latencies = Vec::new();
        let mut refused = 0;
        while let Some(outcome) = calls.join_next().await {
            match outcome.unwrap() {
                Some(Ok(latency)) => latencies.push(latency),
                Some(Err(status)) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                    refused += 1;
                }
                None => {}
            }
        }
        latencies.sort_unstable();
        (latencies, refused)
    }
}

fn p99(latencies: &[Duration]) -> Duration {
    latencies[latencies.len() * 99 / 100]
}

#[tokio::test]
async fn health_checks_of_an_overloaded_server_are_not_refused() {
    let mut world = World::new(AdaptiveLimitLayer::with_bounds(2, 2), 0, Duration::ZERO).await;
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let mut client = world.client.clone();
            tokio::spawn(async move { client.say_hello(hello()).await })
        })
        .collect();
    eventually("two calls are in flight", async || {
        world.limit.in_flight() == 2
    })
    .await;
    let refused = world.client.say_hello(hello()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let pushback = refused.metadata().get("grpc-retry-pushback-ms").unwrap();
    assert!(pushback.to_str().unwrap().parse::<u32>().unwrap() >= 10);
    assert_eq!(world.limit.refused(), 1);
    let channel = Channel::from_shared(format!("http://{}", world.address)).unwrap();
    let mut health = HealthClient::new(channel.connect().await.unwrap());
    let status = health.check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(status.into_inner().status, 1, "SERVING");
    world.free.add_permits(1);
    for call in waiting {
        call.await.unwrap().unwrap();
    }
    world.client.say_hello(hello()).await.unwrap();
    // A call that its caller cancels is no longer in flight.
    world.free.forget_permits(1);
    let cancelled =
        tokio::time::timeout(Duration::from_millis(50), world.client.say_hello(hello()));
    assert!(cancelled.await.is_err());
    eventually("no call is in flight", async || {
        world.limit.in_flight() == 0
    })
    .await;
    world.server.stopped().await.unwrap();
}

/// Eight workers and 40 ms: the capacity is 200 calls per second, which is far below that of the machine. The bounds allow for a machine that
/// is busy with other tests.
#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_server_stays_fast_for_the_calls_that_it_accepts() {
    let world = World::new(AdaptiveLimitLayer::new(), 8, Duration::from_millis(40)).await;
    let second = Duration::from_secs(1);
    let (unloaded, refused) = world.load(50, second, second * 3).await;
    assert_eq!(refused, 0);
    let (capacity, _) = world.load(200, second, second * 3).await;
    let (loaded, refused) = world.load(400, second * 5, second * 5).await;
    println!(
        "unloaded: p99 {:?}; at capacity: {} calls/s; at twice the capacity: {} calls/s, p99 {:?}, {} refused/s",
        p99(&unloaded),
        capacity.len() / 3,
        loaded.len() / 5,
        p99(&loaded),
        refused / 5,
    );
    assert!(loaded.len() / 5 >= 150);
    // Without the limit, the calls at the end of the load would wait for seconds.
    assert!(p99(&loaded) <= 5 * p99(&unloaded));
    assert!(refused > 0);
    world.server.stopped().await.unwrap();
}
