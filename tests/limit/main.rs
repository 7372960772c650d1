//! The layer that limits the concurrency of a server, with real servers under load.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a failed step is a failed test, and only this program uses the modules"
)]
#![cfg(feature = "health")]

mod load;
mod overload;
#[path = "../support/mod.rs"]
mod support;
mod workers;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::GreeterServer;
use support::{Registered, SERVICE, eventually, hello, registry};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Code;
use tonic::service::LayerExt;
use tonic::transport::{Channel, Server};
use tonic_etcd::limit::AdaptiveLimitLayer;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, ServeRegistered};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use workers::Workers;

/// Held by each test that loads the machine, so that these tests run one after the other.
static LOAD: Mutex<()> = Mutex::const_new(());

/// A registered server with the layer, and a channel to it.
struct World {
    client: GreeterClient<BalancedChannel>,
    address: String,
    free: Arc<Semaphore>,
    streams: Arc<AtomicUsize>,
    latencies: Arc<std::sync::Mutex<Vec<(Instant, Duration)>>>,
    limit: AdaptiveLimitLayer,
    server: Registered,
    etcd: Etcd,
}

impl World {
    async fn new(limit: AdaptiveLimitLayer, workers: usize, service: Duration) -> Self {
        let etcd = support::etcd().await;
        let registry = registry(&etcd).await;
        let workers = Workers::new(workers, service);
        let free = Arc::clone(&workers.free);
        let streams = Arc::clone(&workers.streams);
        let latencies = Arc::clone(&workers.latencies);
        let greeter = GreeterServer::new(workers);
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
            latencies,
            limit,
            server,
            etcd,
        }
    }
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

/// h2 closes a connection after about 1 000 frames that arrive after the response to their call. A message of 100 kB has seven frames.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_refusals_do_not_close_a_connection() {
    let _load = LOAD.lock().await;
    let world = World::new(AdaptiveLimitLayer::with_bounds(1, 1), 0, Duration::ZERO).await;
    let mut waiting = world.client.clone();
    let waiting = tokio::spawn(async move { waiting.say_hello(hello()).await });
    eventually("a call is in flight", async || world.limit.in_flight() == 1).await;
    for (rounds, at_once, size) in [(500, 8, 1), (250, 2, 100_000)] {
        let client = support::connect(&world.address).await;
        for _ in 0..rounds {
            let mut calls = JoinSet::new();
            let received = world.limit.refused() + at_once;
            for _ in 0..at_once {
                let (mut client, limit) = (client.clone(), world.limit.clone());
                let message = HelloRequest {
                    name: "n".repeat(size),
                    replies: 1,
                };
                calls.spawn(async move {
                    // The message is sent when the server has received the head of each request.
                    let late = tokio_stream::once(message).then(move |message| {
                        let limit = limit.clone();
                        async move {
                            while limit.refused() < received {
                                tokio::task::yield_now().await;
                            }
                            message
                        }
                    });
                    client.greet_all(late).await
                });
            }
            while let Some(refused) = calls.join_next().await {
                let refused = refused.unwrap().unwrap_err();
                assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
            }
        }
    }
    world.free.add_permits(1);
    waiting.await.unwrap().unwrap();
    world.server.stopped().await.unwrap();
}

/// A layer for one service only.
#[test]
fn the_layer_of_one_service_is_added_like_a_service() {
    let greeter = support::greeter::NamedGreeter::default();
    let greeter = AdaptiveLimitLayer::new().named_layer(GreeterServer::new(greeter));
    let _router = Server::builder().add_service(greeter);
}
