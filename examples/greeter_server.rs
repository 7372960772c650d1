//! A gRPC server that is registered in etcd. Several servers can run at once, because each of them
//! binds a free port:
//!
//! ```sh
//! cargo run --example greeter_server
//! ```
//!
//! The server shuts down gracefully on Ctrl-C or SIGTERM, and immediately on a second signal.

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

    let registry = Registry::connect(etcd_endpoints()).await?;
    let registration = registry.registration("helloworld.Greeter").health();
    Server::builder()
        .add_service(GreeterServer::new(greeter))
        .serve_registered("0.0.0.0:0".parse()?, registration)
        .await?;
    Ok(())
}
