//! Maximum age, metadata limit, deadlines and health checks of tonic's own servers, which most users of this library call.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::sleep;
use tonic::Code;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_etcd::{BalancedChannel, channel::ChannelBuilder};

use super::support::callers::Callers;
use super::support::counting::Counting;
use super::support::greeter::greeter_server::GreeterServer;
use super::{all_well, hello, ms, over, retrying, say, send, shown};

/// A tonic greeter with a health service.
struct Tonic {
    address: SocketAddr,
    counter: Counting,
    task: AbortHandle,
}

impl Tonic {
    async fn start(server: Server, counter: Counting) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_serving::<GreeterServer<Counting>>().await;
        let mut server = server;
        let router = server
            .add_service(GreeterServer::new(counter.clone()))
            .add_service(health);
        let task = tokio::spawn(async move {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            router.serve_with_incoming(incoming).await.unwrap();
        });
        Self {
            address,
            counter,
            task: task.abort_handle(),
        }
    }
}

impl Drop for Tonic {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn some(servers: usize, server: impl Fn() -> Server) -> (Vec<Tonic>, Vec<String>) {
    let mut all = Vec::new();
    for _ in 0..servers {
        all.push(Tonic::start(server(), Counting::default()).await);
    }
    let addresses = all.iter().map(|one| one.address.to_string()).collect();
    (all, addresses)
}

fn checked() -> ChannelBuilder {
    BalancedChannel::builder().health_check("helloworld.Greeter")
}

/// One of the three channels has health checks. When a connection ends, the health watch on it ends as well. This does not mean that the
/// server is unhealthy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_maximum_age_of_tonics_servers_fails_no_call() {
    for builder in [
        BalancedChannel::builder as fn() -> ChannelBuilder,
        checked,
        retrying,
    ] {
        for servers in [1, 3] {
            let aged = || Server::builder().max_connection_age(ms(300));
            let (all, addresses) = some(servers, aged).await;
            let channel = over(builder(), &addresses).await;
            let what = format!("{servers} tonic servers");
            let calls = all_well(Callers::start(&channel, 8), ms(2_000), &what).await;
            let executed: u64 = all.iter().map(|one| one.counter.count()).sum();
            assert_eq!(executed, calls, "{what}: each call must run once");
        }
    }
}

/// hyper announces a limit of 16 KiB, and closes the connection if the metadata are slightly larger.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_beyond_the_limit_of_tonics_servers_are_not_sent() {
    for (builder, bytes) in [
        (BalancedChannel::builder as fn() -> ChannelBuilder, 120_000),
        (retrying, 120_000),
        (BalancedChannel::builder, 20_000),
        (retrying, 300_000),
    ] {
        let (all, addresses) = some(4, Server::builder).await;
        let channel = over(builder(), &addresses).await;
        let bystanders = Callers::start(&channel, 8);
        sleep(ms(200)).await;
        let mut statuses = Vec::new();
        for _ in 0..3 {
            let mut request = hello();
            request.set_timeout(Duration::from_secs(5));
            let value = "0123456789".repeat(bytes / 10);
            request
                .metadata_mut()
                .insert("x-large", value.parse().unwrap());
            statuses.push(
                send(&channel, request)
                    .await
                    .expect_err("a call with too much metadata must fail"),
            );
            sleep(ms(200)).await;
        }
        let (calls, failed) = bystanders.stopped().await;
        println!(
            "{bytes} bytes: of {calls} calls {}; {:?}",
            shown(&failed),
            statuses[0]
        );
        assert!(
            failed.is_empty(),
            "{bytes} bytes: no unrelated call may fail: {}",
            shown(&failed)
        );
        for status in statuses {
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
            assert!(
                status.message().contains("16384"),
                "the message must contain the limit: {status:?}"
            );
        }
        drop(all);
    }
}

/// tonic's servers end an expired call with their own status, which may arrive before the client's timer fires.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_that_tonics_server_enforces_is_the_deadline() {
    let slow = Counting::slow(ms(2_000));
    let server = Tonic::start(Server::builder(), slow).await;
    let channel = over(BalancedChannel::builder(), &[server.address.to_string()]).await;
    let mut wrong = Vec::new();
    for deadline in [10, 50] {
        for _ in 0..20 {
            let mut calls = tokio::task::JoinSet::new();
            for _ in 0..8 {
                let channel = channel.clone();
                calls.spawn(async move { say(&channel, ms(deadline)).await });
            }
            for outcome in calls.join_all().await {
                let status = outcome.expect_err("a call of two seconds must fail");
                if status.code() != Code::DeadlineExceeded {
                    wrong.push(status);
                }
            }
        }
    }
    println!("{} of 320 calls are not DEADLINE_EXCEEDED", wrong.len());
    assert!(
        wrong.is_empty(),
        "{} calls did not end in DEADLINE_EXCEEDED: {:?}",
        wrong.len(),
        wrong[0]
    );
}

/// The end of a health watch removes no server from the ready set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_checked_servers_that_close_connections_keep_their_share() {
    let aged = || Server::builder().max_connection_age(ms(400));
    let (all, addresses) = some(4, aged).await;
    let channel = over(checked(), &addresses).await;
    let callers = Callers::start(&channel, 4);
    all_well(callers, ms(2_500), "four watched servers").await;
    let counts: Vec<_> = all.iter().map(|one| one.counter.count()).collect();
    println!("{counts:?}");
    let least = counts.iter().min().unwrap();
    let most = counts.iter().max().unwrap();
    assert!(
        least * 6 > *most,
        "no server may get less than a sixth of the calls of another server: {counts:?}"
    );
}
