//! Watches a service, and prints or draws its changes.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_stream::StreamExt;
use tonic_etcd::error::EtcdErrorKind;
use tonic_etcd::instance::KeyLocation;
use tonic_etcd::resolver::{ResolverState, ResolverStatus};
use tonic_etcd::{Address, Resolver};

use super::changes::{Changes, Event, Kind};
use super::live::Live;
use super::view::{Sync, seconds};
use crate::cli::WatchArguments;
use crate::connection;
use crate::error::{Failure, advice, code, log};
use crate::escape::escaped;
use crate::options::Options;
use crate::output::Output;
use crate::probe::{Dial, Probe};
use crate::terminal::Screen;

pub(crate) async fn run(
    options: &Options,
    arguments: &WatchArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let dial = Dial::new(&arguments.tls, options.timeout)?;
    let dial = arguments.check.then_some(dial);
    let registry = connection::registry(options).await?;
    // The hold would hide removals, which are what the operator wants to see.
    let mut resolver = registry
        .resolver(&arguments.service)
        .mass_removal_protection(None);
    if let Some(format) = &options.format {
        resolver = resolver.format(format.clone());
    }
    let resolver = resolver.start();
    let prefix = options.service_prefix(&arguments.service);
    // One listener for the whole run: a listener for each iteration would miss signals in between.
    let interrupts = listen(SignalKind::interrupt())?;
    let screen = if output.is_json() {
        None
    } else {
        Screen::open()
    };
    let Some(screen) = screen else {
        return print_lines(resolver, &prefix, interrupts, dial.as_ref(), output).await;
    };
    let mut live = Live::new(screen, &arguments.service);
    let outcome = draw(resolver, &prefix, interrupts, dial, &mut live).await;
    // Before an error is printed. The lines remain visible after the view. After a hangup, they cannot be written. This must not replace the
    // outcome.
    for line in live.close() {
        if output.line(&line).is_err() {
            break;
        }
    }
    outcome
}

fn listen(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::local(format!("cannot handle a signal: {error}")))
}

/// Prints each change as one line, until SIGINT.
async fn print_lines(
    mut resolver: Resolver,
    prefix: &str,
    mut interrupts: Signal,
    dial: Option<&Dial>,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let mut statuses = resolver.watch_status();
    let mut changes = Changes::default();
    let mut reported = None;
    loop {
        tokio::select! {
            change = resolver.next() => {
                let Some(Ok(change)) = change else {
                    return Err(ended());
                };
                if let Some(event) = changes.apply(change, Instant::now()) {
                    let probe = match (event.kind, dial) {
                        (Kind::Join, Some(dial)) => Some(dial.probe(event.instance.address()).await),
                        _ => None,
                    };
                    print(&event, probe.as_ref(), output)?;
                }
            }
            outcome = statuses.changed() => {
                outcome.map_err(|_| ended())?;
                let status = statuses.borrow_and_update().clone();
                check_permission(&status, prefix)?;
                report_status(&status, &mut reported);
            }
            _ = interrupts.recv() => return Ok(ExitCode::SUCCESS),
        }
    }
}

/// Draws the live view until SIGINT. SIGTERM, SIGHUP and SIGQUIT (`Ctrl-\`) end it as well, and SIGTSTP (Ctrl-Z) suspends it, because the
/// terminal must be restored.
async fn draw(
    mut resolver: Resolver,
    prefix: &str,
    mut interrupts: Signal,
    dial: Option<Dial>,
    live: &mut Live,
) -> Result<ExitCode, Failure> {
    let mut terminations = listen(SignalKind::terminate())?;
    let mut hangups = listen(SignalKind::hangup())?;
    let mut quits = listen(SignalKind::quit())?;
    let mut stops = listen(SignalKind::from_raw(nix::libc::SIGTSTP))?;
    let mut statuses = resolver.watch_status();
    let mut changes = Changes::default();
    let mut checks: JoinSet<(Address, Probe)> = JoinSet::new();
    live.set_sync(sync(&statuses.borrow_and_update()));
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            change = resolver.next() => {
                let Some(Ok(change)) = change else {
                    return Err(ended());
                };
                if let Some(event) = changes.apply(change, Instant::now()) {
                    live.on_event(&event, line(&event, None));
                    if let (Kind::Join, Some(dial)) = (event.kind, &dial) {
                        let (dial, address) = (dial.clone(), event.instance.address().clone());
                        checks.spawn(async move {
                            let probe = dial.probe(&address).await;
                            (address, probe)
                        });
                    }
                }
            }
            Some(Ok((address, probe))) = checks.join_next() => {
                live.on_checked(&address, probe.text(), probe.answer.is_ready());
            }
            outcome = statuses.changed() => {
                outcome.map_err(|_| ended())?;
                let status = statuses.borrow_and_update().clone();
                check_permission(&status, prefix)?;
                live.set_sync(sync(&status));
            }
            _ = ticks.tick() => live.draw(),
            _ = interrupts.recv() => return Ok(ExitCode::SUCCESS),
            _ = terminations.recv() => return Ok(ExitCode::from(code::SIGNAL + 15)),
            _ = hangups.recv() => return Ok(ExitCode::from(code::SIGNAL + 1)),
            _ = quits.recv() => return Ok(ExitCode::from(code::SIGNAL + 3)),
            _ = stops.recv() => {
                live.suspend();
                live.draw();
            }
        }
    }
}

