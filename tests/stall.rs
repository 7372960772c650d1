//! A server that is frozen under load, and thawed. Alone in its process, for the machine to be its own.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a failed step is a failed test"
)]

mod support;

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::{etcd, eventually, registry, within};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tonic::{Code, Request, Status};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, EndpointState, EndpointStatus, ServedBy};

const SERVERS: usize = 4;
const CALLERS: usize = 16;
/// Longer than every wait on the way out and back in, and shorter than the lease: the registry knows nothing of it.
const FROZEN: Duration = Duration::from_secs(6);

/// The example server, built along with the tests.
fn server(etcd: &Etcd) -> Child {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    folder.pop();
    Command::new(folder.join("examples/greeter_server"))
        .env("ETCD_ENDPOINTS", etcd.endpoint(0))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

fn signal(server: &Child, signal: Signal) {
    let pid = i32::try_from(server.id().unwrap()).unwrap();
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[derive(Default)]
struct Counted {
    stop: AtomicBool,
    calls: AtomicU64,
    failed: AtomicU64,
}

async fn call(channel: BalancedChannel, deadline: Duration) -> Result<(String, String), Status> {
    let mut request = Request::new(HelloRequest::default());
    request.set_timeout(deadline);
    let response = GreeterClient::new(channel).say_hello(request).await?;
    let served_by: &ServedBy = response.extensions().get().unwrap();
    let address = served_by.address().to_string();
    Ok((response.into_inner().message, address))
}

async fn call_until_stopped(channel: BalancedChannel, counted: Arc<Counted>) {
    while !counted.stop.load(Ordering::SeqCst) {
        counted.calls.fetch_add(1, Ordering::SeqCst);
        if let Err(status) = call(channel.clone(), Duration::from_millis(250)).await {
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
            counted.failed.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn status(channel: &BalancedChannel, address: &str) -> EndpointStatus {
    let endpoints = channel.endpoints();
    let found = endpoints
        .into_iter()
        .find(|endpoint| endpoint.address.as_str() == address);
    found.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_costs_a_handful_of_calls_and_is_back_when_it_thaws() {
    let etcd = etcd().await;
    let servers: Vec<_> = (0..SERVERS).map(|_| server(&etcd)).collect();
    let registry = registry(&etcd).await;
    let channel = registry.channel("helloworld.Greeter").connect_lazy();
    eventually("all servers are ready", async || {
        let endpoints = channel.endpoints();
        let ready = endpoints
            .iter()
            .filter(|endpoint| endpoint.state == EndpointState::Ready);
        ready.count() == SERVERS
    })
    .await;
    let name = format!("server {}", servers[0].id().unwrap());
    let mut frozen = String::new();
    eventually("the server to be frozen has served", async || {
        let (message, address) = call(channel.clone(), Duration::from_secs(5)).await.unwrap();
        frozen = address;
        message.ends_with(&name)
    })
    .await;

    let counted = Arc::new(Counted::default());
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        callers.spawn(call_until_stopped(channel.clone(), Arc::clone(&counted)));
    }
    let calls = || counted.calls.load(Ordering::SeqCst);
    eventually("the callers are under way", async || calls() > 2_000).await;
    signal(&servers[0], Signal::SIGSTOP);
    let out = within(FROZEN, "the frozen server is out", async || {
        status(&channel, &frozen).ejected
    })
    .await;
    let (calls_then, failed_then) = (calls(), counted.failed.load(Ordering::SeqCst));
    tokio::time::sleep(FROZEN.saturating_sub(out)).await;
    let failed = counted.failed.load(Ordering::SeqCst);
    let after = calls() - calls_then;
    println!(
        "out after {out:?} and {failed_then} failed calls; then {} of {after}",
        failed - failed_then
    );
    assert!(status(&channel, &frozen).ejected, "it is still frozen");
    // What was on its way when it went out may fail afterwards.
    assert!(failed - failed_then <= CALLERS as u64);
    assert!(
        failed <= 4 * CALLERS as u64,
        "a handful for each caller at most: {failed}"
    );

    let served = status(&channel, &frozen).calls;
    signal(&servers[0], Signal::SIGCONT);
    let back = within(
        Duration::from_secs(5),
        "the server is back in use",
        async || {
            let status = status(&channel, &frozen);
            !status.ejected && status.calls > served + 100
        },
    )
    .await;
    println!("back after {back:?}");
    counted.stop.store(true, Ordering::SeqCst);
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
    assert!(
        counted.failed.load(Ordering::SeqCst) * 1_000 < calls() * 5,
        "{} of {} calls failed",
        counted.failed.load(Ordering::SeqCst),
        calls()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_frozen_server_stays_in_use() {
    let etcd = etcd().await;
    let only = server(&etcd);
    let registry = registry(&etcd).await;
    let channel = registry.channel("helloworld.Greeter");
    let channel = channel.wait_for_ready(true).connect_lazy();
    let (_, address) = call(channel.clone(), Duration::from_secs(10))
        .await
        .unwrap();
    signal(&only, Signal::SIGSTOP);
    within(Duration::from_secs(5), "it is noticed", async || {
        let _ = call(channel.clone(), Duration::from_millis(250)).await;
        status(&channel, &address).ejected
    })
    .await;
    let waiting = tokio::spawn(call(channel.clone(), Duration::from_secs(10)));
    signal(&only, Signal::SIGCONT);
    waiting.await.unwrap().unwrap();
}
