//! Shared parts of the tests: a real etcd, test servers, callers, relays, and polling with a timeout.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    clippy::panic,
    reason = "each test file uses only a part of the module; a failed step here is a failed test"
)]

use std::fmt::Debug;
use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::transport::server::Router;
use tonic::transport::{Channel, Server};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{
    BalancedChannel, Registry, Resolver, ServeRegistered, channel::EndpointState,
    error::ServeError, registration::RegistrationBuilder,
};

pub mod authority;
pub mod backend;
pub mod callers;
pub mod counting;
#[path = "../../examples/greeter/mod.rs"]
pub mod greeter;
pub mod link;
pub mod peer;
pub mod program;
pub mod proxy;
#[cfg(unix)]
pub mod pty;
pub mod relay;
pub mod roles;
pub mod script;
#[cfg(feature = "tls")]
pub mod tls;
#[cfg(feature = "orca")]
pub mod utilization;

use greeter::greeter_client::GreeterClient;
use greeter::greeter_server::GreeterServer;
use greeter::{HelloRequest, NamedGreeter};

pub const SERVICE: &str = "helloworld.Greeter";

/// Timeout for events that should occur at once. It is long enough for a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// Starts an etcd with one member.
pub async fn etcd() -> Etcd {
    Etcd::start().await.unwrap()
}

pub async fn registry(etcd: &Etcd) -> Registry {
    Registry::connect(etcd.endpoints()).await.unwrap()
}

/// An etcd with one service, which a resolver watches.
pub struct World {
    pub etcd: Etcd,
    pub registry: Registry,
    pub resolver: Resolver,
}

impl World {
    pub async fn new() -> Self {
        let etcd = etcd().await;
        let registry = registry(&etcd).await;
        let resolver = registry.resolver("greeter").start();
        Self {
            etcd,
            registry,
            resolver,
        }
    }

    /// Returns a registration for the service with a very short grace period.
    pub fn registration(&self) -> RegistrationBuilder {
        self.registry
            .registration("greeter")
            .grace_period(Duration::from_millis(10))
    }

    /// Starts the only server, and waits until the resolver contains it. Returns the server and its address.
    pub async fn start(&self, registration: RegistrationBuilder) -> (Registered, String) {
        let server = Registered::start("alpha", "127.0.0.1:0", registration);
        (server, self.the_one().await)
    }

    /// Waits until the resolver contains exactly this many instances.
    pub async fn counts(&self, instances: usize) {
        eventually("the instances are known", async || {
            self.resolver.instances().len() == instances
        })
        .await;
    }

    /// Waits until the resolver contains exactly one instance and returns its address.
    pub async fn the_one(&self) -> String {
        self.counts(1).await;
        addresses(&self.resolver).remove(0)
    }

    /// Returns the number of keys in etcd.
    pub async fn keys(&self) -> usize {
        list(&client(&self.etcd).await, "/").await.len()
    }
}

pub fn hello() -> HelloRequest {
    HelloRequest {
        name: "test".to_owned(),
        replies: 1,
    }
}

/// Returns a client with tonic's own channel to one server.
pub async fn connect(address: &str) -> GreeterClient<Channel> {
    GreeterClient::connect(format!("http://{address}"))
        .await
        .unwrap()
}

/// Returns a plain etcd client, for operations that a user would run with `etcdctl`.
pub async fn client(etcd: &Etcd) -> etcd_client::Client {
    etcd_client::Client::connect(etcd.endpoints(), None)
        .await
        .unwrap()
}

/// Polls until the condition holds. Panics with `what` after [`SOON`].
pub async fn eventually(what: &str, condition: impl AsyncFnMut() -> bool) {
    within(SOON, what, condition).await;
}