/// Fails if the user may not read the keys, and has never read them. Later, the watch continues: the permission may be granted again.
fn check_permission(status: &ResolverStatus, prefix: &str) -> Result<(), Failure> {
    match &status.last_error {
        Some(error)
            if status.state == ResolverState::Unknown
                && error.kind() == EtcdErrorKind::PermissionDenied =>
        {
            Err(Failure::of_resolver(prefix, error))
        }
        _ => Ok(()),
    }
}

fn ended() -> Failure {
    Failure::local("the watch has ended")
}

/// Logs to stderr when the set stops and starts to follow etcd. stdout has only changes of instances.
fn report_status(status: &ResolverStatus, reported: &mut Option<String>) {
    let trouble = trouble(status);
    if trouble == *reported {
        return;
    }
    match &trouble {
        Some(error) => log(error),
        None => log("the set is in sync with etcd again"),
    }
    *reported = trouble;
}

fn sync(status: &ResolverStatus) -> Sync {
    match trouble(status) {
        Some(reason) => Sync::Trouble(reason),
        None if status.state == ResolverState::Unknown => Sync::Unknown,
        None => Sync::Current,
    }
}

/// Returns why the set is not in sync with etcd. Returns `None` if it is, or if it is not known yet.
fn trouble(status: &ResolverStatus) -> Option<String> {
    match (&status.last_error, status.state) {
        (Some(error), _) => {
            let text = error.to_string();
            let advice = advice(&text);
            Some(text + advice)
        }
        (None, ResolverState::Stale) => Some("the set is not in sync with etcd".to_owned()),
        _ => None,
    }
}

fn print(event: &Event, probe: Option<&Probe>, output: &mut Output) -> Result<(), Failure> {
    if !output.is_json() {
        output.line(&line(event, probe))?;
        return Ok(());
    }
    let instance = &event.instance;
    let location = instance.location();
    output.json(&json!({
        "time": now(),
        "event": event.kind.name(),
        "after_ms": event.after.map(|after| after.as_secs_f64() * 1_000.0),
        "address": instance.address().as_str(),
        "id": instance.id(),
        "key": location.map(KeyLocation::key),
        "version": instance.version(),
        "zone": instance.zone(),
        "weight": instance.weight(),
        "leaving": instance.is_leaving(),
        "revision": location.map(|location| location.mod_revision().get()),
        "lease": location.and_then(KeyLocation::lease).map(|lease| format!("{:x}", lease.get())),
        "check": probe.map(|probe| probe.answer.text()),
        "latency_ms": probe.and_then(|probe| probe.latency).map(|latency| latency.as_secs_f64() * 1_000.0),
    }))?;
    Ok(())
}

fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

/// Returns an event as one line.
fn line(event: &Event, probe: Option<&Probe>) -> String {
    let (instance, mark) = (&event.instance, event.kind.mark());
    let key = instance.location().map(KeyLocation::key);
    let mut line = format!(
        "{} {mark} {} {}",
        now(),
        escaped(instance.address().as_str()),
        escaped(key.unwrap_or("-"))
    );
    let mut attributes = Vec::new();
    if event.kind != Kind::Leave {
        attributes.push(format!("weight={}", instance.weight()));
        let zone = instance.zone();
        attributes.extend(zone.map(|zone| format!("zone={}", escaped(zone))));
        let version = instance.version();
        attributes.extend(version.map(|version| format!("version={}", escaped(version))));
        attributes.extend(instance.is_leaving().then(|| "leaving".to_owned()));
        attributes.extend(probe.map(Probe::text));
    }
    let after = event.after.map(seconds);
    attributes.extend(after.map(|after| format!("after={}", after.replace(' ', ""))));
    for attribute in attributes {
        line.push(' ');
        line += &attribute;
    }
    line
}

/// The time between two drawings. An event is visible after at most this time.
const PERIOD: Duration = Duration::from_millis(200);
