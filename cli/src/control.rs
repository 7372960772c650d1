//! `drain`, `resume` and `weight`: write the control key of a server, and wait until the server has applied it.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp};
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::control_keys::{Change, ControlKeys};
pub(crate) use crate::control_keys::{State, Status};
use crate::error::Failure;
use crate::escape::escaped;
use crate::keys::RegisteredKey;
use crate::options::{Options, duration};
use crate::output::Output;
use crate::{connection, keys};

/// The status keys of a service, by instance id.
pub(crate) type Statuses = BTreeMap<String, Status>;

/// The server that a command concerns.
#[derive(Args, Debug)]
pub(crate) struct Server {
    /// The service, such as helloworld.Greeter.
    service: String,
    /// The instance: its id, its address, or its key.
    instance: String,
    /// How long to wait until the server has applied the change.
    #[arg(long, default_value = "60s", value_parser = duration, value_name = "DURATION")]
    wait: Duration,
    /// Write the control key, and do not wait for the server.
    #[arg(long, conflicts_with = "wait")]
    no_wait: bool,
    /// Keep the change when the server restarts. Default: as before the change.
    #[arg(long)]
    sticky: Option<bool>,
}

#[derive(Args, Debug)]
pub(crate) struct DrainArguments {
    #[command(flatten)]
    server: Server,
    /// Only remove the server from the registry: write the state paused, and not draining.
    #[arg(long)]
    pause: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ResumeArguments {
    #[command(flatten)]
    server: Server,
}

#[derive(Args, Debug)]
pub(crate) struct WeightArguments {
    #[command(flatten)]
    server: Server,
    /// The weight. The library uses weights from 1 to 1000000.
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    weight: u32,
}

pub(crate) async fn drain(
    options: &Options,
    arguments: &DrainArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let state = if arguments.pause {
        State::Paused
    } else {
        State::Draining
    };
    let change = Change {
        state: Some(state),
        ..Change::default()
    };
    run(options, &arguments.server, change, output).await
}

pub(crate) async fn resume(
    options: &Options,
    arguments: &ResumeArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let change = Change {
        state: Some(State::Serving),
        ..Change::default()
    };
    run(options, &arguments.server, change, output).await
}

pub(crate) async fn weight(
    options: &Options,
    arguments: &WeightArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let change = Change {
        weight: Some(arguments.weight),
        ..Change::default()
    };
    run(options, &arguments.server, change, output).await
}

async fn run(
    options: &Options,
    server: &Server,
    change: Change,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let client = connection::client(options).await?;
    let registered = keys::read(options, &client, &server.service).await?;
    let statuses = statuses(options, &client, &server.service).await?;
    let id = find(&registered, &statuses, &server.instance).map_err(Failure::negative)?;
    let keys = ControlKeys::new(&options.control_prefix, &server.service);
    let change = Change {
        sticky: server.sticky,
        ..change
    };
    let revision = write(&client, &keys.instance(&id), change).await?;
    if !server.no_wait {
        return await_server(&client, &keys.status(&id), change, revision, server, output).await;
    }
    if output.is_json() {
        output.json(&json!({ "id": id, "revision": revision, "done": false }))?;
    } else {
        output.line(&format!("{}: written at revision {revision}", escaped(&id)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the status keys of a service. A status that cannot be read counts as empty.
pub(crate) async fn statuses(
    options: &Options,
    client: &Client,
    service: &str,
) -> Result<Statuses, Failure> {
    let prefix = ControlKeys::new(&options.control_prefix, service).statuses();
    let listed = client
        .kv_client()
        .get(prefix.as_str(), Some(GetOptions::new().with_prefix()))
        .await
        .map_err(|error| {
            Failure::of_etcd(
                &format!("read the keys below {:?}", escaped(&prefix)),
                &error,
            )
        })?;
    let status = |kv: &etcd_client::KeyValue| {
        let key = String::from_utf8_lossy(kv.key());
        let id = key.strip_prefix(&prefix)?.to_owned();
        Some((id, Status::parse(kv.value()).unwrap_or_default()))
    };
    Ok(listed.kvs().iter().filter_map(status).collect())
}

/// Finds the id of the instance that the user names by its id, its address or its key. A drained server has no instance key, so the status
/// keys are searched as well.
fn find(registered: &[RegisteredKey], statuses: &Statuses, wanted: &str) -> Result<String, String> {
    let mut found: Vec<&str> = Vec::new();
    for key in registered {
        let address = key.instance().map(|instance| instance.address().as_str());
        if key.id == wanted || key.key == wanted || address == Some(wanted) {
            found.push(&key.id);
        }
    }
    for (id, status) in statuses {
        if id == wanted || status.address.as_deref() == Some(wanted) {
            found.push(id);
        }
    }
    found.sort_unstable();
    found.dedup();
    // An exact id is unambiguous, even if it is also the address of another instance.
    if found.contains(&wanted) {
        return Ok(wanted.to_owned());
    }
    match found[..] {
        [id] => Ok(id.to_owned()),
        [] => Err(format!(
            "no instance has the id, address or key {wanted:?}; `tonic-etcd ls` lists the instances"
        )),
        _ => Err(format!(
            "{wanted:?} matches the instances {}; pass an id",
            found.join(", ")
        )),
    }
}

/// Changes a control key, and returns the revision of the write.
async fn write(client: &Client, key: &str, change: Change) -> Result<i64, Failure> {
    let what = format!("write {:?}", escaped(key));
    let mut kv = client.kv_client();
    for _ in 0..WRITE_ATTEMPTS {
        let current = kv.get(key, None).await;
        let current = current.map_err(|error| Failure::of_etcd(&what, &error))?;
        let current = current.kvs().first();
        let read_at = current.map_or(0, etcd_client::KeyValue::mod_revision);
        let value = change.apply(current.map(etcd_client::KeyValue::value));
        // Two operators may change the same key. The later one must not undo the change of the other.
        let unchanged = Compare::mod_revision(key, CompareOp::Equal, read_at);
        let transaction = Txn::new()
            .when([unchanged])
            .and_then([TxnOp::put(key, value, None)]);
        let answer = kv.txn(transaction).await;
        let answer = answer.map_err(|error| Failure::of_etcd(&what, &error))?;
        if answer.succeeded() {
            return Ok(answer
                .header()
                .map_or(0, etcd_client::ResponseHeader::revision));
        }
    }
    Err(Failure::conflict(format!(
        "cannot {what}: other writers changed the key {WRITE_ATTEMPTS} times; try again"
    )))
}

const WRITE_ATTEMPTS: usize = 5;

/// How far the server is.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    /// The reason why the change is not complete yet.
    Waiting(String),
    /// The server cannot use the control key.
    Rejected(String),
    Done,
}

impl Progress {
    fn of(status: Option<&Status>, change: Change, revision: i64) -> Self {
        let waiting = |reason: &str| Self::Waiting(reason.to_owned());
        let Some(status) = status else {
            return waiting("the server has not written a status; it may not support control keys");
        };
        if status.applied.is_none_or(|applied| applied < revision) {
            return waiting("the server has not applied the change yet");
        }
        if let Some(error) = &status.error {
            return Self::Rejected(escaped(error));
        }
        if change.weight.is_some() && status.weight != change.weight {
            return waiting("the server reports another weight");
        }
        match change.state {
            Some(State::Serving) if status.state != Some(State::Serving) => {
                waiting("the server is not in service yet")
            }
            Some(State::Draining | State::Paused) if status.state == Some(State::Serving) => {
                waiting("the server is still in service")
            }
            // A paused server keeps its calls.
            Some(State::Draining) if status.state == Some(State::Draining) => {
                match status.connections {
                    Some(open @ 1..) => Self::Waiting(format!("open connections: {open}")),
                    _ => waiting("the server has not removed its key yet"),
                }
            }
            _ => Self::Done,
        }
    }
}

/// Polls the status key. A watch would be faster by a fraction of a second, but it needs the handling of compactions and lost streams.
async fn await_server(
    client: &Client,
    key: &str,
    change: Change,
    revision: i64,
    server: &Server,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let deadline = Instant::now() + server.wait;
    let mut kv = client.kv_client();
    let mut shown = None;
    loop {
        let read = kv.get(key, None).await;
        let read =
            read.map_err(|error| Failure::of_etcd(&format!("read {:?}", escaped(key)), &error))?;
        let status = read.kvs().first().and_then(|kv| Status::parse(kv.value()));
        let progress = Progress::of(status.as_ref(), change, revision);
        let instance = escaped(&server.instance);
        let reason = match progress {
            Progress::Done => {
                report(&instance, "done", true, status.as_ref(), output)?;
                return Ok(ExitCode::SUCCESS);
            }
            Progress::Rejected(reason) => {
                return Err(Failure::negative(format!(
                    "{instance} cannot apply the change: {reason}"
                )));
            }
            Progress::Waiting(reason) => reason,
        };
        if shown.as_ref() != Some(&reason) {
            report(&instance, &reason, false, status.as_ref(), output)?;
            shown = Some(reason.clone());
        }
        if Instant::now() >= deadline {
            return Err(Failure::timed_out(format!(
                "{instance} did not confirm the change within {:?}: {reason}; the control key remains in etcd",
                server.wait
            )));
        }
        sleep(POLL_INTERVAL).await;
    }
}

const POLL_INTERVAL: Duration = Duration::from_millis(200);

fn report(
    instance: &str,
    text: &str,
    done: bool,
    status: Option<&Status>,
    output: &mut Output,
) -> Result<(), Failure> {
    if output.is_json() {
        output.json(&json!({
            "instance": instance,
            "done": done,
            "progress": text,
            "state": status.and_then(|status| status.state).map(State::as_str),
            "weight": status.and_then(|status| status.weight),
            "connections": status.and_then(|status| status.connections),
        }))?;
        return Ok(());
    }
    let state = status.and_then(|status| status.state);
    let state = state.map_or(String::new(), |state| format!(" ({})", state.as_str()));
    output.line(&format!("{instance}: {text}{state}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAIN: Change = Change {
        state: Some(State::Draining),
        weight: None,
        sticky: None,
    };

    fn status(json: &str) -> Status {
        Status::parse(json.as_bytes()).expect("the status is valid")
    }

    #[test]
    fn a_drain_is_done_when_the_server_has_applied_it_and_has_no_calls() {
        let of = |json: &str| Progress::of(Some(&status(json)), DRAIN, 7);
        assert!(matches!(Progress::of(None, DRAIN, 7), Progress::Waiting(_)));
        assert!(matches!(
            of(r#"{"state":"draining","applied":6}"#),
            Progress::Waiting(_)
        ));
        assert_eq!(
            of(r#"{"state":"draining","applied":7,"connections":2}"#),
            Progress::Waiting("open connections: 2".to_owned())
        );
        for done in [
            r#"{"state":"paused","applied":7,"connections":0}"#,
            r#"{"state":"paused","applied":8}"#,
        ] {
            assert_eq!(of(done), Progress::Done, "{done}");
        }
        assert_eq!(
            of(r#"{"state":"serving","applied":7,"error":"no such state"}"#),
            Progress::Rejected("no such state".to_owned())
        );
        assert!(matches!(
            of(r#"{"state":"serving","applied":7}"#),
            Progress::Waiting(_)
        ));
    }

    #[test]
    fn a_weight_is_done_when_the_server_reports_it() {
        let change = Change {
            weight: Some(3),
            ..Change::default()
        };
        let of = |json: &str| Progress::of(Some(&status(json)), change, 7);
        assert!(matches!(
            of(r#"{"state":"serving","weight":1,"applied":7}"#),
            Progress::Waiting(_)
        ));
        assert_eq!(
            of(r#"{"state":"serving","weight":3,"applied":7}"#),
            Progress::Done
        );
    }

    #[test]
    fn a_drained_server_is_found_by_its_status_key() {
        let statuses = Statuses::from([
            ("a".to_owned(), status(r#"{"address":"10.0.0.5:80"}"#)),
            ("b".to_owned(), status(r#"{"address":"10.0.0.6:80"}"#)),
            ("c".to_owned(), status(r#"{"address":"10.0.0.6:80"}"#)),
        ]);
        assert_eq!(find(&[], &statuses, "10.0.0.5:80"), Ok("a".to_owned()));
        assert_eq!(find(&[], &statuses, "b"), Ok("b".to_owned()));
        assert!(find(&[], &statuses, "10.0.0.6:80").is_err());
        assert!(find(&[], &statuses, "d").is_err());
    }
}
