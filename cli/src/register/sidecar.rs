//! The phases of `register`: start, wait until the command responds, register, check, deregister, stop.

use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep, timeout};
use tonic_etcd::Registration;

use super::arguments::RegisterArguments;
use super::child::{Child, Interrupt, exit_code};
use super::health::{Action, Health};
use super::readiness::Readiness;
use super::signals::Signals;
use crate::connection;
use crate::error::{Failure, log};
use crate::options::Options;

pub(crate) async fn run(
    options: &Options,
    arguments: RegisterArguments,
) -> Result<ExitCode, Failure> {
    let readiness = Readiness::new(&arguments, options.timeout)?;
    let registration = registration(options, &arguments)?;
    // The handlers are installed first: a signal that arrives before would end this process, but not the command.
    let mut signals = Signals::new()?;
    let mut child = Child::spawn(&arguments.command)?;
    let ready = tokio::select! {
        biased;
        interrupt = child.interrupted(&mut signals) => Err(interrupt?),
        ready = await_ready(&readiness, arguments.ready_timeout) => Ok(ready),
    };
    match ready {
        Err(interrupt) => return stop(child, signals, None, interrupt, &arguments).await,
        Ok(Err(failure)) => return give_up(child, signals, failure, &arguments).await,
        Ok(Ok(())) => {}
    }
    let mut states = registration.watch_state();
    let registered = tokio::select! {
        biased;
        interrupt = child.interrupted(&mut signals) => Err(interrupt?),
        registered = registration.register() => Ok(registered),
    };
    let registration = match registered {
        Err(interrupt) => {
            // The key may be in etcd already. The dropped registration removes it in the background, which the end of this process would
            // cut short. The task drops the sender when it ends.
            let removed = async { while states.changed().await.is_ok() {} };
            if timeout(options.timeout, removed).await.is_err() {
                log("the key may remain in etcd until its lease expires");
            }
            return stop(child, signals, None, interrupt, &arguments).await;
        }
        Ok(Err(error)) => return give_up(child, signals, error.into(), &arguments).await,
        Ok(Ok(registration)) => registration,
    };
    log(&format!("registered {}", registration.key()));
    let interrupt = tokio::select! {
        biased;
        interrupt = child.interrupted(&mut signals) => interrupt?,
        () = monitor(&registration, &readiness, &arguments) => return Err(Failure::local("the checks have ended")),
    };
    stop(child, signals, Some(registration), interrupt, &arguments).await
}

/// Connects to etcd at the first request, so that the command starts while etcd is down. The registration is repeated until etcd responds.
fn registration(
    options: &Options,
    arguments: &RegisterArguments,
) -> Result<tonic_etcd::registration::RegistrationBuilder, Failure> {
    let registry = connection::registry_builder(options)?.connect_lazy()?;
    let mut registration = registry
        .registration(&arguments.service)
        .address(&arguments.address)
        .format(options.key_format())
        .ttl(arguments.ttl)
        .deregister_timeout(options.timeout)
        .startup_timeout(FOR_EVER);
    if let Some(id) = &arguments.id {
        registration = registration.instance_id(id);
    }
    if let Some(weight) = arguments.weight {
        registration = registration.weight(weight);
    }
    if let Some(zone) = &arguments.zone {
        registration = registration.zone(zone);
    }
    if let Some(version) = &arguments.version {
        registration = registration.version(version);
    }
    for (name, value) in &arguments.metadata {
        registration = registration.metadata(name, value);
    }
    Ok(registration)
}

/// A year. The end of the timeout must be representable as an `Instant`.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

async fn await_ready(readiness: &Readiness, limit: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + limit;
    while let Some(reason) = readiness.check().await {
        if Instant::now() >= deadline {
            return Err(Failure::timed_out(format!(
                "the command did not respond within {limit:?}: {reason}; check the address, --check-address and --ready"
            )));
        }
        sleep(READY_INTERVAL).await;
    }
    Ok(())
}

/// The time between two checks before the first success. It delays the registration, so it is shorter than the interval later on.
const READY_INTERVAL: Duration = Duration::from_millis(100);

/// Deregisters the server while it fails its checks. Never returns.
async fn monitor(
    registration: &Registration,
    readiness: &Readiness,
    arguments: &RegisterArguments,
) {
    let mut health = Health::new(arguments.failures);
    loop {
        sleep(arguments.check_interval).await;
        let reason = readiness.check().await;
        let changed = match health.on_check(reason.is_none()) {
            None => continue,
            Some(Action::Deregister) => {
                let reason = reason.unwrap_or_default();
                log(&format!(
                    "deregistering: the command does not respond: {reason}"
                ));
                registration.pause().await
            }
            Some(Action::Register) => {
                log("registering again: the command responds");
                registration.resume().await
            }
        };
        if let Err(error) = changed {
            log(&error.to_string());
        }
    }
}

/// Deregisters, waits for the grace period, and stops the command.
async fn stop(
    mut child: Child,
    mut signals: Signals,
    registration: Option<Registration>,
    interrupt: Interrupt,
    arguments: &RegisterArguments,
) -> Result<ExitCode, Failure> {
    let was_registered = registration.is_some();
    if let Some(registration) = registration {
        match registration.deregister().await {
            Ok(()) => log("deregistered"),
            Err(error) => log(&error.to_string()),
        }
    }
    let signal = match interrupt {
        Interrupt::Exited(status) => return Ok(exit_code(status)),
        Interrupt::Stop(signal) => signal,
    };
    let signal = if was_registered {
        // A second signal ends the grace period.
        match timeout(arguments.grace_period, child.interrupted(&mut signals)).await {
            Err(_) => signal,
            Ok(interrupt) => match interrupt? {
                Interrupt::Exited(status) => return Ok(exit_code(status)),
                Interrupt::Stop(second) => second,
            },
        }
    } else {
        signal
    };
    let status = child
        .stop(signal, arguments.stop_timeout, &mut signals)
        .await?;
    Ok(exit_code(status))
}

/// Stops the command, and returns the failure that ends `register`.
async fn give_up(
    mut child: Child,
    mut signals: Signals,
    failure: Failure,
    arguments: &RegisterArguments,
) -> Result<ExitCode, Failure> {
    let stopped = child
        .stop(Signal::SIGTERM, arguments.stop_timeout, &mut signals)
        .await;
    stopped.and(Err(failure))
}
