//! Deadline propagation through three registered servers: each of them calls the next one while it serves a call.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::{Greeter, GreeterServer};
use support::greeter::{HelloReply, HelloRequest};
use support::{Registered, SOON, etcd, registry};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_etcd::deadline::{IgnoreServedDeadline, PropagateDeadlineLayer, ServedDeadline};
use tonic_etcd::{BalancedChannel, Registry, ServeRegistered};

type Client = GreeterClient<BalancedChannel>;
type BoxStream = std::pin::Pin<Box<dyn Stream<Item = Result<HelloReply, Status>> + Send>>;

/// A server that calls the next one, and reports the timeout of each call that it serves.
struct Hop {
    next: Option<Client>,
    timeouts: mpsc::UnboundedSender<Option<Duration>>,
}

/// Returns the timeout that the client has sent.
fn received<T>(request: &Request<T>) -> Option<Duration> {
    let value = request.metadata().get("grpc-timeout")?;
    let (number, unit) = value.to_str().unwrap().split_at(value.len() - 1);
    let number = number.parse().unwrap();
    Some(match unit {
        "n" => Duration::from_nanos(number),
        "u" => Duration::from_micros(number),
        "m" => Duration::from_millis(number),
        unit => panic!("the unit {unit}"),
    })
}

/// Calls the next server in the way that the name in the request selects.
async fn call(mut next: Client, request: HelloRequest) -> Result<Response<HelloReply>, Status> {
    let mut onward = Request::new(request.clone());
    match &*request.name {
        "ignored" => {
            onward.extensions_mut().insert(IgnoreServedDeadline::new());
        }
        "shorter" => onward.set_timeout(Duration::from_millis(500)),
        "longer" => onward.set_timeout(Duration::from_secs(3600)),
        _ => {}
    }
    match &*request.name {
        "spawned" => tokio::spawn(async move { next.say_hello(onward).await })
            .await
            .unwrap(),
        "spawned in the scope" => {
            let deadline = ServedDeadline::current().unwrap();
            let scope = deadline.scope(async move { next.say_hello(onward).await });
            tokio::spawn(scope).await.unwrap()
        }
        _ => next.say_hello(onward).await,
    }
}

