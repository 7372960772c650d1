//! Random histories of a whole channel, checked against a model: servers are inserted, changed, killed, recovered and removed while calls
//! are made. The test runs alone in its process, so that it can count leaked tasks and files.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use support::backend::Fleet;
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::{SOON, eventually, open_files, soak};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request, Status, Streaming};
use tonic_etcd::{
    Address, BalancedChannel, Instance, LbPolicy,
    channel::{EndpointState, ServedBy, WaitForReady},
};
use tower::discover::Change;

const SERVERS: usize = 5;

/// One step of a history. The registry is the stream of changes that the channel reads.
#[derive(Clone, Debug)]
enum Op {
    /// The registry inserts the server, possibly again with another weight.
    Insert(usize, u32),
    /// The registry removes the server.
    Remove(usize),
    /// The registry inserts the second server and removes the first.
    Replace(usize, usize),
    /// The registry removes the server and at once inserts a new instance with the same address.
    Reinsert(usize),
    Kill(usize),
    Recover(usize),
    /// Calls that fail if no endpoint is ready.
    Calls(usize),
    /// Calls that are dropped before their response.
    Cancelled(usize),
    /// A stream that stays open after one reply was read.
    Open,
    /// The oldest open stream is dropped.
    Close,
    /// Waits until the ready endpoints are exactly the registered servers that are up.
    Settle,
}

fn op() -> impl Strategy<Value = Op> {
    let server = 0..SERVERS;
    prop_oneof![
        6 => (server.clone(), 1..4_u32).prop_map(|(server, weight)| Op::Insert(server, weight)),
        3 => server.clone().prop_map(Op::Remove),
        2 => (server.clone(), server.clone()).prop_map(|(old, new)| Op::Replace(old, new)),
        1 => server.clone().prop_map(Op::Reinsert),
        2 => server.clone().prop_map(Op::Kill),
        3 => server.prop_map(Op::Recover),
        4 => (1..20_usize).prop_map(Op::Calls),
        1 => (1..20_usize).prop_map(Op::Cancelled),
        1 => Just(Op::Open),
        1 => Just(Op::Close),
        2 => Just(Op::Settle),
    ]
}

fn policy() -> impl Strategy<Value = LbPolicy> {
    prop_oneof![
        Just(LbPolicy::Latency),
        Just(LbPolicy::LeastRequest),
        Just(LbPolicy::WeightedRoundRobin)
    ]
}

/// Facts about the servers. The outcome of each call is checked against them.
struct Known {
    /// Servers that the channel reports as removed, each with the number of its last removal. While a call waits, a server may be inserted
    /// and removed again. The number distinguishes the two removals.
    absent: BTreeMap<String, u64>,
    removals: u64,
    /// The address of each killed server, and the time of its last kill.
    killed: Vec<(String, Instant)>,
}

type Shared = Arc<Mutex<Known>>;

/// The channel and its expected state.
struct World {
    fleet: Fleet,
    changes: mpsc::UnboundedSender<Result<Change<Address, Instance>, Infallible>>,
    channel: BalancedChannel,
    known: Shared,
    registered: BTreeSet<usize>,
    /// Servers that were registered, up and ready at the last [`World::settle`], and were not removed or killed since.
    stable: BTreeSet<usize>,
    /// Whether the channel may have a dead connection that it has not detected.
    unsettled: bool,
    streams: Vec<Streaming<support::greeter::HelloReply>>,
}

impl World {
    fn name(&self, server: usize) -> String {
        self.fleet.get(server).address.to_string()
    }

    fn insert(&mut self, server: usize, weight: u32) {
        // From here on, the server may be called.
        self.known.lock().unwrap().absent.remove(&self.name(server));
        self.registered.insert(server);
        let address: Address = self.name(server).parse().unwrap();
        let instance = Instance::new(address.clone()).with_weight(weight);
        let change = Change::Insert(address, instance);
        self.changes.send(Ok(change)).unwrap();
    }

    fn remove(&mut self, server: usize) {
        self.stable.remove(&server);
        self.registered.remove(&server);
        let address = self.name(server).parse().unwrap();
        self.changes.send(Ok(Change::Remove(address))).unwrap();
    }

    /// Waits until the channel reports a server as removed. From then on, no call reaches the server.
    async fn sees_removal(&self, server: usize) {
        let name = self.name(server);
        eventually("the removal is applied", async || {
            self.channel.endpoints().iter().all(|status| {
                status.address.to_string() != name || status.state == EndpointState::Draining
            })
        })
        .await;
        let mut known = self.known.lock().unwrap();
        known.removals += 1;
        let removal = known.removals;
        known.absent.insert(name, removal);
    }

