//! A server that is frozen under load, and thawed. The tests have a file of their own, because Cargo runs the tests of other files at other
//! times. Load from other tests would make calls exceed their deadlines.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use nix::sys::signal::Signal;
use support::callers::Callers;
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::program::{greeter_server, signal};
use support::{all_ready, etcd, eventually, registry, within};
use tonic::{Code, Request, Status};
use tonic_etcd::{
    BalancedChannel,
    channel::{EndpointStatus, ServedBy},
};

const SERVERS: usize = 4;
const CALLERS: usize = 16;
/// Duration of the freeze. The channel ejects the server in less time, and would use a recovered server again in less time. The freeze is
/// shorter than the TTL of the server's lease, so that the server stays registered.
const FROZEN: Duration = Duration::from_secs(6);

async fn call(channel: BalancedChannel, deadline: Duration) -> Result<(String, String), Status> {
    let mut request = Request::new(HelloRequest::default());
    request.set_timeout(deadline);
    let response = GreeterClient::new(channel).say_hello(request).await?;
    let served_by: &ServedBy = response.extensions().get().unwrap();
    let address = served_by.address().to_string();
    Ok((response.into_inner().message, address))
}

/// Starts callers with deadlines of 250 ms. Each call must succeed or exceed its deadline.
fn callers(channel: &BalancedChannel) -> Callers {
    let called = channel.clone();
    Callers::making(channel, CALLERS, move |_| {
        let called = called.clone();
        async move {
            let outcome = call(called, Duration::from_millis(250)).await;
            outcome.map(drop).inspect_err(|status| {
                assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
            })
        }
    })
}

/// Returns whether a process is stopped by a signal.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.starts_with('T')
}

fn status(channel: &BalancedChannel, address: &str) -> EndpointStatus {
    let endpoints = channel.endpoints();
    let found = endpoints
        .into_iter()
        .find(|endpoint| endpoint.address.as_str() == address);
    found.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_fails_a_handful_of_calls_and_is_used_again_after_it_thaws() {
    let etcd = etcd().await;
    let servers: Vec<_> = (0..SERVERS).map(|_| greeter_server(&etcd)).collect();
    let registry = registry(&etcd).await;
    let channel = registry.channel("helloworld.Greeter").connect_lazy();
    all_ready(&channel, SERVERS).await;
    let name = format!("server {}", servers[0].id().unwrap());
    let mut frozen = String::new();
    eventually(
        "the server that will be frozen has served a call",
        async || {
            let (message, address) = call(channel.clone(), Duration::from_secs(5)).await.unwrap();
            frozen = address;
            message.ends_with(&name)
        },
    )
    .await;

    let mut callers = callers(&channel);
    eventually("the callers make calls", async || callers.calls() > 2_000).await;
    signal(&servers[0], Signal::SIGSTOP);
    eventually("the server is frozen", async || {
        is_stopped(servers[0].id().unwrap())
    })
    .await;
    // Only calls that are sent to the frozen server may fail.
    let sent = || status(&channel, &frozen).calls;
    let before = sent();
    let out = within(FROZEN, "the frozen server is ejected", async || {
        status(&channel, &frozen).ejected
    })
    .await;
    let (calls, first) = (callers.calls(), sent() - before);
    // Waits until the freeze has lasted for `FROZEN`. The frozen server is expected to receive no new calls in this time.
    tokio::time::sleep(FROZEN.saturating_sub(out)).await;
    let (after, all) = (callers.calls() - calls, sent() - before);
    println!(
        "ejected after {out:?} and {first} calls; then it received {} of {after} calls",
        all - first
    );
    assert!(
        status(&channel, &frozen).ejected,
        "the frozen server must stay ejected"
    );
    // Calls that picked the server before its ejection may still be sent.
    assert!(
        all - first <= CALLERS as u64,
        "the server received {first} calls before the ejection, and {} after it",
        all - first
    );
    assert!(
        all <= 4 * CALLERS as u64,
        "the frozen server received {all} calls"
    );
    let failed = callers.failed().len();

    let served = status(&channel, &frozen).calls;
    signal(&servers[0], Signal::SIGCONT);
    let back = within(
        Duration::from_secs(5),
        "the server receives calls again",
        async || {
            let status = status(&channel, &frozen);
            !status.ejected && status.calls > served + 100
        },
    )
    .await;
    println!("used again after {back:?}");
    let (calls, last) = callers.stopped().await;
    let failed = (failed + last.len()) as u64;
    println!("{failed} of {calls} calls failed");
    // Calls to other servers have a deadline of 250 ms too. On a busy machine, some of them exceed it.
    assert!(
        failed <= all + calls / 50,
        "{failed} of {calls} calls failed, but only {all} were sent to the frozen server"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_wait_for_a_lone_frozen_server_and_succeed_after_it_thaws() {
    let etcd = etcd().await;
    let only = greeter_server(&etcd);
    let registry = registry(&etcd).await;
    let channel = registry.channel("helloworld.Greeter");
    let channel = channel.wait_for_ready(true).connect_lazy();
    let (_, address) = call(channel.clone(), Duration::from_secs(10))
        .await
        .unwrap();
    signal(&only, Signal::SIGSTOP);
    within(Duration::from_secs(5), "ejected", async || {
        let _ = call(channel.clone(), Duration::from_millis(250)).await;
        status(&channel, &address).ejected
    })
    .await;
    let waiting = tokio::spawn(call(channel.clone(), Duration::from_secs(10)));
    // While the server is frozen, every call can only wait.
    call(channel.clone(), Duration::from_millis(500))
        .await
        .expect_err("a call to a frozen server must fail");
    assert!(!waiting.is_finished());
    signal(&only, Signal::SIGCONT);
    waiting.await.unwrap().unwrap();
}
