//! `watch`: the instances of a service, and their changes.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::SystemTime;

use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt;
use tonic_etcd::instance::KeyLocation;
use tonic_etcd::resolver::ResolverState;
use tonic_etcd::{Address, Instance};
use tower::discover::Change;

use crate::cli::WatchArguments;
use crate::connection;
use crate::error::{Failure, log};
use crate::escape::escaped;
use crate::options::Options;
use crate::output::Output;
use crate::probe::{Dial, Probe};

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
    let mut resolver = resolver.start();
    let mut statuses = resolver.watch_status();
    // One listener for the whole run: a listener for each iteration would miss signals in between.
    let mut interrupts = signal(SignalKind::interrupt())
        .map_err(|error| Failure::local(format!("cannot handle SIGINT: {error}")))?;
    let mut known = BTreeMap::new();
    let mut reported = None;
    loop {
        tokio::select! {
            change = resolver.next() => match change {
                Some(Ok(change)) => on_change(change, &mut known, dial.as_ref(), output).await?,
                Some(Err(never)) => match never {},
                None => return Err(Failure::local("the watch has ended")),
            },
            changed = statuses.changed() => {
                if changed.is_err() {
                    return Err(Failure::local("the watch has ended"));
                }
                let status = statuses.borrow_and_update().clone();
                report_status(&status, &mut reported);
            }
            _ = interrupts.recv() => return Ok(ExitCode::SUCCESS),
        }
    }
}

/// Logs to stderr when the set stops and starts to follow etcd. stdout has only changes of instances.
fn report_status(status: &tonic_etcd::resolver::ResolverStatus, reported: &mut Option<String>) {
    let trouble = match (&status.last_error, status.state) {
        (Some(error), _) => Some(error.to_string()),
        (None, ResolverState::Stale) => Some("the set is not in sync with etcd".to_owned()),
        _ => None,
    };
    if trouble == *reported {
        return;
    }
    match &trouble {
        Some(error) => log(error),
        None => log("the set is in sync with etcd again"),
    }
    *reported = trouble;
}

async fn on_change(
    change: Change<Address, Instance>,
    known: &mut BTreeMap<String, Instance>,
    dial: Option<&Dial>,
    output: &mut Output,
) -> Result<(), Failure> {
    let (mark, event, instance) = match change {
        Change::Insert(address, instance) => {
            match known.insert(address.to_string(), instance.clone()) {
                None => ('+', "join", instance),
                Some(_) => ('~', "change", instance),
            }
        }
        Change::Remove(address) => match known.remove(address.as_str()) {
            Some(instance) => ('-', "leave", instance),
            None => return Ok(()),
        },
    };
    let probe = match (mark, dial) {
        ('+', Some(dial)) => Some(dial.probe(instance.address()).await),
        _ => None,
    };
    print(mark, event, &instance, probe.as_ref(), output)
}

fn print(
    mark: char,
    event: &str,
    instance: &Instance,
    probe: Option<&Probe>,
    output: &mut Output,
) -> Result<(), Failure> {
    let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let key = instance.location().map(KeyLocation::key);
    if output.is_json() {
        let location = instance.location();
        output.json(&json!({
            "time": now,
            "event": event,
            "address": instance.address().as_str(),
            "id": instance.id(),
            "key": key,
            "version": instance.version(),
            "zone": instance.zone(),
            "weight": instance.weight(),
            "leaving": instance.is_leaving(),
            "revision": location.map(|location| location.mod_revision().get()),
            "lease": location.and_then(KeyLocation::lease).map(|lease| format!("{:x}", lease.get())),
            "check": probe.map(|probe| probe.answer.text()),
            "latency_ms": probe.and_then(|probe| probe.latency).map(|latency| latency.as_secs_f64() * 1_000.0),
        }))?;
        return Ok(());
    }
    let mut line = format!(
        "{now} {mark} {} {}",
        escaped(instance.address().as_str()),
        escaped(key.unwrap_or("-"))
    );
    if mark != '-' {
        let attributes = [
            Some(format!("weight={}", instance.weight())),
            instance
                .zone()
                .map(|zone| format!("zone={}", escaped(zone))),
            instance
                .version()
                .map(|version| format!("version={}", escaped(version))),
            instance.is_leaving().then(|| "leaving".to_owned()),
            probe.map(Probe::text),
        ];
        for attribute in attributes.into_iter().flatten() {
            line.push(' ');
            line += &attribute;
        }
    }
    output.line(&line)?;
    Ok(())
}
