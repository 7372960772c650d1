//! Registers any address under any key, logs each renewal of the lease, and takes the key away on Ctrl-C:
//!
//! ```sh
//! cargo run --example register -- /web/node1 localhost:8000
//! ```
#![allow(clippy::print_stdout, reason = "it is what the example is for")]

mod greeter;

use std::time::Duration;

use tonic_etcd::{Format, Registry};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(key), Some(address)) = (args.next(), args.next()) else {
        return Err("usage: register KEY HOST:PORT".into());
    };
    let registry = Registry::connect(greeter::etcd_endpoints()).await?;
    let registration = registry
        .registration_at(key)
        .address(address)
        .format(Format::Plain)
        .ttl(Duration::from_secs(5))
        .register()
        .await?;
    println!(
        "{} is registered as {}",
        registration.address(),
        registration.key()
    );

    let mut states = registration.states();
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => break,
            _ = states.changed() => println!("{:?}", *states.borrow_and_update()),
        }
    }
    registration.deregister().await?;
    println!("deregistered");
    Ok(())
}
