//! Peers: the channel compared with grpc-go, tonic-xds, stock tonic and bare h2, against the same server processes in the same run.
//!
//! ```sh
//! make bench-peers                       # everything, about 15 minutes and the build
//! make bench-peers PEERS="unary-16 join" # some of it
//! ```
//!
//! The scenarios are `unary-16`, `unary-300`, `unary-5000`, `slow`, `kill` and `join`. A prefix such as `unary` selects all scenarios that
//! begin with it.
//!
//! Each client is a process of its own: this program, or one of those that `scripts/setup-bench-peers` builds. grpc-go and the channel find
//! the servers in etcd. tonic-xds finds them through a control plane that watches the same keys. The clients take turns in every round. CPU
//! is the CPU time that the operating system accounts to the client process. Its two parts are the time in the client's own code (user time)
//! and in the kernel on its behalf (system time). Linux divides the time by what runs at each tick of its timer, so the parts are less exact
//! than their sum.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::pedantic,
    reason = "this is a benchmark, and a failed step ends it with a panic"
)]

#[path = "../load/bare_h2.rs"]
mod bare_h2;
mod callers;
mod client;
#[path = "../../examples/greeter/mod.rs"]
mod greeter;
mod join;
mod process;
#[path = "../load/server.rs"]
mod server;
mod table;
mod world;

use std::time::Duration;

use callers::Load;
use process::{Peer, Programs};
use server::ServerProcess;
use table::Sample;
use world::World;

const ROUNDS: usize = 5;
/// The rounds of the kills, in each of which four servers are killed.
const KILL_ROUNDS: usize = 4;
/// The time before a measurement, in which a client also starts and connects.
const WARM_UP: Duration = Duration::from_millis(500);
/// The pause between a kill and the restart.
const DOWN: Duration = Duration::from_millis(100);
/// The pause between a restart and the next kill. It is longer than the first backoff of grpc-go, which is at most 1.2 s.
const UP: Duration = Duration::from_millis(1_900);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args = args.iter().map(String::as_str).collect::<Vec<_>>();
    if let ["serve", delay, address] = args[..] {
        return server::serve(delay.parse().unwrap(), address);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    if let ["client", etcd, service, policy, ..] = args[..] {
        let load: Vec<_> = args[4..].iter().map(ToString::to_string).collect();
        return runtime.block_on(client::run(etcd, service, policy, Load::parse(&load)));
    }
    let wanted: Vec<_> = args.into_iter().filter(|arg| *arg != "--bench").collect();
    let wants =
        |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| name.starts_with(*wanted));
    let Some(programs) = Programs::find() else {
        println!(
            "LEFT OUT: the comparison with grpc-go and tonic-xds, which `make bench-peers` builds"
        );
        return;
    };
    runtime.block_on(async {
        for size in [16, 300, 5_000] {
            if wants(&format!("unary-{size}")) {
                unary(&programs, size).await;
            }
        }
        if wants("slow") {
            slow(&programs).await;
        }
        if wants("kill") {
            kills(&programs).await;
        }
        for (name, load) in join::LOADS {
            if wants(name) {
                join::run(&programs, name, load).await;
            }
        }
    });
}

/// Unary calls to four servers.
async fn unary(programs: &Programs, size: usize) {
    let servers = ServerProcess::start_many(&[0; 4]);
    let world = World::start(programs, &ServerProcess::addresses(&servers)).await;
    for callers in [1, 16, 256] {
        let load = Load {
            callers,
            size,
            warm_up: WARM_UP,
            duration: Duration::from_millis(800),
            period: Duration::ZERO,
        };
        compare(
            &world,
            &format!("unary of {size} bytes, {callers} callers"),
            load,
        )
        .await;
    }
}

/// One slow server of four.
async fn slow(programs: &Programs) {
    let servers = ServerProcess::start_many(&[1_000, 1_000, 1_000, 50_000]);
    let world = World::start(programs, &ServerProcess::addresses(&servers)).await;
    let load = Load {
        callers: 32,
        size: 16,
        warm_up: Duration::from_millis(1_200),
        duration: Duration::from_millis(1_500),
        period: Duration::ZERO,
    };
    compare(
        &world,
        "one server answers in 50 ms, three in 1 ms, 32 callers",
        load,
    )
    .await;
}

async fn compare(world: &World<'_>, title: &str, load: Load) {
    let peers = Peer::all(world);
    let mut samples: Vec<Vec<Sample>> = peers.iter().map(|_| Vec::new()).collect();
    let mut order: Vec<_> = (0..peers.len()).collect();
    for _ in 0..ROUNDS {
        fastrand::shuffle(&mut order);
        for &index in &order {
            let client = peers[index].start(world, load).await;
            samples[index].push(client.end(load.duration).await);
        }
    }
    table::print(title, &peers, &samples);
}

/// Each of four servers is killed in turn under load, and started again.
async fn kills(programs: &Programs) {
    let mut servers = ServerProcess::start_many(&[0; 4]);
    let world = World::start(programs, &ServerProcess::addresses(&servers)).await;
    let load = Load {
        callers: 16,
        size: 16,
        warm_up: Duration::from_secs(1),
        duration: (DOWN + UP) * 4 + Duration::from_millis(500),
        period: Duration::ZERO,
    };
    // The policies of grpc-go do not differ in what a kill costs, so one of them is sufficient.
    let mut peers = Peer::all(&world);
    peers.retain(|peer| {
        peer.resolves() && !matches!(peer, Peer::GrpcGo(policy) if *policy != "round_robin")
    });
    let mut samples: Vec<Vec<Sample>> = peers.iter().map(|_| Vec::new()).collect();
    let mut order: Vec<_> = (0..peers.len()).collect();
    for _ in 0..KILL_ROUNDS {
        fastrand::shuffle(&mut order);
        for &index in &order {
            let client = peers[index].start(&world, load).await;
            for server in &mut servers {
                server.kill();
                tokio::time::sleep(DOWN).await;
                server.restart();
                tokio::time::sleep(UP).await;
            }
            samples[index].push(client.end(load.duration).await);
        }
    }
    table::print_kills(&peers, &samples, servers.len());
}
