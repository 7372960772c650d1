//! Fleet: the load of many clients and servers on etcd, at rest and in faults.
//!
//! ```sh
//! make fleet                                                    # everything, about nine minutes
//! cargo bench --bench fleet -- --number 300 restart wipe        # some scenarios, with 300 clients and 300 servers
//! ```
//!
//! All clients and servers run in this process, and each has a `Registry` of its own, with its own connections to etcd. A client has one
//! resolver, and a server has one registration. etcd is a separate process. It runs on a core of its own if the machine has several cores
//! and `taskset` is installed. The figures of etcd are read from its `/metrics`, except the number of connections, which is read from
//! `/proc/net/tcp`.
//!
//! | Scenario | Actions |
//! |---|---|
//! | `start` | All servers start at once, then all clients. Each fleet starts with this scenario. |
//! | `rest` | Nothing, for the time of `--rest` (30 s). |
//! | `servers`, `clients` | Every server or client is replaced, one after the other. |
//! | `storm` | Every 100 ms, a key is written and the history is compacted, for 10 s. |
//! | `restart`, `pause`, `outage` | etcd is stopped and started again: at once, after 10 s, or after the time of `--outage` (60 s). |
//! | `wipe` | etcd is killed and restarted without its data. |
//! | `three` | Three members: rest, and the restart of the member with the most watch streams. |
//! | `slow` | Three members: the member with the most watch streams is frozen for 10 s. |
//! | `password` | etcd with authentication is restarted, and all tokens are lost. |
//! | `services` | One process watches 1 000 services (`--services`). |
//! | `instances` | One process watches a service with 10 000 instances (`--instances`). |
//!
//! Further options: `--ttl` sets the TTL of the leases in seconds (by default, the library selects it), and `--seed` sets the seed for the
//! order of replacements.
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

mod fleet;
mod metrics;
mod one_process;
mod options;
#[expect(dead_code, reason = "the tests use its other functions")]
#[path = "../../tests/support/roles.rs"]
mod roles;
mod scenarios;
mod table;
mod world;

use one_process::Shape;
use options::Options;
use table::Row;
use tonic_etcd::testing::Etcd;

/// A result whose error is a message that names the failed step.
type Result<T> = std::result::Result<T, String>;

fn main() -> std::process::ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        ["watch", endpoint, services, instances, start] => {
            let (services, instances) = (services.parse().unwrap(), instances.parse().unwrap());
            runtime.block_on(one_process::watch(endpoint, services, instances, start))
        }
        _ => runtime.block_on(run(&arguments)),
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fleet: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &[&str]) -> Result<()> {
    let options = Options::parse(arguments.iter().map(ToString::to_string))?;
    println!(
        "seed {}, {} clients and {} servers",
        options.seed, options.number, options.number
    );
    let mut rows = Vec::new();
    let outcome = scenarios(&options, &mut rows).await;
    if !rows.is_empty() {
        table::print(&rows);
        goals(&rows);
    }
    outcome?;
    if options.wants("services") {
        for at_once in [true, false] {
            services(&options, at_once).await?;
        }
    }
    if options.wants("instances") {
        for metadata in [false, true] {
            instances(&options, metadata).await?;
        }
    }
    Ok(())
}

/// Measures one process that watches many services.
async fn services(options: &Options, at_once: bool) -> Result<()> {
    let services = options.services;
    let shape = Shape {
        services,
        instances: 1,
        at_once,
        metadata: true,
    };
    let process = one_process::measure(options, shape).await?;
    let start = if at_once {
        "started at once"
    } else {
        "started one after the other"
    };
    let (received, sent) = process.rates();
    println!(
        "one process, {services} services, {start}: all sets up to date after {:?}; at rest {received:.2} messages/s to etcd and {sent:.2} from it (goal: under 1); {:.1} kB for each service with one instance (goal: under 16 kB)",
        process.fresh,
        process.memory / services as f64 / 1e3
    );
    Ok(())
}

/// Measures one process that watches a service with many instances.
async fn instances(options: &Options, metadata: bool) -> Result<()> {
    let instances = options.instances;
    let shape = Shape {
        services: 1,
        instances,
        at_once: true,
        metadata,
    };
    let process = one_process::measure(options, shape).await?;
    let values = if metadata {
        "weight, zone, version and a field of metadata"
    } else {
        "only an address"
    };
    println!(
        "one service, {instances} instances with {values}: the set is up to date after {:?}; {:.2} kB for each instance (goal: under 1 kB)",
        process.fresh,
        process.memory / instances as f64 / 1e3
    );
    Ok(())
}

async fn scenarios(options: &Options, rows: &mut Vec<Row>) -> Result<()> {
    scenarios::one_member(options, rows).await?;
    scenarios::three_members(options, rows).await?;
    scenarios::passwords(options, rows).await
}

/// Prints the goals, and whether they are reached. The requests at rest are computed from the measured fleet for a fleet of `NUMBER`
/// clients and `NUMBER` servers.
fn goals(rows: &[Row]) {
    const NUMBER: usize = 10_000;
    let verdict = |is_reached: bool| if is_reached { "reached" } else { "missed" };
    println!();
    for row in rows {
        if row.name == "rest" {
            let rate = row.rate(NUMBER);
            println!(
                "at rest, computed for {NUMBER} clients and {NUMBER} servers: {rate:.0} requests/s (goal: under 1 000), {}",
                verdict(rate < 1e3)
            );
        }
        if let ("restart", Some(right)) = (row.name.as_str(), row.right) {
            println!(
                "restart: all clients and servers are right after {:?} (goal: under 10 s), {}",
                right.all,
                verdict(right.all.as_secs() < 10)
            );
        }
    }
}

/// Returns an etcd client without credentials, for [`roles`]. It works only until authentication is enabled.
async fn client(etcd: &Etcd) -> etcd_client::Client {
    etcd_client::Client::connect(etcd.endpoints(), None)
        .await
        .unwrap()
}
