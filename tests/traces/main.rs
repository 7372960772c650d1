//! The spans of calls and attempts, over real servers, with a subscriber of `tracing`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

#[path = "../../balance/src/metrics/tests/memory.rs"]
#[allow(dead_code, reason = "the tests of metrics use the rest")]
mod memory;
#[allow(unreachable_pub, reason = "the module is a part of this test")]
mod spans;
#[path = "../support/mod.rs"]
mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use h2::Reason;
use memory::Memory;
use spans::Root;
use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::GreeterServer;
use support::greeter::{HelloRequest, NamedGreeter};
use support::script::{Act, Server};
use support::{SOON, all_ready, etcd, eventually, hello};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Code, Request};
use tonic_etcd::channel::{Attributes, ChannelBuilder, HedgingPolicy};
use tonic_etcd::metrics;
use tonic_etcd::traces::Traces;
use tonic_etcd::{Address, BalancedChannel, Registry, RetryPolicy};
use tower::discover::Change;
use tracing::Instrument;

const DOWN: Act = Act::Fail(Code::Unavailable, &[]);

fn traced() -> ChannelBuilder {
    BalancedChannel::builder().traces(Traces::new())
}

/// Returns a channel to the servers once all are ready.
async fn over(builder: ChannelBuilder, servers: &[&Server]) -> BalancedChannel {
    let addresses = servers.iter().map(|server| server.address.clone());
    let channel = builder.addresses(addresses).connect_lazy();
    all_ready(&channel, servers.len()).await;
    channel
}

async fn say(channel: &BalancedChannel, root: &Root) -> Result<(), Code> {
    say_within(channel, root, SOON).await
}

async fn say_within(
    channel: &BalancedChannel,
    root: &Root,
    deadline: Duration,
) -> Result<(), Code> {
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(HelloRequest::default());
    request.set_timeout(deadline);
    let call = client.say_hello(request).instrument(root.span.clone());
    let outcome = timeout(SOON, call).await.unwrap();
    outcome.map(drop).map_err(|status| status.code())
}

fn host_and_port(address: &str) -> (&str, &str) {
    address.rsplit_once(':').unwrap()
}

#[tokio::test]
async fn a_retried_call_has_one_span_with_a_child_for_each_attempt() {
    let root = Root::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let script = || {
        let calls = Arc::clone(&calls);
        move |_| match calls.fetch_add(1, Ordering::SeqCst) {
            0 => DOWN,
            _ => Act::Reply,
        }
    };
    let servers = [Server::start(script()).await, Server::start(script()).await];
    let policy = RetryPolicy::new([Code::Unavailable]).initial_backoff(Duration::from_millis(1));
    let channel = over(traced().retry(policy), &[&servers[0], &servers[1]]).await;
    say(&channel, &root).await.unwrap();
    let (call, attempts) = root.call();
    assert_eq!(call.name, "Sent");
    assert_eq!(call.field("otel.name"), "Sent.helloworld.Greeter.SayHello");
    assert_eq!(call.field("otel.kind"), "internal");
    assert_eq!(call.status(), "OK");
    assert!(call.is_closed && call.events.is_empty(), "{call:?}");
    let [first, second] = &attempts[..] else {
        panic!("{attempts:?}");
    };
    for (attempt, previous, status) in [(first, "0", "ERROR UNAVAILABLE"), (second, "1", "OK")] {
        let name = attempt.field("otel.name");
        assert_eq!(name, "Attempt.helloworld.Greeter.SayHello");
        assert_eq!(attempt.field("otel.kind"), "client");
        assert_eq!(attempt.field("previous-rpc-attempts"), previous);
        assert_eq!(attempt.field("transparent-retry"), "false");
        assert_eq!(attempt.status(), status);
        assert_eq!(attempt.field("server.address"), "127.0.0.1");
        assert!(
            attempt.is_closed && attempt.events.is_empty(),
            "{attempt:?}"
        );
    }
    let mut ports = [first.field("server.port"), second.field("server.port")];
    let mut expected = [0, 1].map(|index| host_and_port(&servers[index].address).1);
    ports.sort_unstable();
    expected.sort_unstable();
    assert_eq!(ports, expected);
}

