//! Servers that are processes, killed one after the other under load. Alone in its process, for the machine to be its own.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::{SOON, etcd, eventually, registry, soak};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tonic::{Code, Request, Status};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, EndpointState, ServedBy};

const SERVERS: usize = 4;
const CALLERS: usize = 32;

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

/// A call that has failed.
struct Failed {
    began: Instant,
    status: Status,
}

/// Callers that never pause.
async fn call_until(
    channel: BalancedChannel,
    stop: watch::Receiver<bool>,
    failed: Arc<Mutex<Vec<Failed>>>,
) -> u64 {
    let mut client = GreeterClient::new(channel);
    let mut calls = 0;
    while !*stop.borrow() {
        calls += 1;
        let began = Instant::now();
        let mut request = Request::new(HelloRequest::default());
        request.set_timeout(Duration::from_secs(5));
        if let Err(status) = client.say_hello(request).await {
            failed.lock().unwrap().push(Failed { began, status });
        }
    }
    calls
}

/// Which server is where: the greeting has the process id, the response the address.
async fn locate(channel: &BalancedChannel) -> BTreeMap<u32, String> {
    let mut located = BTreeMap::new();
    let mut client = GreeterClient::new(channel.clone());
    let locating = async {
        while located.len() < SERVERS {
            let response = client.say_hello(HelloRequest::default()).await.unwrap();
            let address = response.extensions().get::<ServedBy>().unwrap();
            let address = address.address().to_string();
            let message = response.into_inner().message;
            let pid = message.rsplit(' ').next().unwrap().parse().unwrap();
            located.insert(pid, address);
        }
    };
    timeout(SOON, locating).await.expect("every server answers");
    located
}

async fn all_ready(channel: &BalancedChannel) {
    eventually("four servers are ready", async || {
        let statuses = channel.endpoints();
        let ready = statuses
            .iter()
            .filter(|status| status.state == EndpointState::Ready);
        ready.count() == SERVERS
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_fails_no_more_than_what_is_in_flight_on_the_killed() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let mut servers: Vec<_> = (0..SERVERS).map(|_| server(&etcd)).collect();
    let resolver = registry.resolver(support::SERVICE);
    eventually("four are registered", async || {
        resolver.instances().len() == SERVERS
    })
    .await;
    let channel = registry.channel(support::SERVICE).connect().await.unwrap();
    all_ready(&channel).await;
    let (stop, stopped) = watch::channel(false);
    let failed = Arc::new(Mutex::new(Vec::new()));
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        callers.spawn(call_until(
            channel.clone(),
            stopped.clone(),
            Arc::clone(&failed),
        ));
    }
    for kill in 0..soak("kills", SERVERS, 400) {
        all_ready(&channel).await;
        let located = locate(&channel).await;
        let mut victim = servers.remove(0);
        let address = located[&victim.id().unwrap()].clone();
        failed.lock().unwrap().clear();
        victim.kill().await.unwrap();
        let of_victim = || {
            let mut statuses = channel.endpoints().into_iter();
            statuses.find(|status| status.address.to_string() == address)
        };
        eventually("the loss is seen", async || {
            of_victim().is_none_or(|status| status.state != EndpointState::Ready)
        })
        .await;
        let seen = Instant::now();
        eventually("no call is in flight there", async || {
            of_victim().is_none_or(|status| status.in_flight == 0)
        })
        .await;
        // One second down.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let failures = std::mem::take(&mut *failed.lock().unwrap());
        println!("kill {kill}: {} calls failed", failures.len());
        assert!(
            failures.len() <= CALLERS,
            "each caller has one call in flight"
        );
        for Failed { began, status } in &failures {
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            assert!(
                status.message().contains(&address),
                "{address} was killed: {status}"
            );
            assert!(
                *began <= seen,
                "a call went to {address} after its loss was seen"
            );
        }
        servers.push(server(&etcd));
        eventually("the next one serves", async || {
            let statuses = channel.endpoints();
            statuses.len() > SERVERS - 1
                && statuses
                    .iter()
                    .filter(|status| status.state == EndpointState::Ready)
                    .count()
                    == SERVERS
        })
        .await;
    }
    failed.lock().unwrap().clear();
    stop.send_replace(true);
    let calls: u64 = callers.join_all().await.iter().sum();
    assert!(
        failed.lock().unwrap().is_empty(),
        "nobody is killed any more"
    );
    assert!(calls > 1_000, "{calls}");
    for mut server in servers {
        server.kill().await.unwrap();
    }
}
