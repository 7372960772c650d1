//! Server processes that are killed while calls are in flight on them.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use support::callers::Callers;
use support::counting::Counting;
use support::soak;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tonic::transport::server::TcpIncoming;

use super::*;

/// Environment variable with the address on which a server process of this test listens.
const SERVE_AT: &str = "TONIC_ETCD_TEST_SERVE_AT";

/// The server process: the test below starts this test binary again and sets the variable. Without the variable, this test does nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_serves() {
    let Ok(address) = std::env::var(SERVE_AT) else {
        return;
    };
    let listener = TcpListener::bind(&address).await.unwrap();
    eprintln!("serving at {}", listener.local_addr().unwrap());
    // Each call takes a millisecond, so that calls are in flight at every kill.
    Counting::slow(Duration::from_millis(1))
        .router()
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
            panic!("the server has ended before it serves");
        };
        let address = timeout(SOON, serving).await.expect("the server starts");
        Self { child, address }
    }

    /// Kills the server with SIGKILL, waits for `down`, and starts the server on the same address again.
    async fn kill_and_restart(&mut self, down: Duration) {
        self.child.kill().await.unwrap();
        sleep(down).await;
        *self = Self::start(&self.address).await;
    }
}

/// With `SOAK=1`, the test kills a server a hundred times, and the server is down for one second each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_servers_are_killed_one_after_another() {
    let (kills, down) = soak("kills, and milliseconds down", (10, 100), (100, 1_000));
    let mut servers = Vec::new();
    for _ in 0..4 {
        servers.push(Process::start("127.0.0.1:0").await);
    }
    let channel = retrying(RetryPolicy::new([Code::Unavailable]))
        .max_backoff(Duration::from_millis(200))
        .addresses(servers.iter().map(|server| &server.address))
        .connect_lazy();
    all_ready(&channel, 4).await;
    let retried = Arc::new(AtomicU64::new(0));
    let (called, counter) = (channel.clone(), Arc::clone(&retried));
    let callers = Callers::making(&channel, 16, move |_| {
        let (called, counter) = (called.clone(), Arc::clone(&counter));
        async move {
            let response = say_within(&called, Some(Duration::from_secs(10))).await?;
            let retried = response
                .metadata()
                .contains_key("grpc-previous-rpc-attempts");
            counter.fetch_add(u64::from(retried), Ordering::SeqCst);
            Ok(())
        }
    });
    for kill in 0..kills {
        let server = &mut servers[kill % 4];
        server.kill_and_restart(Duration::from_millis(down)).await;
        all_ready(&channel, 4).await;
    }
    let calls = callers.none_failed().await;
    let retried = retried.load(Ordering::SeqCst);
    eprintln!("{kills} kills: {calls} calls, {retried} retried, 0 failed");
    assert!(retried > 0, "no call was retried");
}

/// Returns the server of each of 100 keys.
async fn servers_of_keys(channel: &BalancedChannel) -> Vec<String> {
    let mut servers = Vec::new();
    let mut client = GreeterClient::new(channel.clone());
    for key in 0..100_u32 {
        let mut request = Request::new(HelloRequest::default());
        request
            .extensions_mut()
            .insert(HashKey::new(key.to_string()));
        let response = client.say_hello(request).await.expect("no call fails");
        let served_by = response.extensions().get::<ServedBy>().unwrap();
        servers.push(served_by.address().to_string());
    }
    servers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_a_killed_server_return_when_it_is_restarted() {
    let mut servers = Vec::new();
    for _ in 0..4 {
        servers.push(Process::start("127.0.0.1:0").await);
    }
    let channel = retrying(RetryPolicy::new([Code::Unavailable]))
        .policy(LbPolicy::RingHash)
        .max_backoff(Duration::from_millis(200))
        .addresses(servers.iter().map(|server| &server.address))
        .connect_lazy();
    all_ready(&channel, 4).await;
    let before = servers_of_keys(&channel).await;
    let victim = servers[0].address.clone();
    assert!(before.contains(&victim));
    servers[0].child.kill().await.unwrap();
    let without = servers_of_keys(&channel).await;
    for (before, without) in before.iter().zip(&without) {
        assert_ne!(*without, victim);
        assert!(before == without || *before == victim, "another key moves");
    }
    servers[0] = Process::start(&victim).await;
    all_ready(&channel, 4).await;
    assert_eq!(servers_of_keys(&channel).await, before);
}
