//! Server processes that are killed while calls are in flight on them.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use greeter::HelloReply;
use greeter::greeter_server::{Greeter, GreeterServer};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tonic::Streaming;
use tonic::transport::Server as TonicServer;
use tonic::transport::server::TcpIncoming;

use super::*;

/// Where a process of this test is to serve.
const SERVE_AT: &str = "TONIC_ETCD_TEST_SERVE_AT";

/// A greeter that takes a millisecond, so that every kill meets calls.
struct Unhurried;

#[tonic::async_trait]
impl Greeter for Unhurried {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        sleep(Duration::from_millis(1)).await;
        let message = request.into_inner().name;
        Ok(Response::new(HelloReply { message }))
    }

    type SayHellosStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn say_hellos(
        &self,
        _: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn greet_all(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    type ChatStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn chat(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

/// The server process: this test binary, started again with an address. As a test it has nothing to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_serves() {
    let Ok(address) = std::env::var(SERVE_AT) else {
        return;
    };
    let listener = TcpListener::bind(&address).await.unwrap();
    eprintln!("serving at {}", listener.local_addr().unwrap());
    TonicServer::builder()
        .add_service(GreeterServer::new(Unhurried))
        .serve_with_incoming(TcpIncoming::from(listener))
        .await
        .unwrap();
}

/// A server process.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    async fn start(address: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kills::a_process_that_serves", "--nocapture"])
            .env(SERVE_AT, address)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let serving = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Some(address) = line.strip_prefix("serving at ") {
                    return address.to_owned();
                }
            }
            panic!("the server does not serve");
        };
        let address = timeout(SOON, serving).await.expect("a server in time");
        Self { child, address }
    }

    /// `kill -9`, and the same address again after a while.
    async fn kill_and_restart(&mut self, down: Duration) {
        self.child.kill().await.unwrap();
        sleep(down).await;
        *self = Self::start(&self.address).await;
    }
}

/// What callers have to tell.
#[derive(Default)]
struct Tally {
    stop: AtomicBool,
    calls: AtomicU64,
    retried: AtomicU64,
}

async fn call(channel: BalancedChannel, tally: Arc<Tally>) -> Vec<Status> {
    let mut failed = Vec::new();
    while !tally.stop.load(Ordering::SeqCst) {
        tally.calls.fetch_add(1, Ordering::SeqCst);
        match say_within(&channel, Some(Duration::from_secs(10))).await {
            Ok(response) => {
                let retried = response
                    .metadata()
                    .contains_key("grpc-previous-rpc-attempts");
                tally
                    .retried
                    .fetch_add(u64::from(retried), Ordering::SeqCst);
            }
            Err(status) => failed.push(status),
        }
    }
    failed
}

/// With `SOAK=1` it is a hundred kills, and each server is away for a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_when_servers_are_killed_one_after_the_other() {
    let soak = std::env::var_os("SOAK").is_some();
    let (kills, down) = if soak { (100, 1_000) } else { (10, 100) };
    let mut servers = Vec::new();
    for _ in 0..4 {
        servers.push(Process::start("127.0.0.1:0").await);
    }
    let channel = retrying(RetryPolicy::new([Code::Unavailable]))
        .max_backoff(Duration::from_millis(200))
        .from_addresses(servers.iter().map(|server| &server.address));
    ready(&channel, 4).await;
    let tally = Arc::<Tally>::default();
    let callers: Vec<_> = (0..16)
        .map(|_| tokio::spawn(call(channel.clone(), Arc::clone(&tally))))
        .collect();
    for kill in 0..kills {
        let server = &mut servers[kill % 4];
        server.kill_and_restart(Duration::from_millis(down)).await;
        ready(&channel, 4).await;
    }
    tally.stop.store(true, Ordering::SeqCst);
    let mut failed = Vec::new();
    for caller in callers {
        failed.extend(timeout(SOON, caller).await.unwrap().unwrap());
    }
    let calls = tally.calls.load(Ordering::SeqCst);
    let retried = tally.retried.load(Ordering::SeqCst);
    eprintln!(
        "{kills} kill -9: {calls} calls, {retried} retried, {} failed",
        failed.len()
    );
    assert!(failed.is_empty(), "{:#?}", failed.first());
    assert!(retried > 0, "the kills have met calls");
}
