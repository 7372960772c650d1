//! A channel with a real etcd under all kinds of changes and faults at once, and a check for leaks of memory, tasks and files. The test
//! takes some seconds. With `SOAK=1` in the environment, it runs for half an hour. The environment variable `SOAK_SEED` repeats the choices
//! of a run.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use support::backend::Fleet;
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::{client, etcd, eventually, open_files, registry, soak};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{
    BalancedChannel,
    channel::{EndpointState, WaitForReady},
    resolver::ResolverState,
};

const SERVERS: usize = 6;
/// The server that is never killed and never removed.
const STEADY: usize = 0;

/// Counters of a run.
#[derive(Default)]
struct Tally {
    stop: AtomicBool,
    calls: AtomicU64,
    lost: AtomicU64,
    kills: AtomicU64,
}

fn hello(millis: u64) -> Request<HelloRequest> {
    let mut request = Request::new(HelloRequest {
        name: millis.to_string(),
        replies: 1,
    });
    request.extensions_mut().insert(WaitForReady::new(true));
    request.set_timeout(Duration::from_secs(10));
    request
}

/// Sends one call of a random kind.
async fn call(
    client: &mut GreeterClient<BalancedChannel>,
    rng: &mut fastrand::Rng,
) -> Result<(), Status> {
    match rng.u8(..10) {
        0 => {
            // A call that is dropped.
            let moment = Duration::from_micros(rng.u64(..3_000));
            let _ = timeout(moment, client.say_hello(hello(2))).await;
            Ok(())
        }
        1 => {
            // A stream that is read in part only.
            let mut replies = client.say_hellos(hello(0)).await?.into_inner();
            for _ in 0..rng.u8(..5) {
                replies.message().await?;
            }
            Ok(())
        }
        2 => client.say_hello(hello(rng.u64(..5))).await.map(drop),
        _ => client.say_hello(hello(0)).await.map(drop),
    }
}

async fn caller(channel: BalancedChannel, tally: Arc<Tally>, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut client = GreeterClient::new(channel);
    while !tally.stop.load(Ordering::SeqCst) {
        tally.calls.fetch_add(1, Ordering::SeqCst);
        if let Err(status) = call(&mut client, &mut rng).await {
            let lost = tally.lost.fetch_add(1, Ordering::SeqCst) + 1;
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            assert!(status.message().contains("connection was lost"), "{status}");
            // A kill loses at most the calls in flight, one per caller.
            let kills = tally.kills.load(Ordering::SeqCst);
            assert!(
                lost <= kills * CALLERS,
                "{lost} calls were lost in {kills} kills: {status}"
            );
        }
    }
}

const CALLERS: u64 = 16;

/// Returns the resident memory in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let figure = line.unwrap().trim().trim_end_matches(" kB");
    figure.parse().unwrap()
}

/// The environment of the channel.
struct World {
    etcd: Etcd,
    writer: etcd_client::Client,
    fleet: Fleet,
    tally: Arc<Tally>,
    rng: fastrand::Rng,
    etcd_restarts: u32,
}

impl World {
    async fn start(seed: u64) -> Self {
        let etcd = etcd().await;
        let world = Self {
            writer: client(&etcd).await,
            etcd,
            fleet: Fleet::start(SERVERS).await,
            tally: Arc::default(),
            rng: fastrand::Rng::with_seed(seed),
            etcd_restarts: 0,
        };
        world.heal().await;
        world
    }

    async fn put(&self, server: usize) {
        let address = self.fleet.get(server).address.to_string();
        let mut store = self.writer.kv_client();
        store.put(key(server), address, None).await.unwrap();
    }

    /// Applies one random change to one server or to etcd.
    async fn stir(&mut self, passed: Duration) {
        let server = self.rng.usize(STEADY + 1..SERVERS);
        let backend = self.fleet.get(server);
        match self.rng.u8(..20) {
            0..4 if backend.is_up() => {
                self.tally.kills.fetch_add(1, Ordering::SeqCst);
                backend.kill();
            }
            0..8 => backend.recover(),
            8..12 => {
                let mut store = self.writer.kv_client();
                store.delete(key(server), None).await.unwrap();
            }
            12..19 => self.put(server).await,
            _ if passed > Duration::from_secs(2) * (self.etcd_restarts + 1) => {
                self.etcd_restarts += 1;
                self.etcd.kill(0).await.unwrap();
                self.etcd.restart(0).await.unwrap();
            }
            _ => {}
        }
        sleep(Duration::from_millis(self.rng.u64(..20))).await;
    }

    /// Recovers and registers all servers.
    async fn heal(&self) {
        for server in 0..SERVERS {
            self.fleet.get(server).recover();
            self.put(server).await;
        }
    }
}

fn key(server: usize) -> String {
    format!("/gRPC/soak/{server}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_faults_leak_no_resources() {
    let seed =
        std::env::var("SOAK_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("SOAK_SEED={seed} repeats these choices");
    let mut world = World::start(seed).await;
    let registry = registry(&world.etcd).await;
    let resolver = registry.resolver("soak").start();
    resolver.ready().await;
    let metrics = Handle::current().metrics();
    let (tasks, files) = (metrics.num_alive_tasks(), open_files());
    let dialler = world.fleet.clone();
    let channel = registry
        .channel("soak")
        .max_backoff(Duration::from_millis(20))
        .seed(seed)
        .connector(move |address| dialler.clone().dial(address))
        .connect()
        .await
        .unwrap();
    let mut callers = JoinSet::new();
    for number in 0..CALLERS {
        callers.spawn(caller(
            channel.clone(),
            Arc::clone(&world.tally),
            seed ^ number,
        ));
    }
    let whole = Duration::from_secs(soak("seconds", 6, 1_800));
    let start = Instant::now();
    let passed = || Instant::now().saturating_duration_since(start);
    let mut early = None;
    while passed() < whole {
        world.stir(passed()).await;
        if passed() > whole / 3 {
            early.get_or_insert_with(resident);
        }
    }
    let late = resident();
    let early = early.unwrap_or(late);
    world.heal().await;
    eventually("all servers are known and ready", async || {
        let statuses = channel.endpoints();
        let ready = statuses
            .iter()
            .filter(|status| status.state == EndpointState::Ready);
        ready.count() == SERVERS && resolver.status().state == ResolverState::Fresh
    })
    .await;
    let tally = &world.tally;
    tally.stop.store(true, Ordering::SeqCst);
    while let Some(outcome) = callers.join_next().await {
        outcome.unwrap();
    }
    eventually("no call is in flight", async || {
        let statuses = channel.endpoints();
        statuses.iter().all(|status| status.in_flight == 0)
    })
    .await;
    let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
    println!(
        "{} calls, {} lost in {} kills, {} restarts of etcd, {early} KiB after a third, {late} KiB at the end",
        count(&tally.calls),
        count(&tally.lost),
        count(&tally.kills),
        world.etcd_restarts,
    );
    assert!(count(&tally.calls) > 1_000);
    assert!(
        late < early + early / 2 + 20_000,
        "the memory grew from {early} KiB to {late} KiB"
    );
    drop(channel);
    // The resolver that the test started still runs. It may have a few more tasks and files than before, because its watch was opened again
    // after each restart of etcd.
    eventually(
        "the tasks of the channel have ended and its sockets are closed",
        async || metrics.num_alive_tasks() <= tasks + 4 && open_files() <= files + 2,
    )
    .await;
}
