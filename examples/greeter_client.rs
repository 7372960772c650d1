//! A gRPC client that finds its servers through etcd and calls one of them every second:
//!
//! ```sh
//! cargo run --example greeter_client
//! cargo run --example greeter_client -- --metrics 0.0.0.0:9464
//! ```
//!
//! With `--metrics`, the client serves its metrics over HTTP, in the text format of Prometheus.
#![allow(clippy::print_stdout, reason = "the example prints its results")]

#[path = "greeter/exporter.rs"]
mod exporter;
mod greeter;

use std::process::ExitCode;
use std::time::Duration;

use greeter::{HelloRequest, etcd_endpoints, greeter_client::GreeterClient};
use tonic_etcd::Registry;

#[tokio::main]
async fn main() -> ExitCode {
    greeter::report(run().await)
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut registry = Registry::builder(etcd_endpoints());
    if let Some(address) = exporter::address_in(&args)? {
        let (recorder, address) = exporter::start(address, |error| println!("{error}")).await?;
        println!("metrics at http://{address}/metrics");
        registry = registry.metrics(recorder);
    }
    let registry = registry.connect().await?;
    let channel = registry.channel("helloworld.Greeter").connect().await?;
    let mut client = GreeterClient::new(channel);

    loop {
        let mut request = tonic::Request::new(HelloRequest {
            name: "world".to_owned(),
            replies: 1,
        });
        request.set_timeout(Duration::from_secs(5));
        match client.say_hello(request).await {
            Ok(reply) => println!("{}", reply.into_inner().message),
            Err(status) => println!("failed: {status}"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