#[tokio::test]
async fn a_call_that_is_retried_has_both_metrics_and_spans_of_each_attempt() {
    let (root, memory) = (Root::new(), Memory::default());
    let calls = AtomicUsize::new(0);
    let server = Server::start(move |_| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => DOWN,
        _ => Act::Reply,
    });
    let server = server.await;
    let policy = RetryPolicy::new([Code::Unavailable]).initial_backoff(Duration::from_millis(1));
    let builder = traced().metrics(memory.clone()).retry(policy);
    let channel = over(builder, &[&server]).await;
    say(&channel, &root).await.unwrap();
    let (call, attempts) = root.call();
    assert_eq!(call.status(), "OK");
    let statuses: Vec<_> = attempts.iter().map(spans::Recorded::status).collect();
    assert_eq!(statuses, ["ERROR UNAVAILABLE", "OK"]);
    for (name, status) in [
        ("grpc.client.attempt.duration", "UNAVAILABLE"),
        ("grpc.client.attempt.duration", "OK"),
        ("grpc.client.call.duration", "OK"),
    ] {
        let status = format!("grpc.status={status}");
        let keys = memory.keys();
        let mut keys = keys
            .iter()
            .filter(|key| key.starts_with(name) && key.contains(&status));
        let key = keys.next().unwrap_or_else(|| panic!("{name} {status}"));
        assert_eq!(memory.values(key).len(), 1, "{key}");
    }
}

