//! Prints the instances under the given prefixes, and each later change:
//!
//! ```sh
//! cargo run --example discover -- /web/ /gRPC/
//! ```
//!
//! `+` marks a new server, `~` a changed server and `-` a removed server.
#![allow(clippy::print_stdout, reason = "the example prints its results")]

mod greeter;

use std::collections::HashSet;
use std::process::ExitCode;

use tokio_stream::StreamExt;
use tonic_etcd::{Instance, Registry};
use tower::discover::Change;

#[tokio::main]
async fn main() -> ExitCode {
    greeter::report(run().await)
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut prefixes: Vec<_> = std::env::args().skip(1).collect();
    if prefixes.is_empty() {
        prefixes = vec!["/web/".to_owned(), "/gRPC/".to_owned()];
    }
    let registry = Registry::connect(greeter::etcd_endpoints()).await?;
    let mut resolver = registry.resolver_at(prefixes).start();
    resolver.ready().await;
    println!("{} servers", resolver.instances().len());

    let mut known = HashSet::new();
    while let Some(Ok(change)) = resolver.next().await {
        match change {
            // An insert of a known address updates its instance.
            Change::Insert(address, instance) => {
                let sign = if known.insert(address) { '+' } else { '~' };
                println!("{sign} {}", describe(&instance));
            }
            Change::Remove(address) => {
                known.remove(&address);
                println!("- {address}");
            }
        }
        let addresses: Vec<_> = resolver
            .instances()
            .iter()
            .map(|instance| instance.address().to_string())
            .collect();
        println!("  now {}: {}", addresses.len(), addresses.join(" "));
    }
    Ok(())
}

fn describe(instance: &Instance) -> String {
    let mut parts = vec![
        instance.address().to_string(),
        instance
            .location()
            .map(|location| location.key().to_owned())
            .unwrap_or_default(),
    ];
    if instance.weight() != 1 {
        parts.push(format!("weight {}", instance.weight()));
    }
    for (name, value) in [("zone", instance.zone()), ("version", instance.version())] {
        parts.extend(value.map(|value| format!("{name} {value}")));
    }
    if instance.is_leaving() {
        parts.push("(leaving)".to_owned());
    }
    if instance.is_last_resort() {
        parts.push("(gone from etcd, kept as a last resort)".to_owned());
    }
    parts.join("  ")
}
