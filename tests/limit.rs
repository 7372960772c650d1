//! The layer that limits the concurrency of a server, with real servers under load.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]
#![cfg(feature = "health")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::{Greeter, GreeterServer};
use support::greeter::{HelloReply, HelloRequest};
use support::{Registered, SERVICE, eventually, hello, registry};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::service::LayerExt;
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
    /// The number of streams that handlers have begun to read.
    streams: Arc<AtomicUsize>,
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
        requests: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        self.streams.fetch_add(1, Ordering::Relaxed);
        let mut requests = requests.into_inner();
        let mut messages = 0;
        while requests.message().await?.is_some() {
            messages += 1;
        }
        let message = messages.to_string();
        Ok(Response::new(HelloReply { message }))
    }

    type ChatStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    /// Responds after the first message.
    async fn chat(
        &self,
        requests: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        self.streams.fetch_add(1, Ordering::Relaxed);
        requests.into_inner().message().await?;
        Ok(Response::new(tokio_stream::empty()))
    }
}

/// A registered server with the layer, and a channel to it.
struct World {
    client: GreeterClient<BalancedChannel>,
    address: String,
    free: Arc<Semaphore>,
    streams: Arc<AtomicUsize>,
    limit: AdaptiveLimitLayer,
    server: Registered,
    _etcd: Etcd,
}

impl World {
    async fn new(limit: AdaptiveLimitLayer, workers: usize, service: Duration) -> Self {
        let etcd = support::etcd().await;
        let registry = registry(&etcd).await;
        let free = Arc::new(Semaphore::new(workers));
        let streams = Arc::new(AtomicUsize::new(0));
        let greeter = GreeterServer::new(Workers {
            free: Arc::clone(&free),
            service,
            streams: Arc::clone(&streams),
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
            streams,
            limit,
            server,
            _etcd: etcd,
        }
    }

    /// Makes calls at a constant rate, whether or not earlier calls have ended. Returns the outcome of those that start after `warm_up`.
    async fn load(&self, rate: u32, timeout: Duration, warm_up: Duration, time: Duration) -> Load {
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
                let mut request = Request::new(hello());
                request.set_timeout(timeout);
                let outcome = client.say_hello(request).await;
                (start >= begin).then(|| outcome.map(|_| Instant::now() - start))
            });
        }
        let mut load = Load {
            time,
            ..Load::default()
        };
        while let Some(outcome) = calls.join_next().await {
            match outcome.unwrap().transpose() {
                Ok(latency) => load.latencies.extend(latency),
                Err(status) if status.code() == Code::ResourceExhausted => load.refused += 1,
                Err(status) if status.code() == Code::DeadlineExceeded => load.late += 1,
                Err(status) => panic!("{status:?}"),
            }
        }
        load.latencies.sort_unstable();
        load
    }
}

/// The outcome of the calls of [`World::load`].
#[derive(Default)]
struct Load {
    time: Duration,
    /// The latencies of the calls that succeed.
    latencies: Vec<Duration>,
    refused: usize,
    late: usize,
}

impl Load {
    /// Returns the number of successful calls in a second.
    fn goodput(&self) -> f64 {
        f64::from(u32::try_from(self.latencies.len()).unwrap()) / self.time.as_secs_f64()
    }

    fn p99(&self) -> Duration {
        self.latencies[self.latencies.len() * 99 / 100]
    }
}

const SECOND: Duration = Duration::from_secs(1);

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

#[tokio::test]
async fn streams_whose_clients_send_nothing_do_not_block_a_server() {
    let world = World::new(AdaptiveLimitLayer::new(), 4, Duration::from_millis(1)).await;
    let client = support::connect(&world.address).await;
    let mut senders = Vec::new();
    let mut uploads = Vec::new();
    let mut chats = Vec::new();
    // More than the limit of 32.
    for number in 1..=80 {
        let (sender, messages) = mpsc::unbounded_channel();
        let messages = UnboundedReceiverStream::new(messages);
        senders.push(sender);
        let mut client = client.clone();
        if number % 2 == 0 {
            uploads.push(tokio::spawn(
                async move { client.greet_all(messages).await },
            ));
        } else {
            chats.push(tokio::spawn(async move { client.chat(messages).await }));
        }
        eventually("the handler waits", async || {
            world.streams.load(Ordering::Relaxed) == number && world.limit.in_flight() == 0
        })
        .await;
    }
    for _ in 0..50 {
        world.client.clone().say_hello(hello()).await.unwrap();
    }
    // Each of them continues.
    for sender in senders {
        sender.send(hello()).unwrap();
        sender.send(hello()).unwrap();
    }
    for upload in uploads {
        let reply = upload.await.unwrap().unwrap();
        assert_eq!(reply.into_inner().message, "2");
    }
    for chat in chats {
        let mut replies = chat.await.unwrap().unwrap().into_inner();
        assert!(replies.message().await.unwrap().is_none());
    }
    assert_eq!(world.limit.in_flight(), 0);
    assert_eq!(world.limit.refused(), 0);
    world.server.stopped().await.unwrap();
}

/// With the initial limit, a call waits 31 times 50 ms.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_calls_all_exceed_their_deadlines_serves_again() {
    let world = World::new(AdaptiveLimitLayer::new(), 1, Duration::from_millis(50)).await;
    let load = world.load(40, SECOND / 2, 8 * SECOND, 4 * SECOND).await;
    println!(
        "{} of 20 calls/s, {} late, limit {}",
        load.goodput(),
        load.late,
        world.limit.limit()
    );
    assert!(load.goodput() >= 8.0);
    assert!(world.limit.limit() <= 8);
    world.server.stopped().await.unwrap();
}

/// Four workers and 40 ms: the capacity is 100 calls per second, which is far below that of the machine. With the initial limit, a call takes
/// eight times as long as without load. The bounds allow for a machine that is busy with other tests.
#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_server_stays_fast_for_the_calls_that_it_accepts() {
    let world = World::new(AdaptiveLimitLayer::new(), 4, Duration::from_millis(40)).await;
    let minute = 60 * SECOND;
    let unloaded = world.load(25, minute, SECOND, 4 * SECOND).await;
    assert_eq!(unloaded.refused, 0);
    assert_eq!(world.limit.limit(), 32);
    let loaded = world.load(200, minute, 5 * SECOND, 5 * SECOND).await;
    let limit = world.limit.limit();
    println!(
        "unloaded: p99 {:?}; at twice the capacity: {} of 100 calls/s, p99 {:?}, limit {limit}",
        unloaded.p99(),
        loaded.goodput(),
        loaded.p99(),
    );
    assert!(limit <= 12);
    assert!(loaded.goodput() >= 50.0);
    assert!(loaded.p99() <= unloaded.p99() * 3);
    assert!(loaded.refused > 0);
    world.server.stopped().await.unwrap();
}

/// A layer for one service only.
#[test]
fn the_layer_of_one_service_is_added_like_a_service() {
    let greeter = support::greeter::NamedGreeter::default();
    let greeter = AdaptiveLimitLayer::new().named_layer(GreeterServer::new(greeter));
    let _router = Server::builder().add_service(greeter);
}
