//! Load: calls per second, CPU time per call and latency of the compared clients, which are named *peers*. All peers are measured in the
//! same run.
//!
//! ```sh
//! cargo bench --bench load              # everything, about fifteen minutes
//! cargo bench --bench load -- L1 L2     # some of it
//! ```
//!
//! Each server is a separate process. The peers take turns in every round, so that a drift of the machine's speed affects all of them
//! alike. The printed figures and ratios are medians over the rounds. CPU is the CPU time that the operating system accounts to this
//! process, without the servers.
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

mod bare_h2;
#[path = "../../examples/greeter/mod.rs"]
mod greeter;
mod measure;
#[path = "../instructions/metrics.rs"]
mod metrics;
mod peers;
mod server;

use std::time::Duration;

use greeter::HelloRequest;
use measure::{Load, Table, compare};
use peers::Peer;
use server::ServerProcess;
use tonic_etcd::{LbPolicy, RetryPolicy, channel::OutlierDetection};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(position) = args.iter().position(|arg| arg == "serve") {
        return server::serve(args[position + 1].parse().unwrap(), &args[position + 2]);
    }
    let wanted: Vec<_> = args
        .into_iter()
        .filter(|arg| arg.starts_with('L'))
        .collect();
    let wants = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        if wants("L1") {
            unary().await;
        }
        if wants("L1e") {
            payloads().await;
        }
        if wants("L1f") {
            deadlines_and_metadata().await;
        }
        if wants("L1m") {
            metered().await;
        }
        if wants("L1c") {
            streams().await;
        }
        if wants("L1d") {
            one_endpoint().await;
        }
        if wants("L2") {
            unequal().await;
        }
    });
}

fn ping() -> HelloRequest {
    message(16)
}

fn message(size: usize) -> HelloRequest {
    HelloRequest {
        name: "x".repeat(size),
        replies: 0,
    }
}

/// L1e: unary calls with messages of several sizes, compared with bare h2.
async fn payloads() {
    let servers = ServerProcess::start_many(&[0; 4]);
    let addresses = ServerProcess::addresses(&servers);
    for (callers, size) in [
        (64, 16),
        (64, 300),
        (64, 900),
        (64, 5_000),
        (64, 65_536),
        (1, 16),
        (1, 900),
        (1, 65_536),
    ] {
        let load = Load::unary(callers, message(size));
        let peers = [
            Peer::bare_h2(&addresses),
            Peer::stock(&addresses),
            Peer::balanced("BalancedChannel", &addresses),
        ];
        compare(
            &format!("L1e: 4 endpoints, unary of {size} bytes, {callers} callers"),
            &load,
            &peers,
            Table::Ratios,
        )
        .await;
    }
}

/// L1f: unary calls with a deadline and three metadata entries, as calls in production have.
async fn deadlines_and_metadata() {
    let servers = ServerProcess::start_many(&[0; 4]);
    let addresses = ServerProcess::addresses(&servers);
    for (what, load) in [
        ("plain", Load::unary(64, message(300))),
        (
            "with a deadline and three metadata entries",
            Load::unary(64, message(300)).production(),
        ),
    ] {
        let peers = [
            Peer::bare_h2(&addresses),
            Peer::stock(&addresses),
            Peer::balanced("BalancedChannel", &addresses),
        ];
        compare(
            &format!("L1f: 4 endpoints, unary of 300 bytes, 64 callers, {what}"),
            &load,
            &peers,
            Table::Ratios,
        )
        .await;
    }
}

/// L1: unary calls to four endpoints.
async fn unary() {
    let servers = ServerProcess::start_many(&[0; 4]);
    let addresses = ServerProcess::addresses(&servers);
    for callers in [1, 16, 256] {
        let load = Load::unary(callers, ping());
        let peers = [
            Peer::stock(&addresses),
            Peer::plain(&addresses[0]),
            Peer::bare_hyper(&addresses),
            Peer::bare_h2(&addresses),
            Peer::balanced("BalancedChannel", &addresses),
            Peer::balanced_with(
                "BalancedChannel, ejection and retries on",
                &addresses,
                |builder| {
                    builder
                        .outlier_detection(OutlierDetection::new())
                        .retry(RetryPolicy::new([tonic::Code::Unavailable]))
                },
            ),
        ];
        compare(
            &format!("L1: 4 endpoints, unary, {callers} callers"),
            &load,
            &peers,
            Table::Ratios,
        )
        .await;
    }
}