#[tonic::async_trait]
impl Greeter for Hop {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        self.timeouts.send(received(&request)).unwrap();
        match &self.next {
            Some(next) => call(next.clone(), request.into_inner()).await,
            // It never responds, so that the deadline passes.
            None if request.get_ref().name == "never" => std::future::pending().await,
            None => Ok(Response::new(HelloReply::default())),
        }
    }

    type SayHellosStream = BoxStream;

    /// Calls the next server for each reply, while the body of the response is polled.
    async fn say_hellos(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<BoxStream>, Status> {
        let next = self.next.clone().unwrap();
        let HelloRequest { name, replies } = request.into_inner();
        let replies = tokio_stream::iter(0..replies).then(move |_| {
            let request = HelloRequest {
                name: name.clone(),
                replies: 1,
            };
            let next = next.clone();
            async { Ok(call(next, request).await?.into_inner()) }
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn greet_all(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        Err(Status::unimplemented("not used"))
    }

    type ChatStream = BoxStream;

    async fn chat(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<BoxStream>, Status> {
        Err(Status::unimplemented("not used"))
    }
}

/// The servers `first`, `second` and `third`, and a client of the first.
struct Chain {
    client: Client,
    /// The timeouts that each server has received.
    received: [mpsc::UnboundedReceiver<Option<Duration>>; 3],
    servers: Vec<Registered>,
    _etcd: tonic_etcd::testing::Etcd,
}

async fn client(registry: &Registry, service: &str) -> Client {
    let channel = registry.channel(service).wait_for_ready(true);
    let channel = channel.connect().await.unwrap();
    GreeterClient::new(channel)
}

impl Chain {
    async fn new(layer: PropagateDeadlineLayer) -> Self {
        let etcd = etcd().await;
        let registry = registry(&etcd).await;
        let mut servers = Vec::new();
        let mut next = None;
        let mut receivers = Vec::new();
        for name in ["third", "second", "first"] {
            let (timeouts, reports) = mpsc::unbounded_channel();
            receivers.insert(0, reports);
            let hop = GreeterServer::new(Hop { next, timeouts });
            let router = Server::builder().layer(layer).add_service(hop);
            let registration = registry.registration(name);
            let registration = registration.grace_period(Duration::from_millis(10));
            servers.push(Registered::serve_with(|stopped| async move {
                let address = "127.0.0.1:0".parse().unwrap();
                router
                    .serve_registered_with_shutdown(address, registration, stopped)
                    .await
            }));
            next = Some(client(&registry, name).await);
        }
        Self {
            client: next.unwrap(),
            received: receivers.try_into().unwrap(),
            servers,
            _etcd: etcd,
        }
    }

    async fn call(&mut self, name: &str, timeout: Option<Duration>) -> Result<(), Status> {
        let mut request = Request::new(HelloRequest {
            name: name.to_owned(),
            replies: 1,
        });
        if let Some(timeout) = timeout {
            request.set_timeout(timeout);
        }
        self.client.say_hello(request).await.map(drop)
    }

    async fn timeouts(&mut self) -> [Option<Duration>; 3] {
        let mut timeouts = [None; 3];
        for (received, at) in self.received.iter_mut().zip(&mut timeouts) {
            *at = timeout(SOON, received.recv()).await.unwrap().unwrap();
        }
        timeouts
    }

    async fn stop(self) {
        for server in self.servers {
            server.stopped().await.unwrap();
        }
    }
}

const MARGIN: Duration = Duration::from_millis(10);

#[tokio::test]
async fn the_timeout_of_each_hop_is_what_was_left_of_the_deadline() {
    let mut chain = Chain::new(PropagateDeadlineLayer::new()).await;
    let given = Duration::from_secs(30);
    let before = Instant::now();
    chain.call("hello", Some(given)).await.unwrap();
    let elapsed = Instant::now() - before;
    let timeouts = chain.timeouts().await.map(Option::unwrap);
    assert!(timeouts[0] <= given, "{timeouts:?}");
    for pair in timeouts.windows(2) {
        assert!(pair[1] + MARGIN <= pair[0], "{timeouts:?}");
    }
    assert!(
        timeouts[2] + 2 * MARGIN + elapsed + Duration::from_millis(1) >= given,
        "{timeouts:?} after {elapsed:?}"
    );
    chain.stop().await;
}

#[tokio::test]
async fn without_a_deadline_none_is_inherited() {
    let mut chain = Chain::new(PropagateDeadlineLayer::new()).await;
    chain.call("hello", None).await.unwrap();
    assert_eq!(chain.timeouts().await, [None; 3]);
    chain.stop().await;
}

#[tokio::test]
async fn the_earlier_of_the_own_and_the_inherited_deadline_applies() {
    let mut chain = Chain::new(PropagateDeadlineLayer::new()).await;
    let given = Duration::from_secs(30);
    chain.call("shorter", Some(given)).await.unwrap();
    let [_, second, third] = chain.timeouts().await.map(Option::unwrap);
    assert!(second <= Duration::from_millis(500));
    assert!(third + MARGIN <= second);
    chain.call("longer", Some(given)).await.unwrap();
    let [_, second, third] = chain.timeouts().await.map(Option::unwrap);
    assert!(second + MARGIN <= given);
    assert!(third + MARGIN <= second);
    chain.stop().await;
}

#[tokio::test]
async fn a_spawned_task_inherits_only_in_the_scope_and_a_request_can_opt_out() {
    let mut chain = Chain::new(PropagateDeadlineLayer::new()).await;
    let given = Some(Duration::from_secs(30));
    chain.call("spawned", given).await.unwrap();
    assert_eq!(chain.timeouts().await[1..], [None, None]);
    chain.call("ignored", given).await.unwrap();
    assert_eq!(chain.timeouts().await[1..], [None, None]);
    chain.call("spawned in the scope", given).await.unwrap();
    let [first, second, third] = chain.timeouts().await;
    assert!(third < second && second < first && third.is_some());
    chain.stop().await;
}

#[tokio::test]
async fn a_response_stream_inherits_the_deadline_for_each_of_its_calls() {
    let mut chain = Chain::new(PropagateDeadlineLayer::new()).await;
    let mut request = Request::new(HelloRequest {
        name: "hello".to_owned(),
        replies: 3,
    });
    let given = Duration::from_secs(30);
    request.set_timeout(given);
    let replies = chain.client.say_hellos(request).await.unwrap();
    let replies: Vec<_> = replies.into_inner().collect().await;
    assert_eq!(replies.len(), 3);
    let mut last = given;
    for _ in 0..3 {
        let second = timeout(SOON, chain.received[1].recv()).await.unwrap();
        let second = second.unwrap().unwrap();
        assert!(second + MARGIN <= given && second < last);
        last = second;
    }
    chain.stop().await;
}

/// The last server never responds. The second server ends its call a margin before the first server does, so the caller's error names the last
/// server.
#[tokio::test]
async fn the_error_of_an_exceeded_deadline_comes_from_the_innermost_call() {
    let mut chain = Chain::new(PropagateDeadlineLayer::new().max_margin(MARGIN * 20)).await;
    let status = chain.call("never", Some(Duration::from_secs(4))).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let message = status.message();
    assert!(message.contains("third"), "{message}");
    assert!(
        message.contains("inherited from the call that is being served"),
        "{message}"
    );
    chain.stop().await;
}

#[tokio::test]
async fn a_call_without_remaining_time_is_not_sent() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let (timeouts, mut received) = mpsc::unbounded_channel();
    let hop = GreeterServer::new(Hop {
        next: None,
        timeouts,
    });
    let router = Server::builder().add_service(hop);
    let registration = registry.registration("last");
    let server = Registered::serve(router, "127.0.0.1:0", registration);
    let last = client(&registry, "last").await;
    let layer = PropagateDeadlineLayer::new();
    let handler = tower::service_fn(move |_: http::Request<()>| {
        let mut last = last.clone();
        async move {
            let deadline = ServedDeadline::current().unwrap();
            tokio::time::sleep(deadline.remaining()).await;
            last.say_hello(support::hello())
                .await
                .map(|_| http::Response::new(String::new()))
        }
    });
    let mut handler = tower::Layer::layer(&layer, handler);
    let request = http::Request::builder()
        .header("grpc-timeout", "20m")
        .body(())
        .unwrap();
    let status = tower::Service::call(&mut handler, request)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(received.try_recv().is_err());
    drop(handler);
    server.stopped().await.unwrap();
}
