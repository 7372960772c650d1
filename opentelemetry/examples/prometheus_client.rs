//! A recorder for another metrics library: the crate `prometheus-client`. The example fails to connect, and prints the metrics of its channel
//! in the text format of Prometheus.
//!
//! ```sh
//! cargo run -p tonic-etcd-opentelemetry --example prometheus_client
//! ```
#![allow(clippy::print_stdout, reason = "the example prints the metrics")]

#[path = "../../examples/greeter/prometheus.rs"]
#[allow(
    unreachable_pub,
    reason = "the file is shared with the example of the cluster"
)]
mod prometheus;

use std::time::Duration;

use prometheus::Prometheus;
use tonic_balance::BalancedChannel;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let recorder = Prometheus::default();
    let builder = BalancedChannel::builder().service("greeter");
    let builder = builder.metrics(recorder.clone());
    // No server listens on the port, so the channel fails to connect.
    let channel = builder.addresses(["127.0.0.1:1"]).connect_lazy();
    let ready = tokio::time::timeout(Duration::from_secs(5), channel.wait_until_ready());
    if let Err(error) = ready.await? {
        println!("# {error}");
    }
    println!("{}", recorder.text()?);
    Ok(())
}
