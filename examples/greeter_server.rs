//! A gRPC server that is registered in etcd. Several servers can run at once, because each of them
//! binds a free port:
//!
//! ```sh
//! cargo run --example greeter_server
//! cargo run --example greeter_server -- --metrics 0.0.0.0:9464
//! ```
//!
//! With `--metrics`, the server serves its metrics over HTTP, in the text format of Prometheus.
//!
//! The server shuts down gracefully on Ctrl-C or SIGTERM, and immediately on a second signal.

#[path = "greeter/exporter.rs"]
mod exporter;
mod greeter;

use std::process::ExitCode;

use greeter::{NamedGreeter, etcd_endpoints, greeter_server::GreeterServer};
use tonic::transport::Server;
use tonic_etcd::{Registry, ServeRegistered};

#[tokio::main]
async fn main() -> ExitCode {
    greeter::report(run().await)
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .init();
    let greeter = NamedGreeter(format!("server {}", std::process::id()));

    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut registry = Registry::builder(etcd_endpoints());
    if let Some(address) = exporter::address_in(&args)? {
        let on_error = |error| tracing::warn!("{error}");
        let (recorder, address) = exporter::start(address, on_error).await?;
        tracing::info!("metrics at http://{address}/metrics");
        registry = registry.metrics(recorder);
    }
    let registry = registry.connect().await?;
    let registration = registry.registration("helloworld.Greeter").health();
    Server::builder()
        .add_service(GreeterServer::new(greeter))
        .serve_registered("0.0.0.0:0".parse()?, registration)
        .await?;
    Ok(())
}
