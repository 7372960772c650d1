//! The DNS source with answers that the tests set, and with the system's resolver.

#[cfg(feature = "dns-srv")]
mod name_server;
#[cfg(feature = "dns-srv")]
mod srv;
mod waits;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tower::discover::Change;

use super::Dns;
use super::lookups::Answer;
use crate::address::AddressPolicy;
use crate::channel::source::{EndpointSource, SourceContext};
use crate::channel::{EndpointState, Endpoints};
use crate::{Address, BalancedChannel};

/// The current answer of a name server, and the times of the lookups.
#[derive(Clone, Default)]
struct NameServer {
    answer: Arc<Mutex<Vec<&'static str>>>,
    lookups: Arc<Mutex<Vec<Instant>>>,
}

impl NameServer {
    fn set(&self, answer: &[&'static str]) {
        *self.answer.lock().expect("the answer") = answer.to_vec();
    }

    fn lookups(&self) -> usize {
        self.lookups.lock().expect("the lookups").len()
    }

    fn dns(&self) -> Dns {
        let this = self.clone();
        let mut dns = Dns::new("greeter.test:80");
        dns.lookup = Arc::new(move |host, port| -> Answer {
            assert_eq!((&*host, port), ("greeter.test", 80));
            this.lookups
                .lock()
                .expect("the lookups")
                .push(Instant::now());
            let answer = this.answer.lock().expect("the answer").clone();
            Box::pin(async move {
                if answer.is_empty() {
                    return Err(io::Error::other("no such host"));
                }
                let parsed = answer.iter().map(|address| address.parse::<SocketAddr>());
                Ok(parsed.map(|address| address.expect("an address")).collect())
            })
        });
        dns
    }
}

fn context() -> SourceContext {
    SourceContext {
        tls: false,
        policy: AddressPolicy::default(),
    }
}

type Started = Endpoints<<Dns as EndpointSource>::Stream>;

fn start(dns: Dns) -> Started {
    dns.start(&context()).expect("a started source")
}

async fn changes(endpoints: &mut Started, count: usize) -> Vec<String> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(match endpoints.changes.next().await {
            Some(Ok(Change::Insert(address, ()))) => format!("+{address}"),
            Some(Ok(Change::Remove(address))) => format!("-{address}"),
            None => "the end".to_owned(),
        });
    }
    all
}

#[tokio::test(start_paused = true)]
async fn the_endpoints_follow_the_answers() {
    let server = NameServer::default();
    server.set(&["10.0.0.1:80", "[fd00::1]:80"]);
    let mut endpoints = start(server.dns());
    let first = changes(&mut endpoints, 2).await;
    assert_eq!(first, ["+10.0.0.1:80", "+[fd00::1]:80"]);
    let before = Instant::now();
    server.set(&["10.0.0.2:80", "10.0.0.1:80"]);
    let second = changes(&mut endpoints, 2).await;
    assert_eq!(second, ["+10.0.0.2:80", "-[fd00::1]:80"]);
    assert_eq!(Instant::now() - before, Duration::from_secs(30));
}

