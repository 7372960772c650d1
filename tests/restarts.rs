//! Graceful restarts of servers under load, again and again: no call fails, and none runs twice.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use support::counting::Counting;
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::GreeterServer;
use support::{Registered, SOON, World, eventually, hello};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tonic::transport::Server;
use tonic::{Request, Status};
use tonic_etcd::{BalancedChannel, ServerState};

/// The servers of the service, and the greeter that all of them count with.
struct Fleet {
    world: World,
    counter: Counting,
    servers: Vec<Member>,
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
        let mut registered = registration.states();
        let states = registration.server_states();
        let router = Server::builder().add_service(GreeterServer::new(self.counter.clone()));
        let server = Registered::serve(router, address, registration);
        let known = registered.wait_for(tonic_etcd::RegistrationState::is_registered);
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

    /// Restarts one server in order, on the same port or on another.
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

/// Callers that never pause.
struct Callers {
    stop: watch::Sender<bool>,
    calls: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<Vec<Status>>>,
}

impl Callers {
    fn start(channel: &BalancedChannel, unary: usize, streaming: usize) -> Self {
        let (stop, stopped) = watch::channel(false);
        let calls = Arc::new(AtomicU64::new(0));
        let caller = |streams: bool| {
            let mut client = GreeterClient::new(channel.clone());
            let (stopped, calls) = (stopped.clone(), Arc::clone(&calls));
            tokio::spawn(async move {
                let mut failed = Vec::new();
                while !*stopped.borrow() {
                    calls.fetch_add(1, Ordering::Relaxed);
                    let call = if streams {
                        stream(&mut client).await
                    } else {
                        client.say_hello(with_deadline(hello())).await.map(drop)
                    };
                    failed.extend(call.err());
                }
                failed
            })
        };
        let tasks = (0..unary)
            .map(|_| false)
            .chain((0..streaming).map(|_| true));
        Self {
            tasks: tasks.map(caller).collect(),
            stop,
            calls,
        }
    }

    /// Stops them; says how many calls there were, and which failed.
    async fn stopped(self) -> (u64, Vec<Status>) {
        self.stop.send_replace(true);
        let mut failed = Vec::new();
        for task in self.tasks {
            failed.extend(timeout(SOON, task).await.unwrap().unwrap());
        }
        (self.calls.load(Ordering::Relaxed), failed)
    }
}

fn with_deadline<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_secs(5));
    request
}

/// A call that streams some replies, all of which have to arrive.
async fn stream(client: &mut GreeterClient<BalancedChannel>) -> Result<(), Status> {
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

/// How many restarts, and how many with `SOAK` set. `RESTARTS` in the environment says otherwise, and `SEED` repeats a run.
const RESTARTS: u64 = 100;
const SOAK: u64 = 1_000;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_graceful_restarts_under_load_fail_no_call_and_run_none_twice() {
    let seed = from_environment("SEED").unwrap_or_else(|| fastrand::u64(..));
    let restarts = from_environment("RESTARTS");
    let soak = std::env::var_os("SOAK").is_some();
    let restarts = restarts.unwrap_or(if soak { SOAK } else { RESTARTS });
    println!("{restarts} restarts, SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut fleet = Fleet::start(4).await;
    let channel = fleet.world.registry.channel("greeter").seed(seed);
    let channel = channel.connect().await.unwrap();
    let callers = Callers::start(&channel, 24, 8);
    let start = Instant::now();
    for _ in 0..restarts {
        fleet.restart(&mut rng).await;
    }
    let took = Instant::now().saturating_duration_since(start);
    let (calls, failed) = callers.stopped().await;
    let rate = u128::from(calls) * 1_000 / took.as_millis().max(1);
    println!(
        "{calls} calls in {took:.1?}, {rate} per second, {} failed",
        failed.len()
    );
    assert!(
        failed.is_empty(),
        "{} of {calls} calls failed: {:?}",
        failed.len(),
        &failed[..failed.len().min(5)]
    );
    assert_eq!(fleet.counter.count(), calls, "each call ran once");
    assert_eq!(fleet.cut, 0, "no connection was cut");
    assert!(calls > restarts * 50, "{calls} calls are no load");
    for member in fleet.servers {
        member.server.stopped().await.unwrap();
    }
}