/// Polls until the condition holds, and returns the elapsed time. Panics with `what` after `bound`.
pub async fn within(
    bound: Duration,
    what: &str,
    mut condition: impl AsyncFnMut() -> bool,
) -> Duration {
    let start = Instant::now();
    loop {
        if timeout_at(start + bound, condition())
            .await
            .unwrap_or_default()
        {
            return Instant::now().saturating_duration_since(start);
        }
        let waited = Instant::now().saturating_duration_since(start);
        assert!(waited < bound, "not within {bound:?}: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until a leader is elected, and returns its index.
pub async fn leader(etcd: &Etcd) -> usize {
    let mut leader = None;
    eventually("a leader is elected", async || {
        leader = etcd.leader().await;
        leader.is_some()
    })
    .await;
    leader.unwrap()
}

/// Returns the addresses of a resolver, in the order of its instances.
pub fn addresses(resolver: &Resolver) -> Vec<String> {
    resolver
        .instances()
        .iter()
        .map(|instance| instance.address().to_string())
        .collect()
}

/// Waits until a resolver contains exactly these addresses.
pub async fn knows(resolver: &Resolver, expected: &[&str]) {
    let mut expected: Vec<_> = expected.iter().map(ToString::to_string).collect();
    expected.sort();
    let what = format!("the resolver lists {expected:?}");
    eventually(&what, async || {
        let mut known = addresses(resolver);
        known.sort();
        known == expected
    })
    .await;
}

/// Registers an address, resolves it, waits for a few renewals, and deregisters it.
pub async fn keeps_a_registration(registry: &Registry) {
    let registration = registry
        .registration("greeter")
        .address("127.0.0.1:80")
        .ttl(Duration::from_secs(5))
        .register()
        .await
        .unwrap();
    let resolver = registry.resolver("greeter").start();
    knows(&resolver, &["127.0.0.1:80"]).await;
    let mut states = registration.watch_state();
    // The first change is the current state.
    for _ in 0..3 {
        states.changed().await.unwrap();
        assert!(states.borrow_and_update().is_registered());
    }
    registration.deregister().await.unwrap();
    knows(&resolver, &[]).await;
}

/// Starts a greeter in this process. It is not registered in etcd.
pub async fn greeter(name: &str) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let router = Server::builder().add_service(GreeterServer::new(NamedGreeter(name.to_owned())));
    let task = tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
    (address, task)
}

/// The future of a request to stop a server.
pub type Stopped = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// A registered greeter in this process.
pub struct Registered {
    pub stop: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<Result<(), ServeError>>,
}

impl Registered {
    pub fn start(name: &str, address: &str, registration: RegistrationBuilder) -> Self {
        let greeter = GreeterServer::new(NamedGreeter(name.to_owned()));
        let router = Server::builder().add_service(greeter);
        Self::serve(router, address, registration)
    }

    pub fn serve(router: Router, address: &str, registration: RegistrationBuilder) -> Self {
        let address = address.parse().unwrap();
        Self::serve_with(|stopped| async move {
            router
                .serve_registered_with_shutdown(address, registration, stopped)
                .await
        })
    }

    /// Starts a server, for example one with layers. `serve` receives the future of the request to stop.
    pub fn serve_with<F>(serve: impl FnOnce(Stopped) -> F) -> Self
    where
        F: Future<Output = Result<(), ServeError>> + Send + 'static,
    {
        let (stop, stopped) = oneshot::channel();
        let stopped: Stopped = Box::pin(async { drop(stopped.await) });
        Self {
            stop: Some(stop),
            task: tokio::spawn(serve(stopped)),
        }
    }

    pub fn stop(&mut self) {
        drop(self.stop.take());
    }

    /// Stops the server and waits until it has ended.
    pub async fn stopped(mut self) -> Result<(), ServeError> {
        self.stop();
        timeout(SOON, self.task).await.unwrap().unwrap()
    }
}

/// Waits until a channel has exactly this many endpoints, all of them ready.
pub async fn all_ready(channel: &BalancedChannel, endpoints: usize) {
    eventually("the endpoints are ready", async || {
        let known = channel.endpoints();
        known.len() == endpoints
            && known
                .iter()
                .all(|endpoint| endpoint.state == EndpointState::Ready)
    })
    .await;
}

/// Returns `full` with `SOAK=1` in the environment, and `small` without it. If the test is reduced, prints both sizes.
pub fn soak<T: Debug>(what: &str, small: T, full: T) -> T {
    if std::env::var_os("SOAK").is_some_and(|soak| soak == "1") {
        return full;
    }
    // The line is written directly to stderr, because the test harness captures the output of `eprintln!`.
    let left_out = format!("{what}: reduced to {small:?} of {full:?}; SOAK=1 runs all\n");
    std::io::stderr().write_all(left_out.as_bytes()).unwrap();
    small
}

/// Returns the number of files that this process has open.
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Returns the keys, values and leases under a prefix, as etcd lists them.
pub async fn list(client: &etcd_client::Client, prefix: &str) -> Vec<(String, String, i64)> {
    let options = etcd_client::GetOptions::new().with_prefix();
    let response = client.kv_client().get(prefix, Some(options)).await.unwrap();
    let pair = |kv: &etcd_client::KeyValue| {
        (
            kv.key_str().unwrap().to_owned(),
            String::from_utf8_lossy(kv.value()).into_owned(),
            kv.lease(),
        )
    };
    response.kvs().iter().map(pair).collect()
}
