//! `ls`: what is registered for a service.

use std::process::ExitCode;

use serde_json::{Value as Json, json};

use crate::bounded::run_all;
use crate::cli::LsArguments;
use crate::control::Statuses;
use crate::error::{Failure, log};
use crate::escape::escaped;
use crate::keys::{RegisteredKey, Value};
use crate::options::Options;
use crate::output::Output;
use crate::probe::{Dial, Probe};
use crate::{connection, control, keys, table};

/// One line of the list.
#[derive(Debug)]
struct Row<'a> {
    key: &'a RegisteredKey,
    state: &'a str,
    probe: Option<Probe>,
}

pub(crate) async fn run(
    options: &Options,
    arguments: &LsArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let dial = Dial::new(&arguments.tls, options.timeout)?;
    let client = connection::client(options).await?;
    let registered = keys::read(options, &client, &arguments.service).await?;
    let statuses = control::statuses(options, &client, &arguments.service).await;
    let statuses = statuses.unwrap_or_else(|failure| {
        // Clients may not read the control prefix. The instances are listed anyway.
        log(&format!("the states of the servers are unknown: {failure}"));
        Statuses::default()
    });
    let probes = if arguments.check {
        probe_all(&dial, &registered).await
    } else {
        vec![None; registered.len()]
    };
    let rows: Vec<_> = std::iter::zip(&registered, probes)
        .map(|(key, probe)| Row {
            key,
            state: state(key, &statuses),
            probe,
        })
        .collect();
    let out_of_service: Vec<_> = statuses
        .iter()
        .filter(|(id, _)| !registered.iter().any(|key| key.id == **id))
        .collect();
    if rows.is_empty() && out_of_service.is_empty() {
        return Err(Failure::negative(format!(
            "service {:?} has no key below {:?}; check the name, --prefix and --format, or run `tonic-etcd doctor {}`",
            arguments.service,
            options.service_prefix(&arguments.service),
            escaped(&arguments.service),
        )));
    }
    if output.is_json() {
        for row in &rows {
            output.json(&row.json())?;
        }
        for (id, status) in &out_of_service {
            output.json(&json!({
                "id": id,
                "state": status.state.map(control::State::as_str),
                "address": status.address,
                "weight": status.weight,
                "connections": status.connections,
            }))?;
        }
    } else {
        print(&rows, &out_of_service, arguments.check, output)?;
    }
    let failed = rows.iter().any(|row| {
        matches!(row.key.value, Value::Rejected(_))
            || row
                .probe
                .as_ref()
                .is_some_and(|probe| !probe.answer.is_ready())
    });
    Ok(if failed {
        ExitCode::from(crate::error::code::NEGATIVE)
    } else {
        ExitCode::SUCCESS
    })
}

/// Dials the addresses of all instances. Each address is dialled once.
pub(crate) async fn probe_all(dial: &Dial, keys: &[RegisteredKey]) -> Vec<Option<Probe>> {
    let mut addresses: Vec<_> = keys
        .iter()
        .filter_map(|key| key.instance().map(|instance| instance.address().clone()))
        .collect();
    addresses.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    addresses.dedup();
    let dials = addresses.iter().cloned().map(|address| {
        let dial = dial.clone();
        async move { dial.probe(&address).await }
    });
    let probes = run_all(dials).await;
    let result_of = |key: &RegisteredKey| {
        let address = key.instance()?.address();
        let index = addresses.iter().position(|known| known == address)?;
        probes.get(index).cloned()
    };
    keys.iter().map(result_of).collect()
}

fn state<'a>(key: &RegisteredKey, statuses: &'a Statuses) -> &'a str {
    match &key.value {
        Value::Rejected(_) => "unreadable",
        Value::Ignored => "out of service",
        Value::Instance { instance, .. } if instance.is_leaving() => "leaving",
        Value::Instance { .. } => statuses
            .get(&key.id)
            .and_then(|status| status.state)
            .map_or("registered", control::State::as_str),
    }
}