    fn kill(&mut self, server: usize) {
        self.stable.remove(&server);
        self.unsettled |= self.registered.contains(&server);
        let name = self.name(server);
        let mut known = self.known.lock().unwrap();
        known.killed.retain(|(killed, _)| *killed != name);
        known.killed.push((name, Instant::now()));
        self.fleet.get(server).kill();
    }

    /// Waits until the ready endpoints are exactly the registered servers that are up.
    async fn settle(&mut self) {
        let up = |server: &usize| self.fleet.get(*server).is_up();
        let expected: BTreeSet<_> = self.registered.iter().copied().filter(up).collect();
        let names: BTreeSet<_> = expected.iter().map(|server| self.name(*server)).collect();
        eventually("the set matches the model", async || {
            let statuses = self.channel.endpoints();
            let ready = statuses
                .iter()
                .filter(|status| status.state == EndpointState::Ready)
                .map(|status| status.address.to_string());
            // An endpoint may be ready with a dead connection that is not detected yet. Therefore each server must also have accepted a
            // connection since its last kill.
            let connected = |server: &usize| self.fleet.get(*server).is_connected();
            ready.collect::<BTreeSet<_>>() == names && expected.iter().all(connected)
        })
        .await;
        // The channel reports a state up to a millisecond before load balancing uses it. This call waits for a ready endpoint, so it ends
        // only after load balancing uses the state.
        if !expected.is_empty() {
            call(&self.channel, &self.known, true, 0).await.unwrap();
        }
        self.stable = expected;
        self.unsettled = false;
    }

    async fn apply(&mut self, op: &Op) {
        match *op {
            Op::Insert(server, weight) => self.insert(server, weight),
            Op::Remove(server) => {
                self.remove(server);
                self.sees_removal(server).await;
            }
            Op::Replace(old, new) => {
                self.insert(new, 1);
                if old != new {
                    self.remove(old);
                    self.sees_removal(old).await;
                }
            }
            Op::Reinsert(server) => {
                self.remove(server);
                self.insert(server, 1);
            }
            Op::Kill(server) => self.kill(server),
            Op::Recover(server) => self.fleet.get(server).recover(),
            Op::Calls(calls) => self.calls(calls).await,
            Op::Cancelled(calls) => {
                let mut cancelled = JoinSet::new();
                for _ in 0..calls {
                    let (channel, known) = (self.channel.clone(), Arc::clone(&self.known));
                    cancelled.spawn(async move { call(&channel, &known, true, 20).await });
                }
                tokio::task::yield_now().await;
                cancelled.abort_all();
            }
            Op::Open if !self.stable.is_empty() && !self.unsettled => {
                let mut client = GreeterClient::new(self.channel.clone());
                let stream = timeout(SOON, client.say_hellos(hello(0))).await.unwrap();
                let mut stream = stream.unwrap().into_inner();
                timeout(SOON, stream.message()).await.unwrap().unwrap();
                self.streams.push(stream);
            }
            Op::Close if !self.streams.is_empty() => drop(self.streams.remove(0)),
            Op::Open | Op::Close => {}
            Op::Settle => self.settle().await,
        }
    }

    async fn calls(&self, calls: usize) {
        let mut running = JoinSet::new();
        for _ in 0..calls {
            let (channel, known) = (self.channel.clone(), Arc::clone(&self.known));
            running.spawn(async move { call(&channel, &known, false, 1).await });
        }
        for outcome in running.join_all().await {
            match outcome {
                Ok(()) => {}
                Err(status) if !self.stable.is_empty() && !self.unsettled => {
                    panic!("{:?} could have served the call: {status}", self.stable)
                }
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
            }
        }
    }
}

fn hello(millis: usize) -> HelloRequest {
    HelloRequest {
        name: millis.to_string(),
        replies: 1,
    }
}

/// Sends one call. A server that was reported as removed before the call began, and was not inserted since, must not serve the call. A call
/// with `wait` may fail only because of a kill. Returns the error of a call without `wait`.
async fn call(
    channel: &BalancedChannel,
    known: &Shared,
    wait: bool,
    millis: usize,
) -> Result<(), Status> {
    let absent = known.lock().unwrap().absent.clone();
    let mut request = Request::new(hello(millis));
    request.extensions_mut().insert(WaitForReady::new(wait));
    let mut client = GreeterClient::new(channel.clone());
    let outcome = timeout(SOON, client.say_hello(request)).await;
    match outcome.expect("the call ends in time") {
        Ok(response) => {
            let served_by = response.extensions().get::<ServedBy>().unwrap();
            let name = served_by.address().to_string();
            let still = known.lock().unwrap().absent.get(&name).copied();
            assert!(
                still.is_none() || absent.get(&name).copied() != still,
                "{name} was called after its removal was applied"
            );
            Ok(())
        }
        Err(status) if !wait => Err(status),
        Err(status) => {
            let known = known.lock().unwrap();
            let killed = known.killed.iter().any(|(name, at)| {
                let ago = Instant::now().saturating_duration_since(*at);
                status.message().contains(name) && ago < Duration::from_secs(10)
            });
            assert!(
                killed,
                "no server in the error was killed in the last 10 s: {status}"
            );
            Ok(())
        }
    }
}

