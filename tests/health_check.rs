//! Active health checks of a channel, over real servers.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use support::callers::Callers;
use support::counting::Counting;
use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::GreeterServer;
use support::{SOON, eventually, hello};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status};
use tonic_etcd::{
    BalancedChannel,
    channel::{ChannelBuilder, EndpointState, WaitForReady},
};
use tonic_health::pb::health_check_response::ServingStatus as Wire;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_health::server::{HealthReporter, HealthService};

const NAME: &str = "helloworld.Greeter";

/// Reaction of a test server to a health watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Say(Wire),
    /// Sends no response.
    Nothing,
}

use Answer::{Nothing, Say};

/// A greeter whose health the test controls.
struct Patient {
    address: SocketAddr,
    greeter: Counting,
    /// How often [`Patient::cut`] was called, and the current answer.
    answer: watch::Sender<(u32, Answer)>,
    /// Number of open watches.
    watches: Arc<AtomicUsize>,
    /// Number of watches that were ever opened.
    begun: Arc<AtomicUsize>,
}

/// A health service that counts its watches.
struct Scripted {
    answer: watch::Receiver<(u32, Answer)>,
    watches: Arc<AtomicUsize>,
    begun: Arc<AtomicUsize>,
}

/// An open watch. When it is dropped, it is subtracted from the number of open watches.
struct Watching(Arc<AtomicUsize>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tonic::async_trait]
impl Health for Scripted {
    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Err(Status::internal("unary checks are not used"))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        assert_eq!(request.get_ref().service, NAME);
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.watches.fetch_add(1, Ordering::SeqCst);
        let watching = Watching(Arc::clone(&self.watches));
        let statuses = WatchStream::new(self.answer.clone());
        let cuts = self.answer.borrow().0;
        let statuses = statuses.take_while(move |answer| answer.0 == cuts);
        let responses = statuses.filter_map(move |(_, answer)| {
            let _watching = &watching;
            let Say(status) = answer else { return None };
            let mut response = HealthCheckResponse::default();
            response.set_status(status);
            Some(Ok(response))
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

impl Patient {
    async fn start(answer: Answer) -> Self {
        Self::start_with(answer, |server| server).await
    }

    async fn start_with(answer: Answer, configure: impl FnOnce(Server) -> Server) -> Self {
        let (answer, answers) = watch::channel((0, answer));
        let this = Self {
            address: "127.0.0.1:0".parse().unwrap(),
            greeter: Counting::default(),
            answer,
            watches: Arc::default(),
            begun: Arc::default(),
        };
        let health = HealthServer::new(Scripted {
            answer: answers,
            watches: Arc::clone(&this.watches),
            begun: Arc::clone(&this.begun),
        });
        let greeter = GreeterServer::new(this.greeter.clone());
        let router = configure(Server::builder())
            .add_service(greeter)
            .add_service(health);
        let address = serve(router).await;
        Self { address, ..this }
    }

    fn say(&self, answer: Answer) {
        self.answer.send_modify(|state| state.1 = answer);
    }

    /// Ends every watch, like a proxy that limits the duration of calls.
    fn cut(&self) {
        self.answer.send_modify(|state| state.0 += 1);
    }

    fn watches(&self) -> usize {
        self.watches.load(Ordering::SeqCst)
    }

    fn begun(&self) -> usize {
        self.begun.load(Ordering::SeqCst)
    }
}

async fn serve(router: tonic::transport::server::Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = TcpIncoming::from(listener);
    tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
    address
}

fn checked() -> ChannelBuilder {
    BalancedChannel::builder().health_check(NAME)
}

fn over(builder: ChannelBuilder, servers: &[&Patient]) -> BalancedChannel {
    builder
        .addresses(servers.iter().map(|server| server.address.to_string()))
        .connect_lazy()
}

/// Waits until an endpoint is in the given state.
async fn is(channel: &BalancedChannel, address: SocketAddr, state: EndpointState) {
    let what = format!("{address} is {state:?}");
    eventually(&what, async || {
        let known = channel.endpoints();
        known
            .iter()
            .any(|known| known.address.to_string() == address.to_string() && known.state == state)
    })
    .await;
}

async fn call(channel: &BalancedChannel) -> Result<(), Status> {
    let mut client = GreeterClient::new(channel.clone());
    let called = timeout(SOON, client.say_hello(hello())).await;
    called.expect("an outcome in time").map(drop)
}

#[tokio::test]
async fn calls_follow_the_health_status_and_none_fails_when_it_changes() {
    let one = Patient::start(Say(Wire::Serving)).await;
    let other = Patient::start(Say(Wire::NotServing)).await;
    let channel = over(checked(), &[&one, &other]);
    is(&channel, one.address, EndpointState::Ready).await;
    is(&channel, other.address, EndpointState::TransientFailure).await;
    let callers = Callers::start(&channel, 4);
    let (mut serving, mut down) = (&one, &other);
    for _ in 0..20 {
        let before = down.greeter.count();
        let so_far = callers.calls();
        eventually("calls are made", async || callers.calls() > so_far + 50).await;
        assert_eq!(
            down.greeter.count(),
            before,
            "a server whose status is not `Serving` was called"
        );
        // For a moment, both servers serve, so that at any time at least one of them serves.
        down.say(Say(Wire::Serving));
        is(&channel, down.address, EndpointState::Ready).await;
        eventually("the server receives calls", async || {
            down.greeter.count() > before
        })
        .await;
        serving.say(Say(Wire::NotServing));
        is(&channel, serving.address, EndpointState::TransientFailure).await;
        // Calls that were sent to the server before may still be in flight.
        let in_flight = async || {
            let known = channel.endpoints();
            let address = serving.address.to_string();
            let known = known.iter().find(|one| one.address.to_string() == address);
            known.unwrap().in_flight == 0
        };
        eventually("the calls of the server have ended", in_flight).await;
        std::mem::swap(&mut serving, &mut down);
    }
    assert!(callers.none_failed().await > 1_000);
}

#[tokio::test]
async fn a_server_without_the_health_service_counts_as_healthy() {
    let greeter = Counting::default();
    let without = serve(greeter.router()).await;
    // tonic-health's own server, which has no status for `NAME`.
    let reporter = HealthReporter::new();
    let health = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
    let other = serve(greeter.router().add_service(health)).await;
    let unknown = Patient::start(Say(Wire::ServiceUnknown)).await;
    let addresses = [without, other, unknown.address];
    let channel = checked()
        .max_backoff(Duration::from_millis(20))
        .addresses(addresses.map(|address| address.to_string()))
        .connect_lazy();
    for address in addresses {
        is(&channel, address, EndpointState::Ready).await;
    }
    // Once the server has a status for `NAME`, the channel uses this status.
    let not_serving = tonic_health::ServingStatus::NotServing;
    reporter.set_service_status(NAME, not_serving).await;
    is(&channel, other, EndpointState::TransientFailure).await;
    let serving = tonic_health::ServingStatus::Serving;
    reporter.set_service_status(NAME, serving).await;
    is(&channel, other, EndpointState::Ready).await;
}

#[tokio::test]
async fn without_a_serving_server_calls_fail_with_the_reason_or_wait_for_ready() {
    let servers = [
        Patient::start(Say(Wire::NotServing)).await,
        Patient::start(Say(Wire::Unknown)).await,
    ];
    let channel = over(checked(), &[&servers[0], &servers[1]]);
    let status = call(&channel).await.expect_err("the call must fail");
    assert_eq!(status.code(), Code::Unavailable);
    for part in ["0 of 2 endpoints ready", "its health check reports"] {
        assert!(status.message().contains(part), "{status}");
    }
    let waiting = tokio::spawn({
        let mut client = GreeterClient::new(channel.clone());
        async move {
            let mut request = Request::new(hello());
            request.extensions_mut().insert(WaitForReady::new(true));
            client.say_hello(request).await
        }
    });
    servers[1].say(Say(Wire::Serving));
    let waited = timeout(SOON, waiting).await.expect("an outcome in time");
    waited.expect("no panic").expect("the call succeeds");
    let known = channel.endpoints();
    assert!(known.iter().all(|one| one.last_error.is_some()));
    assert_eq!(servers[0].greeter.count(), 0);
}

#[tokio::test]
async fn a_server_without_a_health_response_is_not_used_but_is_watched_again() {
    let silent = Patient::start(Nothing).await;
    let channel = over(
        checked()
            .connect_timeout(Duration::from_millis(300))
            .max_backoff(Duration::from_millis(20)),
        &[&silent],
    );
    // A call waits for the first response of the health watch until the timeout, as it would wait for a connection.
    let status = call(&channel).await.expect_err("the call must fail");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("no answer within"), "{status}");
    eventually("the watch is opened again", async || silent.begun() >= 3).await;
    silent.say(Say(Wire::Serving));
    is(&channel, silent.address, EndpointState::Ready).await;
    call(&channel).await.expect("the server serves");
}

#[tokio::test]
async fn a_watch_that_ends_is_reopened_and_fails_no_call() {
    let server = Patient::start(Say(Wire::Serving)).await;
    // A watch that ends soon after its first response is opened again with a backoff. The backoff is short here.
    let channel = over(checked().max_backoff(Duration::from_millis(20)), &[&server]);
    is(&channel, server.address, EndpointState::Ready).await;
    let callers = Callers::start(&channel, 4);
    for round in 1..=20 {
        server.cut();
        eventually("the watch is reopened", async || server.begun() > round).await;
        eventually("one watch is open", async || server.watches() == 1).await;
    }
    callers.none_failed().await;
}

#[tokio::test]
async fn one_stream_is_reserved_for_the_health_watch_unless_the_server_allows_only_one() {
    for (streams, watches) in [(1, 0), (2, 1)] {
        let limited = |server: Server| server.max_concurrent_streams(streams);
        let server = Patient::start_with(Say(Wire::Serving), limited).await;
        let channel = over(checked(), &[&server]);
        is(&channel, server.address, EndpointState::Ready).await;
        let callers = Callers::start(&channel, 8);
        eventually("calls are made", async || {
            for endpoint in channel.endpoints() {
                assert!(endpoint.in_flight <= endpoint.connections, "{endpoint:?}");
            }
            callers.calls() > 500
        })
        .await;
        assert!(
            server.watches() <= 2,
            "at most two connections may be open, with one watch each"
        );
        assert_eq!(server.watches() > 0, watches > 0);
        callers.none_failed().await;
    }
}

#[tokio::test]
async fn a_watch_ends_with_its_endpoint_and_with_the_channel() {
    let servers = [
        Patient::start(Say(Wire::Serving)).await,
        Patient::start(Say(Wire::Serving)).await,
    ];
    let (changes, stream) = tokio::sync::mpsc::unbounded_channel();
    for server in &servers {
        let instance = tonic_etcd::Instance::new(server.address.to_string().parse().unwrap());
        let change = tower::discover::Change::Insert(instance.address().clone(), instance);
        changes
            .send(Ok::<_, std::convert::Infallible>(change))
            .unwrap();
    }
    let stream = tokio_stream::wrappers::UnboundedReceiverStream::new(stream);
    let channel = checked().discover(stream).connect_lazy();
    for server in &servers {
        is(&channel, server.address, EndpointState::Ready).await;
        assert_eq!(server.watches(), 1);
    }
    let gone = servers[0].address.to_string().parse().unwrap();
    let change = tower::discover::Change::Remove(gone);
    assert!(changes.send(Ok(change)).is_ok());
    eventually("the watch of the endpoint has ended", async || {
        servers[0].watches() == 0
    })
    .await;
    assert_eq!(servers[1].watches(), 1);
    drop(channel);
    eventually("the other watch has ended", async || {
        servers[1].watches() == 0
    })
    .await;
}
