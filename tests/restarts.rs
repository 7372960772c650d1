//! Repeated graceful restarts of servers under load: no call fails, and no call runs twice.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use support::callers::{Callers, Client, with_deadline};
use support::counting::Counting;
use support::greeter::HelloRequest;
use support::{Registered, SOON, World, eventually, hello, soak};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tonic::Status;
use tonic_etcd::registration::ServerState;

/// The servers of the service, and the counter of calls that all of them share.
struct Fleet {
    world: World,
    counter: Counting,
    servers: Vec<Member>,
    /// Number of connections that the servers have cut during their shutdowns.
    cut: usize,
}

struct Member {
    server: Registered,
    address: String,
    states: watch::Receiver<ServerState>,
}

impl Fleet {
    async fn start(size: usize) -> Self {
        let mut fleet = Self {
            world: World::new().await,
            counter: Counting::default(),
            servers: Vec::new(),
            cut: 0,
        };
        for _ in 0..size {
            let member = fleet.member("127.0.0.1:0", Duration::ZERO).await;
            fleet.servers.push(member);
        }
        fleet
    }

    async fn member(&self, address: &str, grace: Duration) -> Member {
        let registration = self.world.registration().grace_period(grace);
        let mut registered = registration.watch_state();
        let states = registration.watch_server_state();
        let server = Registered::serve(self.counter.router(), address, registration);
        let known = registered.wait_for(tonic_etcd::registration::RegistrationState::is_registered);
        drop(timeout(SOON, known).await.unwrap().unwrap());
        let others: Vec<_> = self.servers.iter().map(|member| &member.address).collect();
        let mut address = None;
        eventually("the server is found", async || {
            let known = support::addresses(&self.world.resolver);
            address = known.into_iter().find(|known| !others.contains(&known));
            address.is_some()
        })
        .await;
        let address = address.unwrap();
        Member {
            server,
            address,
            states,
        }
    }

    /// Stops one server gracefully, and starts a server on the same port or on another port.
    async fn restart(&mut self, rng: &mut fastrand::Rng) {
        let member = self.servers.swap_remove(rng.usize(..self.servers.len()));
        member.server.stopped().await.unwrap();
        if let ServerState::Stopped {
            connections_cut, ..
        } = *member.states.borrow()
        {
            self.cut += connections_cut;
        }
        self.world.counts(self.servers.len()).await;
        let same_port = rng.bool();
        let address = if same_port {
            &member.address
        } else {
            "127.0.0.1:0"
        };
        let grace = Duration::from_millis(rng.u64(..30));
        let member = self.member(address, grace).await;
        self.servers.push(member);
    }
}

/// Sends a call that streams some replies, and checks that all of them are received.
async fn stream(mut client: Client) -> Result<(), Status> {
    let replies = 20;
    let request = HelloRequest { replies, ..hello() };
    let mut stream = client
        .say_hellos(with_deadline(request))
        .await?
        .into_inner();
    let mut arrived = 0;
    while let Some(reply) = stream.message().await? {
        assert_eq!(reply.message, arrived.to_string());
        arrived += 1;
    }
    assert_eq!(arrived, replies);
    Ok(())
}

/// Default number of restarts. The environment variable `RESTARTS` overrides this number and [`SOAK`], and the environment variable `SEED`
/// repeats the choices of a run.
const RESTARTS: u64 = 100;
/// Number of restarts with `SOAK=1` in the environment.
const SOAK: u64 = 1_000;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_graceful_restarts_under_load_fail_no_call_and_run_none_twice() {
    let seed = from_environment("SEED").unwrap_or_else(|| fastrand::u64(..));
    let restarts = from_environment("RESTARTS");
    let restarts = restarts.unwrap_or_else(|| soak("restarts", RESTARTS, SOAK));
    println!("{restarts} restarts, SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut fleet = Fleet::start(4).await;
    let channel = fleet.world.registry.channel("greeter").seed(seed);
    let channel = channel.connect().await.unwrap();
    let unary = Callers::start(&channel, 24);
    let streaming = Callers::making(&channel, 8, stream);
    let start = Instant::now();
    for _ in 0..restarts {
        fleet.restart(&mut rng).await;
    }
    let took = Instant::now().saturating_duration_since(start);
    let calls = unary.none_failed().await + streaming.none_failed().await;
    let rate = u128::from(calls) * 1_000 / took.as_millis().max(1);
    println!("{calls} calls in {took:.1?}, {rate} per second");
    assert_eq!(fleet.counter.count(), calls, "each call must run once");
    assert_eq!(fleet.cut, 0, "connections were cut");
    assert!(calls > restarts * 50, "{calls} calls are too few");
    for member in fleet.servers {
        member.server.stopped().await.unwrap();
    }
}