#[tokio::test(start_paused = true)]
async fn a_failed_lookup_changes_no_endpoint_and_is_repeated_with_a_backoff() {
    let server = NameServer::default();
    let mut endpoints = start(server.dns());
    let error = endpoints.source_error.take().expect("a function");
    let known = endpoints.known.take().expect("a future");
    tokio::time::sleep(Duration::from_secs(8)).await;
    // After 0, 1, 3 and 7 s.
    assert_eq!(server.lookups(), 4);
    assert_eq!(
        error().as_deref(),
        Some("the lookup of greeter.test:80 failed: no such host")
    );
    server.set(&["10.0.0.1:80"]);
    known.await;
    assert_eq!(changes(&mut endpoints, 1).await, ["+10.0.0.1:80"]);
    assert_eq!(error(), None);
    server.set(&[]);
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert!(error().is_some());
    server.set(&["10.0.0.2:80"]);
    assert_eq!(
        changes(&mut endpoints, 2).await,
        ["+10.0.0.2:80", "-10.0.0.1:80"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_failed_attempt_to_connect_causes_a_lookup_at_most_every_five_seconds() {
    let server = NameServer::default();
    server.set(&["10.0.0.1:80"]);
    let mut endpoints = start(server.dns());
    let refused = endpoints.on_refused.take().expect("a function");
    assert_eq!(changes(&mut endpoints, 1).await, ["+10.0.0.1:80"]);
    let address: Address = "10.0.0.1:80".parse().expect("an address");
    for _ in 0..20 {
        (refused.0)(&address);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // At 0, 5, 10 and 15 s.
    assert_eq!(server.lookups(), 4);
}

/// Its new addresses are then known before an attempt to connect to an address that has no server any more fails, which can take 20 s.
#[tokio::test]
async fn the_end_of_a_connection_causes_a_lookup_also_if_the_next_connection_succeeds() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("an address").to_string();
    let server = NameServer::default();
    server.set(&[&*address.leak()]);
    let accepting = tokio::spawn(async move {
        let mut connections = Vec::new();
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            let mut connection = h2::server::handshake(stream).await.expect("a client");
            let is_first = connections.is_empty();
            connections.push(tokio::spawn(async move {
                let ended = connection.accept();
                // The client is ready when the server has answered its first PING.
                let limit = Duration::from_millis(if is_first { 500 } else { 60_000 });
                let _ = tokio::time::timeout(limit, ended).await;
            }));
        }
    });
    let channel = BalancedChannel::builder().source(server.dns());
    let channel = channel.connect().await.expect("a ready channel");
    let started = Instant::now();
    while server.lookups() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(Instant::now() - started < Duration::from_secs(20));
    }
    assert_eq!(channel.endpoints()[0].state, EndpointState::Ready);
    accepting.abort();
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_the_channel() {
    let server = NameServer::default();
    server.set(&["10.0.0.1:80"]);
    let mut endpoints = start(server.dns());
    assert_eq!(changes(&mut endpoints, 1).await, ["+10.0.0.1:80"]);
    drop(endpoints);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(server.lookups(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_address_policy_applies_to_the_answers() {
    let server = NameServer::default();
    server.set(&["169.254.169.254:80", "10.0.0.1:80"]);
    let mut endpoints = start(server.dns());
    assert_eq!(changes(&mut endpoints, 1).await, ["+10.0.0.1:80"]);
    let refused = NameServer::default();
    refused.set(&["169.254.169.254:80"]);
    let endpoints = start(refused.dns());
    let error = endpoints.source_error.as_ref().expect("a function");
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(error().is_some_and(|error| error.contains("link-local")));
}

#[tokio::test]
async fn a_name_that_is_not_valid_is_an_invalid_option() {
    for name in ["greeter", "unix:/run/greeter", "https://greeter:80"] {
        let builder = BalancedChannel::builder().source(Dns::new(name));
        assert!(builder.connect().await.is_err(), "{name}");
    }
}

/// Starts a server without services. Returns its port, and a handle that stops it.
async fn serve() -> (u16, AbortHandle) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let port = listener.local_addr().expect("an address").port();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let server = tonic::transport::Server::builder()
        .add_routes(tonic::service::Routes::default())
        .serve_with_incoming(incoming);
    (port, tokio::spawn(server).abort_handle())
}

/// With the resolver of the system, and the file `/etc/hosts`.
#[tokio::test]
async fn the_name_localhost_is_found() {
    let (port, server) = serve().await;
    let channel = BalancedChannel::builder()
        .source(Dns::new(format!("localhost:{port}")))
        .connect()
        .await
        .expect("a channel");
    let endpoints = channel.endpoints();
    let ready = |state| state == EndpointState::Ready;
    assert!(
        endpoints.iter().any(|endpoint| ready(endpoint.state)
            && endpoint.address.as_str() == format!("127.0.0.1:{port}")),
        "{endpoints:?}"
    );
    server.abort();
}
