//! Prints what is registered under some prefixes, and again whenever it changes:
//!
//! ```sh
//! cargo run --example discover -- /web/ /gRPC/
//! ```
#![allow(clippy::print_stdout, reason = "it is what the example is for")]

mod greeter;

use tokio_stream::StreamExt;
use tonic_etcd::Registry;
use tower::discover::Change;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut prefixes: Vec<_> = std::env::args().skip(1).collect();
    if prefixes.is_empty() {
        prefixes = vec!["/web/".to_owned(), "/gRPC/".to_owned()];
    }
    let registry = Registry::connect(greeter::etcd_endpoints()).await?;
    let mut resolver = registry.resolver_at(prefixes);
    resolver.ready().await;
    println!("{} servers", resolver.instances().len());

    while let Some(Ok(change)) = resolver.next().await {
        match change {
            Change::Insert(address, instance) => println!("+ {address}  {}", instance.key()),
            Change::Remove(address) => println!("- {address}"),
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
