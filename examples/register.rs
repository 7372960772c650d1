//! Registers any address under any key, prints each renewal of the lease, and deletes the key on
//! Ctrl-C or SIGTERM:
//!
//! ```sh
//! cargo run --example register -- /web/node1 localhost:8000
//! ```
#![allow(clippy::print_stdout, reason = "the example prints its results")]

mod greeter;

use std::process::ExitCode;
use std::time::Duration;

use tokio::time::Instant;
use tonic_etcd::{Format, Registry, registration::RegistrationState};

#[tokio::main]
async fn main() -> ExitCode {
    greeter::report(run().await)
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(key), Some(address)) = (args.next(), args.next()) else {
        return Err("usage: register KEY HOST:PORT".into());
    };
    let mut stop_signal = std::pin::pin!(stop_signal()?);
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

    let mut states = registration.watch_state();
    loop {
        tokio::select! {
            () = &mut stop_signal => break,
            changed = states.changed() => {
                changed?;
                println!("{}", describe(&states.borrow_and_update()));
            }
        }
    }
    registration.deregister().await?;
    println!("deregistered");
    Ok(())
}

fn describe(state: &RegistrationState) -> String {
    match state {
        RegistrationState::Registered { lease, expires, .. } => {
            let left = expires.saturating_duration_since(Instant::now());
            format!(
                "registered under lease {lease}, {:.1} s left",
                left.as_secs_f64()
            )
        }
        RegistrationState::Registering {
            last_error: Some(error),
            ..
        } => format!("not registered: {}", greeter::with_causes(error)),
        RegistrationState::Registering { .. } => "registering".to_owned(),
        RegistrationState::Superseded { lease, .. } => {
            let lease = lease.map_or_else(|| "none".to_owned(), |lease| lease.to_string());
            format!("another server has the key, with lease {lease}")
        }
        other => format!("{other:?}").to_lowercase(),
    }
}

/// Installs handlers for Ctrl-C and SIGTERM. The returned future completes on the first of these
/// signals.
#[cfg(unix)]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async { drop(tokio::signal::ctrl_c().await) })
}