fn print(
    rows: &[Row<'_>],
    out_of_service: &[(&String, &control::Status)],
    check: bool,
    output: &mut Output,
) -> Result<(), Failure> {
    let mut header = vec![
        "ADDRESS", "STATE", "VERSION", "ZONE", "WEIGHT", "TTL LEFT", "REVISION", "FORMAT", "KEY",
    ];
    if check {
        header.insert(1, "CHECK");
    }
    let mut cells: Vec<_> = rows.iter().map(|row| row.cells(check)).collect();
    for (id, status) in out_of_service {
        let state = status.state.map_or("unknown", control::State::as_str);
        let connections = status
            .connections
            .map_or(String::new(), |open| format!(" ({open} connections)"));
        let mut row = vec![dash(); header.len()];
        row[0] = escaped(status.address.as_deref().unwrap_or(id));
        row[header.iter().position(|name| *name == "STATE").unwrap_or(1)] =
            format!("{state}{connections}");
        cells.push(row);
    }
    for line in table::lines(&header, &cells) {
        output.line(&line)?;
    }
    for row in rows {
        if let Value::Rejected(reason) = &row.key.value {
            let key = escaped(&row.key.key);
            output.line(&format!("rejected: {key}: the value {reason}"))?;
        }
    }
    Ok(())
}

fn dash() -> String {
    "-".to_owned()
}

impl Row<'_> {
    fn cells(&self, check: bool) -> Vec<String> {
        let instance = self.key.instance();
        let text = |value: Option<&str>| value.map_or_else(dash, escaped);
        let mut cells = vec![
            instance.map_or_else(dash, |instance| escaped(instance.address().as_str())),
            self.state.to_owned(),
            text(instance.and_then(|instance| instance.version())),
            text(instance.and_then(|instance| instance.zone())),
            instance.map_or_else(dash, |instance| instance.weight().to_string()),
            self.ttl(),
            self.key.mod_revision.to_string(),
            match &self.key.value {
                Value::Instance { format, .. } => format.clone(),
                _ => dash(),
            },
            escaped(&self.key.key),
        ];
        if check {
            let result = self.probe.as_ref().map_or_else(dash, Probe::text);
            cells.insert(1, result);
        }
        cells
    }

    fn ttl(&self) -> String {
        match self.key.lease {
            None => "no lease".to_owned(),
            Some(lease) => lease.ttl.map_or("?".to_owned(), |(left, granted)| {
                format!("{left}/{granted} s")
            }),
        }
    }

    fn json(&self) -> Json {
        let instance = self.key.instance();
        let (format, rejected) = match &self.key.value {
            Value::Instance { format, .. } => (Some(format), None),
            Value::Ignored => (None, None),
            Value::Rejected(reason) => (None, Some(reason)),
        };
        let lease = self.key.lease;
        json!({
            "address": instance.map(|instance| instance.address().as_str()),
            "id": self.key.id,
            "state": self.state,
            "version": instance.and_then(|instance| instance.version()),
            "zone": instance.and_then(|instance| instance.zone()),
            "weight": instance.map(tonic_etcd::Instance::weight),
            "tls": instance.map(tonic_etcd::Instance::is_tls),
            "metadata": instance.map(tonic_etcd::Instance::metadata),
            "lease": lease.map(|lease| format!("{:x}", lease.id)),
            "ttl_left": lease.and_then(|lease| lease.ttl).map(|(left, _)| left),
            "ttl": lease.and_then(|lease| lease.ttl).map(|(_, granted)| granted),
            "revision": self.key.mod_revision,
            "format": format,
            "key": self.key.key,
            "rejected": rejected,
            "check": self.probe.as_ref().map(|probe| probe.answer.text()),
            "ready": self.probe.as_ref().map(|probe| probe.answer.is_ready()),
            "latency_ms": self.probe.as_ref().and_then(|probe| probe.latency)
                .map(|latency| latency.as_secs_f64() * 1_000.0),
        })
    }
}