/// Callers that send calls continuously and wait for a ready endpoint.
struct Callers {
    stop: watch::Sender<bool>,
    tasks: JoinSet<usize>,
}

impl Callers {
    fn start(channel: &BalancedChannel, known: &Shared) -> Self {
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for _ in 0..4 {
            let (channel, known, stopped) = (channel.clone(), Arc::clone(known), stopped.clone());
            tasks.spawn(async move {
                let mut calls = 0;
                while !*stopped.borrow() {
                    call(&channel, &known, true, 0).await.unwrap();
                    calls += 1;
                }
                calls
            });
        }
        Self { stop, tasks }
    }

    async fn stop(self) -> usize {
        self.stop.send_replace(true);
        self.tasks.join_all().await.iter().sum()
    }
}

/// Runs a history. Returns the number of calls.
async fn live(policy: LbPolicy, ops: &[Op]) -> usize {
    let fleet = Fleet::start(SERVERS).await;
    let (tasks, files) = (Handle::current().metrics().num_alive_tasks(), open_files());
    let (changes, stream) = mpsc::unbounded_channel();
    let dialler = fleet.clone();
    let channel = BalancedChannel::builder()
        .service("model")
        .policy(policy)
        .seed(7)
        // With a longer backoff, the test would spend most of its time between dials.
        .max_backoff(Duration::from_millis(5))
        .startup_timeout(Duration::from_millis(20))
        .connector(move |address| dialler.clone().dial(address))
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let absent = fleet.iter().map(|backend| (backend.address.to_string(), 0));
    let known = Arc::new(Mutex::new(Known {
        absent: absent.collect(),
        removals: 0,
        killed: Vec::new(),
    }));
    let mut world = World {
        fleet,
        changes,
        channel,
        known,
        registered: BTreeSet::new(),
        stable: BTreeSet::new(),
        unsettled: false,
        streams: Vec::new(),
    };
    let callers = Callers::start(&world.channel, &world.known);
    for op in ops {
        world.apply(op).await;
    }
    // After any history, one recovered server must be enough to serve calls.
    world.fleet.get(0).recover();
    world.insert(0, 1);
    world.settle().await;
    let calls = callers.stop().await;
    leaves_nothing(world, tasks, files).await;
    calls
}

/// Asserts that no call is in flight after the last call has ended, and that no task and no file is left after the channel is dropped.
async fn leaves_nothing(mut world: World, tasks: usize, files: usize) {
    world.streams.clear();
    eventually(
        "no call is in flight and no endpoint is draining",
        async || {
            let statuses = world.channel.endpoints();
            statuses
                .iter()
                .all(|status| status.in_flight == 0 && status.state != EndpointState::Draining)
        },
    )
    .await;
    let World { fleet, channel, .. } = world;
    drop(channel);
    let metrics = Handle::current().metrics();
    eventually(
        "all tasks have ended and all sockets are closed",
        async || metrics.num_alive_tasks() <= tasks && open_files() <= files,
    )
    .await;
    drop(fleet);
}

#[test]
fn no_history_loses_a_call_or_leaks_resources() {
    let seed = std::env::var("MODEL_SEED").map_or_else(
        |_| rand_seed(),
        |seed| seed.parse().expect("MODEL_SEED is a number"),
    );
    println!("MODEL_SEED={seed} repeats this run");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: u32::try_from(soak("histories", 60, 20_000)).unwrap(),
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let histories = (policy(), proptest::collection::vec(op(), 1..60));
    let total = std::cell::Cell::new(0);
    let outcome = runner.run(&histories, |(policy, ops)| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        total.set(total.get() + runtime.block_on(live(policy, &ops)));
        Ok(())
    });
    println!("{} calls", total.get());
    if let Err(error) = outcome {
        panic!("MODEL_SEED={seed}: {error}");
    }
    assert!(total.get() > 1_000, "{}", total.get());
}

fn rand_seed() -> u64 {
    std::hash::BuildHasher::hash_one(&std::collections::hash_map::RandomState::new(), 0)
}