#[tokio::test]
async fn a_transparent_retry_has_a_span_that_names_it() {
    let root = Root::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let script = || {
        let calls = Arc::clone(&calls);
        move |_| match calls.fetch_add(1, Ordering::SeqCst) {
            0 => Act::Reset(Reason::REFUSED_STREAM),
            _ => Act::Reply,
        }
    };
    let servers = [Server::start(script()).await, Server::start(script()).await];
    let channel = over(traced(), &[&servers[0], &servers[1]]).await;
    say(&channel, &root).await.unwrap();
    let (call, attempts) = root.call();
    assert_eq!(call.status(), "OK");
    let shown = attempts.iter().map(|attempt| {
        let previous = attempt.field("previous-rpc-attempts");
        let is_transparent = attempt.field("transparent-retry");
        (attempt.status(), previous, is_transparent)
    });
    let expected = [
        ("ERROR UNAVAILABLE".to_owned(), "0", "false"),
        ("OK".to_owned(), "0", "true"),
    ];
    assert_eq!(shown.collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn a_call_that_waits_for_its_endpoint_has_the_events_of_its_delays() {
    let root = Root::new();
    let server = Server::always(Act::Reply).await;
    let (changes, discovered) = mpsc::unbounded_channel::<Result<_, Infallible>>();
    let source = UnboundedReceiverStream::new(discovered);
    let channel = traced().discover(source).connect_lazy();
    let waiting = tokio::spawn({
        let (channel, span) = (channel.clone(), root.span.clone());
        let mut client = GreeterClient::new(channel);
        async move { client.say_hello(HelloRequest::default()).await }.instrument(span)
    });
    eventually("the call waits", async || {
        root.calls()
            .iter()
            .any(|(_, attempts)| !attempts.is_empty())
    })
    .await;
    let (call, attempts) = root.call();
    assert!(!call.is_closed && !attempts[0].is_closed);
    let address: Address = server.address.parse().unwrap();
    let added: Change<_, Attributes> = Change::Insert(address, Attributes::new());
    changes.send(Ok(added)).unwrap();
    timeout(SOON, waiting).await.unwrap().unwrap().unwrap();
    let (call, attempts) = root.call();
    assert_eq!(call.events, ["Delayed name resolution complete"]);
    assert_eq!(attempts.len(), 1, "{attempts:?}");
    assert_eq!(attempts[0].events, ["Delayed LB pick complete"]);
    assert_eq!(attempts[0].status(), "OK");
    assert_eq!(
        attempts[0].field("server.port"),
        host_and_port(&server.address).1
    );
    say(&channel, &root).await.unwrap();
    let (call, attempts) = root.calls().remove(1);
    assert!(call.events.is_empty() && attempts[0].events.is_empty());
}

#[tokio::test]
async fn a_call_without_an_endpoint_has_an_attempt_without_a_server() {
    let root = Root::new();
    let channel = over(traced(), &[]).await;
    let refused = say(&channel, &root).await;
    assert_eq!(refused, Err(Code::Unavailable));
    let (call, attempts) = root.call();
    assert_eq!(call.status(), "ERROR UNAVAILABLE");
    assert_eq!(attempts[0].status(), "ERROR UNAVAILABLE");
    assert_eq!(attempts[0].field("server.address"), "");
    assert!(call.is_closed && attempts[0].is_closed);
}

#[tokio::test]
async fn a_call_that_overruns_its_deadline_ends_its_spans_with_this_status() {
    let server = Server::always(Act::Hang).await;
    let deadline = Duration::from_millis(50);
    let hedging = HedgingPolicy::new(2, Duration::from_millis(5));
    let retry = RetryPolicy::new([Code::Unavailable]);
    for (builder, servers) in [
        (traced(), &[&server][..]),
        (traced().retry(retry.clone()), &[&server]),
        (traced().hedge(hedging.clone()), &[&server]),
        (traced().wait_for_ready(true), &[]),
        (traced().wait_for_ready(true).retry(retry), &[]),
        (traced().wait_for_ready(true).hedge(hedging), &[]),
    ] {
        let root = Root::new();
        let channel = over(builder, servers).await;
        let late = say_within(&channel, &root, deadline).await;
        assert_eq!(late, Err(Code::DeadlineExceeded));
        let (call, attempts) = root.call();
        assert_eq!(call.status(), "ERROR DEADLINE_EXCEEDED");
        assert!(call.is_closed);
        assert_eq!(attempts.len(), 1, "{attempts:?}");
        assert_eq!(attempts[0].status(), "ERROR DEADLINE_EXCEEDED");
        assert!(attempts[0].is_closed);
    }
}

#[tokio::test]
async fn a_dropped_call_closes_its_spans_as_cancelled() {
    let server = Server::always(Act::Hang).await;
    let retry = RetryPolicy::new([Code::Unavailable]);
    for (builder, servers) in [
        (traced(), &[&server][..]),
        (traced().retry(retry), &[&server]),
        (traced().wait_for_ready(true), &[]),
    ] {
        let root = Root::new();
        let channel = over(builder, servers).await;
        let before = server.count();
        let mut client = GreeterClient::new(channel.clone());
        let call = client.say_hello(HelloRequest::default());
        let call = Box::pin(call.instrument(root.span.clone()));
        let sent = eventually("the call waits", async || match servers {
            [] => !root.calls().is_empty(),
            _ => server.count() > before,
        });
        tokio::select! {
            biased;
            outcome = call => panic!("{outcome:?}"),
            () = sent => {}
        }
        // `select!` has dropped the call.
        let (call, attempts) = root.call();
        assert_eq!(call.status(), "ERROR CANCELLED");
        assert!(call.is_closed, "{call:?}");
        assert_eq!(attempts.len(), 1, "{attempts:?}");
        assert_eq!(attempts[0].status(), "ERROR CANCELLED");
        assert!(attempts[0].is_closed, "{attempts:?}");
    }
}

#[tokio::test]
async fn a_hedge_that_loses_is_cancelled() {
    let root = Root::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let script = || {
        let calls = Arc::clone(&calls);
        move |_| match calls.fetch_add(1, Ordering::SeqCst) {
            0 => Act::Hang,
            _ => Act::Reply,
        }
    };
    let servers = [Server::start(script()).await, Server::start(script()).await];
    let builder = traced().hedge(HedgingPolicy::new(2, Duration::from_millis(5)));
    let channel = over(builder, &[&servers[0], &servers[1]]).await;
    say(&channel, &root).await.unwrap();
    let (call, attempts) = root.call();
    assert_eq!(call.status(), "OK");
    let shown = attempts.iter().map(|attempt| {
        let previous = attempt.field("previous-rpc-attempts");
        (attempt.status(), previous, attempt.is_closed)
    });
    let expected = [
        ("ERROR CANCELLED".to_owned(), "0", true),
        ("OK".to_owned(), "1", true),
    ];
    assert_eq!(shown.collect::<Vec<_>>(), expected);
}

/// A server whose only connection is closed in the test.
struct Closing {
    address: String,
    close: oneshot::Sender<()>,
    closed: oneshot::Receiver<()>,
}

impl Closing {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (close, mut closing) = oneshot::channel();
        let (ended, closed) = oneshot::channel();
        tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(socket).await.unwrap();
            tokio::select! {
                _ = &mut closing => {}
                call = connection.accept() => panic!("{call:?}"),
            }
            connection.graceful_shutdown();
            // Ends once the client has answered the PING that follows the GOAWAY.
            while connection.accept().await.is_some() {}
            ended.send(()).unwrap();
        });
        Self {
            address,
            close,
            closed,
        }
    }

    /// Closes the connection, and waits until the client has received the GOAWAY.
    async fn close(self) {
        self.close.send(()).unwrap();
        timeout(SOON, self.closed).await.unwrap().unwrap();
    }
}

/// An item of a source: an endpoint, or a stop of the driver, which reads the source. The driver stops until the sender is dropped.
enum Item {
    Endpoint(String, u32),
    Stop(oneshot::Sender<()>, std::sync::mpsc::Receiver<()>),
}