/// L1m: the cost of metrics, with the SDK of OpenTelemetry.
async fn metered() {
    let servers = ServerProcess::start_many(&[0; 4]);
    let addresses = ServerProcess::addresses(&servers);
    // The exporter reads the values at the end only, so that a round measures the calls and not an export.
    let provider = metrics::provider();
    let recorder = metrics::recorder(&provider);
    for callers in [1, 16, 256] {
        let recorder = recorder.clone();
        let peers = [
            Peer::balanced("BalancedChannel", &addresses),
            Peer::balanced_with("BalancedChannel, metrics on", &addresses, move |builder| {
                builder.metrics(recorder.clone())
            }),
            Peer::balanced_with(
                "BalancedChannel, metrics that are discarded",
                &addresses,
                |builder| builder.metrics(metrics::Discard),
            ),
        ];
        compare(
            &format!("L1m: 4 endpoints, unary, metrics, {callers} callers"),
            &Load::unary(callers, ping()),
            &peers,
            Table::Ratios,
        )
        .await;
    }
}

/// L1c: streams, and large messages.
async fn streams() {
    let servers = ServerProcess::start_many(&[0; 4]);
    let addresses = ServerProcess::addresses(&servers);
    for (title, load) in [
        (
            "server streaming, 1 000 messages of 1 KiB",
            Load::server_streaming(4, 1_000, 1 << 10),
        ),
        (
            "unary of 1 MiB",
            Load::unary(
                4,
                HelloRequest {
                    name: "x".repeat(1 << 20),
                    replies: 0,
                },
            ),
        ),
        (
            "client streaming, 1 000 messages of 1 KiB",
            Load::client_streaming(4, 1_000, 1 << 10),
        ),
        (
            "bidi, 1 000 messages of 1 KiB",
            Load::bidi(4, 1_000, 1 << 10),
        ),
    ] {
        let peers = [
            Peer::stock(&addresses),
            Peer::balanced("BalancedChannel", &addresses),
        ];
        compare(
            &format!("L1c: {title}, 4 callers"),
            &load,
            &peers,
            Table::Ratios,
        )
        .await;
    }
}

/// L1d: unary calls to one endpoint, compared with one plain channel of tonic.
async fn one_endpoint() {
    let servers = ServerProcess::start_many(&[0]);
    let addresses = ServerProcess::addresses(&servers);
    let load = Load::unary(256, ping());
    let mut peers = vec![Peer::plain(&addresses[0])];
    for connections in [1, 2, 4] {
        peers.push(Peer::balanced_with(
            &format!("BalancedChannel, {connections} connections"),
            &addresses,
            move |builder| builder.connections_per_endpoint(connections),
        ));
    }
    compare(
        "L1d: one endpoint, unary, 256 callers",
        &load,
        &peers,
        Table::Ratios,
    )
    .await;
}

/// L2: endpoints with unequal latencies, and then calls of unequal durations to equal endpoints.
async fn unequal() {
    let servers = ServerProcess::start_many(&[1_000, 1_000, 1_000, 50_000]);
    let addresses = ServerProcess::addresses(&servers);
    let peers = [
        Peer::stock(&addresses),
        Peer::balanced("BalancedChannel, default", &addresses),
        Peer::balanced_with("BalancedChannel, least request", &addresses, |builder| {
            builder.policy(LbPolicy::LeastRequest)
        }),
    ];
    let load = Load::unary(32, ping()).warm_up(Duration::from_secs(1));
    compare(
        "L2: 4 endpoints, one answers in 50 ms, the others in 1 ms, 32 callers",
        &load,
        &peers,
        Table::Latencies,
    )
    .await;
    drop(servers);

    let servers = ServerProcess::start_many(&[0; 4]);
    let addresses = ServerProcess::addresses(&servers);
    let peers = [
        Peer::stock(&addresses),
        Peer::balanced("BalancedChannel, default", &addresses),
        Peer::balanced_with("BalancedChannel, least request", &addresses, |builder| {
            builder.policy(LbPolicy::LeastRequest)
        }),
    ];
    let load = Load::mixed(32, 1_000, 100_000).warm_up(Duration::from_secs(1));
    compare("L2: 4 equal endpoints, 90 % of the calls take 1 ms and 10 % take 100 ms, 32 callers (the latencies are those of the calls of 1 ms)", &load, &peers, Table::Latencies).await;
}
