//! A real etcd, gRPC servers, and the command.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use etcd_client::{Client, PutOptions};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic_etcd::testing::{Etcd, EtcdBuilder};
use tonic_etcd::{Registration, Registry};

pub(crate) const SERVICE: &str = "helloworld.Greeter";
/// Timeout for events that should occur at once. It is long enough for a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Returns a builder of an etcd that elects a leader quickly.
pub(crate) fn builder() -> EtcdBuilder {
    Etcd::builder()
        .arg("--heartbeat-interval=10")
        .arg("--election-timeout=100")
}

pub(crate) async fn etcd() -> Etcd {
    builder().start().await.unwrap()
}

pub(crate) async fn client(etcd: &Etcd) -> Client {
    Client::connect(etcd.endpoints(), None).await.unwrap()
}

/// Returns the command, with the endpoints of etcd, and without the variables of `etcdctl` in the environment of the test.
pub(crate) fn command(etcd: &Etcd, arguments: &[&str]) -> Command {
    let mut command = bare(arguments);
    command.env("ETCDCTL_ENDPOINTS", etcd.endpoints().join(","));
    command
}

/// Returns the command without endpoints.
pub(crate) fn bare(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tonic-etcd"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ETCDCTL_") {
            command.env_remove(name);
        }
    }
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// The result of a command.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// Returns the lines of stdout as JSON.
    pub(crate) fn json(&self) -> Vec<Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{self:?}"));
        self.stdout.lines().map(parse).collect()
    }
}

/// Runs the command until it exits.
pub(crate) async fn run(etcd: &Etcd, arguments: &[&str]) -> Outcome {
    outcome(command(etcd, arguments)).await
}

pub(crate) async fn outcome(mut command: Command) -> Outcome {
    outcome_of(command.spawn().unwrap()).await
}

/// Waits until a running command exits.
pub(crate) async fn outcome_of(child: Child) -> Outcome {
    let output = timeout(SOON, child.wait_with_output()).await;
    let output = output.expect("the command must exit").unwrap();
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Lines of stdout of a running command.
pub(crate) type Output = Lines<BufReader<ChildStdout>>;

pub(crate) fn lines(child: &mut Child) -> Output {
    BufReader::new(child.stdout.take().unwrap()).lines()
}

/// Reads lines up to the first that contains a text, and returns that line.
pub(crate) async fn line_with(lines: &mut Output, text: &str) -> String {
    let found = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains(text) {
                return line;
            }
        }
        panic!("no line with {text:?}");
    };
    let found = timeout(SOON, found).await;
    found.unwrap_or_else(|_| panic!("no line with {text:?} in time"))
}

pub(crate) fn signal(child: &Child, signal: Signal) {
    let id = i32::try_from(child.id().unwrap()).unwrap();
    kill(Pid::from_raw(id), signal).unwrap();
}

/// Waits until a command exits, and returns its code.
pub(crate) async fn code(child: &mut Child) -> Option<i32> {
    let status = timeout(SOON, child.wait()).await;
    status.expect("the command must exit").unwrap().code()
}

/// Polls until the condition holds. Panics with `what` after [`SOON`].
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        let waited = Instant::now().saturating_duration_since(start);
        assert!(waited < SOON, "not within {SOON:?}: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Starts a gRPC server with the health service. It ends with the runtime of the test.
pub(crate) async fn grpc_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (_, health) = tonic_health::server::health_reporter();
    let router = Server::builder().add_service(health);
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

/// Returns an address that refuses connections.
pub(crate) async fn dead_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

/// Registers an address under a lease that is renewed.
pub(crate) async fn register(etcd: &Etcd, address: SocketAddr) -> Registration {
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    // The TTL is long, so that the lease is not close to its end while the machine is busy.
    let registration = registry
        .registration(SERVICE)
        .address(address.to_string())
        .ttl(Duration::from_secs(60));
    registration.register().await.unwrap()
}

/// Writes an instance under a lease of 10 minutes, which is not renewed. Returns its key.
pub(crate) async fn put(client: &Client, id: &str, value: &str) -> String {
    let lease = client.lease_client().grant(600, None).await.unwrap().id();
    let key = format!("/gRPC/{SERVICE}/{id}");
    let options = PutOptions::new().with_lease(lease);
    let mut kv = client.kv_client();
    kv.put(key.as_str(), value, Some(options)).await.unwrap();
    key
}

pub(crate) async fn delete(client: &Client, key: &str) {
    client.kv_client().delete(key, None).await.unwrap();
}

pub(crate) fn value(address: SocketAddr) -> String {
    format!(r#"{{"Op":0,"Addr":"{address}"}}"#)
}

/// Returns the value of a key, if it exists.
pub(crate) async fn get(client: &Client, key: &str) -> Option<String> {
    let read = client.kv_client().get(key, None).await.unwrap();
    let value = read.kvs().first()?.value_str().unwrap();
    Some(value.to_owned())
}