/// Between the end of a connection and its removal by the driver, a hedge can pick this connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hedge_that_no_connection_accepts_is_unavailable() {
    let root = Root::new();
    let (failing, closing) = (Server::always(DOWN).await, Closing::start().await);
    let (items, source) = mpsc::unbounded_channel();
    let source = UnboundedReceiverStream::new(source).filter_map(|item| match item {
        Item::Endpoint(address, weight) => {
            let attributes = Attributes::new().with_weight(weight);
            let change = Change::Insert(address.parse::<Address>().unwrap(), attributes);
            Some(Ok::<_, Infallible>(change))
        }
        Item::Stop(stopped, until) => {
            tokio::task::block_in_place(|| {
                stopped.send(()).unwrap();
                let _ = until.recv();
            });
            None
        }
    });
    let policy = HedgingPolicy::new(2, SOON);
    let channel = traced().discover(source).hedge(policy).connect_lazy();
    // The first attempt is sent to the failing server.
    for (address, weight) in [(&failing.address, 1_000_000), (&closing.address, 1)] {
        let item = Item::Endpoint(address.clone(), weight);
        assert!(items.send(item).is_ok());
    }
    all_ready(&channel, 2).await;
    let ((stopped, is_stopped), (_resume, until)) =
        (oneshot::channel(), std::sync::mpsc::channel());
    assert!(items.send(Item::Stop(stopped, until)).is_ok());
    timeout(SOON, is_stopped).await.unwrap().unwrap();
    closing.close().await;
    assert_eq!(say(&channel, &root).await, Err(Code::Unavailable));
    let (call, attempts) = root.call();
    assert_eq!(call.status(), "ERROR UNAVAILABLE");
    let shown = attempts.iter().map(|attempt| {
        let previous = attempt.field("previous-rpc-attempts");
        (attempt.status(), previous, attempt.is_closed)
    });
    let unavailable = "ERROR UNAVAILABLE".to_owned();
    let expected = [(unavailable.clone(), "0", true), (unavailable, "1", true)];
    assert_eq!(shown.collect::<Vec<_>>(), expected);
}

/// Starts tonic's greeter and returns its address.
async fn greeter() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = tonic::transport::Server::builder()
        .add_service(GreeterServer::new(NamedGreeter("alpha".to_owned())))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serving);
    address
}

#[tokio::test]
async fn the_spans_of_a_stream_are_open_until_its_end() {
    let root = Root::new();
    let channel = traced().addresses([greeter().await]).connect().await;
    let mut client = GreeterClient::new(channel.unwrap());
    for is_read_to_its_end in [true, false] {
        let (feed, requests) = mpsc::unbounded_channel();
        let chat = client.chat(UnboundedReceiverStream::new(requests));
        let chat = timeout(SOON, chat.instrument(root.span.clone())).await;
        let mut replies = chat.unwrap().unwrap().into_inner();
        for _ in 0..3 {
            feed.send(hello()).unwrap();
            let reply = timeout(SOON, replies.message()).await.unwrap();
            assert!(reply.unwrap().is_some());
        }
        let (call, attempts) = root.calls().pop().unwrap();
        assert_eq!(call.field("otel.name"), "Sent.helloworld.Greeter.Chat");
        assert!(!call.is_closed && !attempts[0].is_closed);
        assert!(call.status().is_empty() && attempts[0].status().is_empty());
        let status = if is_read_to_its_end {
            drop(feed);
            let end = timeout(SOON, replies.message()).await.unwrap();
            assert!(end.unwrap().is_none());
            "OK"
        } else {
            drop(replies);
            "ERROR CANCELLED"
        };
        let (call, attempts) = root.calls().pop().unwrap();
        for span in [&call, &attempts[0]] {
            assert_eq!(span.status(), status);
            assert!(span.is_closed, "{span:?}");
        }
    }
}

#[tokio::test]
async fn the_channels_of_a_registry_have_its_traces_and_others_have_no_spans() {
    let (etcd, server) = (etcd().await, Server::always(Act::Reply).await);
    let plain = Registry::connect(etcd.endpoints()).await.unwrap();
    let registration = plain.registration("greeter").address(&server.address);
    let registration = registration.register().await.unwrap();
    let builder = Registry::builder(etcd.endpoints()).traces(Traces::new());
    let built = builder.connect().await.unwrap();
    for (registry, expected) in [
        (plain.clone(), 0),
        (plain.with_traces(Traces::new()), 1),
        (built, 1),
    ] {
        let root = Root::new();
        let channel = registry.channel("greeter").connect().await.unwrap();
        say(&channel, &root).await.unwrap();
        assert_eq!(root.calls().len(), expected);
    }
    registration.deregister().await.unwrap();
}
