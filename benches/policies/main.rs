//! Compares the policies on processes, with stock tonic and with grpc-go. `make bench-policies` also runs the same cases in virtual time,
//! and `benches/plot` compares the two and writes the tables and the pictures of `docs/policies.md`.
//!
//! ```sh
//! make bench-policies                              # everything
//! POLICIES_SECONDS=3 make bench-policies           # a short run, whose figures have no meaning
//! make bench-policies POLICIES="Slow,4 Flapping"   # the cases whose name contains one of these texts
//! ```
//!
//! Each server is a process, and so are the channels of each compared client. The servers are those of the simulation
//! (`balance/src/balance/tests/faults.rs`). A server marks the response of a call that it received while it had a disadvantage, so the share
//! of such calls is known for every client. The servers also report their load, which some of the clients use.
//!
//! All clients of a case run at the same time, each against its own servers.
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

mod cases;
mod client;
mod clock;
#[path = "../../balance/src/balance/tests/faults.rs"]
#[allow(dead_code, reason = "the simulation uses the rest")]
mod faults;
#[path = "../../examples/greeter/mod.rs"]
mod greeter;
mod peers;
mod server;

use std::time::Duration;

use tokio::time::timeout;

use cases::Case;
use clock::Epoch;
use peers::Peer;

/// The whole run ends within this time, and fails if it has not ended by itself.
const LIMIT: Duration = Duration::from_secs(15 * 60);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((mode, args)) if mode == "serve" => return server::serve(args),
        Some((mode, args)) if mode == "client" => return client::run(args),
        _ => {}
    }
    let wanted: Vec<_> = args.into_iter().filter(|arg| arg != "--bench").collect();
    let seconds = std::env::var("POLICIES_SECONDS").ok();
    let time = Duration::from_secs(seconds.map_or(30, |seconds| seconds.parse().unwrap()));
    let peers = Peer::all();
    println!(
        "source,fault,servers,clients,callers,policy,calls,bad_percent,p50_ms,p99_ms,p999_ms,failed"
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let all = async {
        for batch in cases::batches(&wanted) {
            run(&batch, &peers, time).await;
        }
    };
    // The future is dropped if it has not ended in time. Dropping it kills all processes.
    let ended = runtime.block_on(async { timeout(LIMIT, all).await });
    ended.expect("the run has not ended in time");
}

/// Runs the cases of a batch at the same time, and prints a line for each client of each case.
async fn run(batch: &[Case], peers: &[Peer], time: Duration) {
    let rows: Vec<_> = batch
        .iter()
        .flat_map(|case| peers.iter().map(move |peer| (case, peer)))
        .collect();
    let servers: usize = rows.iter().map(|(case, _)| case.servers).sum();
    // A process starts in a few milliseconds.
    let start = Duration::from_secs(1) + Duration::from_millis(10) * servers as u32;
    let epoch = Epoch::after(start);
    let started: Vec<_> = rows
        .into_iter()
        .map(|(case, peer)| (case, peer, peer.start(case, epoch, time)))
        .collect();
    assert!(
        !epoch.remaining().is_zero(),
        "the processes took longer than {start:?} to start"
    );
    for (case, peer, running) in started {
        let outcome = running.outcome(epoch.remaining() + time * 2).await;
        println!("processes,{},{},{outcome}", case.name(), peer.name);
    }
}
