//! What the tests share: an etcd with a client of its own, greeters that count, and polling with a deadline.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    clippy::panic,
    reason = "each test file uses its part; a failed step here is a failed test"
)]

use std::fmt::Debug;
use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::server::Router;
use tonic::transport::{Channel, Server};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{
    BalancedChannel, EndpointState, RegistrationBuilder, Registry, Resolver, ServeError,
    ServeRegistered,
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
pub mod relay;
pub mod roles;
#[cfg(feature = "tls")]
pub mod tls;

use greeter::greeter_client::GreeterClient;
use greeter::greeter_server::GreeterServer;
use greeter::{HelloRequest, NamedGreeter};

pub const SERVICE: &str = "helloworld.Greeter";

/// How long anything may take that ought to happen at once, on a machine that does other things as well.
pub const SOON: Duration = Duration::from_secs(20);

/// An etcd with one member.
pub async fn etcd() -> Etcd {
    Etcd::start().await.unwrap()
}

pub async fn registry(etcd: &Etcd) -> Registry {
    Registry::connect(etcd.endpoints()).await.unwrap()
}

/// An etcd, and a service in it that is watched.
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

    /// A registration for the service, with hardly a grace period.
    pub fn registration(&self) -> RegistrationBuilder {
        self.registry
            .registration("greeter")
            .grace_period(Duration::from_millis(10))
    }

    /// Starts a server and waits until it is found; says where.
    pub async fn start(&self, registration: RegistrationBuilder) -> (Registered, String) {
        let server = Registered::start("alpha", "127.0.0.1:0", registration);
        (server, self.the_one().await)
    }

    /// Waits until exactly so many instances are known.
    pub async fn counts(&self, instances: usize) {
        eventually("the instances are known", async || {
            self.resolver.instances().len() == instances
        })
        .await;
    }

    /// Waits until exactly one instance is known, and gives its address.
    pub async fn the_one(&self) -> String {
        self.counts(1).await;
        addresses(&self.resolver).remove(0)
    }

    /// The keys that etcd holds.
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

/// A client of tonic's own for one server.
pub async fn connect(address: &str) -> GreeterClient<Channel> {
    GreeterClient::connect(format!("http://{address}"))
        .await
        .unwrap()
}

/// A plain client, for what `etcdctl` would do.
pub async fn client(etcd: &Etcd) -> etcd_client::Client {
    etcd_client::Client::connect(etcd.endpoints(), None)
        .await
        .unwrap()
}

/// Polls until the condition holds; fails with the words given after [`SOON`].
pub async fn eventually(what: &str, condition: impl AsyncFnMut() -> bool) {
    within(SOON, what, condition).await;
}

/// Polls until the condition holds, and says how long that took.
pub async fn within(
    bound: Duration,
    what: &str,
    mut condition: impl AsyncFnMut() -> bool,
) -> Duration {
    let start = Instant::now();
    loop {
        if timeout(bound, condition()).await.unwrap_or_default() {
            return Instant::now().saturating_duration_since(start);
        }
        let waited = Instant::now().saturating_duration_since(start);
        assert!(waited < bound, "not within {bound:?}: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// The addresses that a resolver knows, in order.
pub fn addresses(resolver: &Resolver) -> Vec<String> {
    resolver
        .instances()
        .iter()
        .map(|instance| instance.address().to_string())
        .collect()
}

/// Waits until a resolver knows exactly these addresses.
pub async fn knows(resolver: &Resolver, expected: &[&str]) {
    let mut expected: Vec<_> = expected.iter().map(ToString::to_string).collect();
    expected.sort();
    let what = format!("the resolver knows {expected:?}");
    eventually(&what, async || {
        let mut known = addresses(resolver);
        known.sort();
        known == expected
    })
    .await;
}

/// Registers, resolves, renews a few times, and deregisters.
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
    // The first of them is the state as it is.
    for _ in 0..3 {
        states.changed().await.unwrap();
        assert!(states.borrow_and_update().is_registered());
    }
    registration.deregister().await.unwrap();
    knows(&resolver, &[]).await;
}

/// A greeter in this process that is not registered.
pub async fn greeter(name: &str) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let router = Server::builder().add_service(GreeterServer::new(NamedGreeter(name.to_owned())));
    let task = tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
    (address, task)
}

/// A greeter in this process that is registered.
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
        let (stop, stopped) = oneshot::channel();
        let address = address.parse().unwrap();
        let task = tokio::spawn(async move {
            router
                .serve_registered_with_shutdown(address, registration, async {
                    drop(stopped.await);
                })
                .await
        });
        Self {
            stop: Some(stop),
            task,
        }
    }

    pub fn stop(&mut self) {
        drop(self.stop.take());
    }

    /// Stops it and waits for its end.
    pub async fn stopped(mut self) -> Result<(), ServeError> {
        self.stop();
        timeout(SOON, self.task).await.unwrap().unwrap()
    }
}

/// Waits until exactly so many endpoints are known to a channel and ready.
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

/// One of two sizes: with `SOAK=1` in the environment tests run at full size and for long. A test that is cut down otherwise says so.
pub fn soak<T: Debug>(what: &str, small: T, full: T) -> T {
    if std::env::var_os("SOAK").is_some_and(|soak| soak == "1") {
        return full;
    }
    // Past the capture of the test harness: what is left out is to be seen.
    let left_out = format!("{what}: {small:?} of {full:?}; all of it with SOAK=1\n");
    std::io::stderr().write_all(left_out.as_bytes()).unwrap();
    small
}

/// How many files this process has open.
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The keys and values under a prefix, as etcd lists them.
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
