//! The subcommands of `config`.

use std::io::Read;
use std::process::ExitCode;

use etcd_client::{Client, Compare, CompareOp, Txn, TxnOp};
use serde_json::{Value, json};
use tonic_etcd::channel::ServiceConfig;

use super::arguments::{CheckArguments, ConfigCommand, Guard, SetArguments};
use super::diff::diff;
use crate::connection;
use crate::control_keys::ControlKeys;
use crate::error::Failure;
use crate::escape::{escaped, escaped_bytes, escaped_json};
use crate::options::Options;
use crate::output::Output;

pub(crate) async fn run(
    options: &Options,
    command: &ConfigCommand,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    match command {
        ConfigCommand::Get(arguments) => {
            let (_, stored) = Stored::read(options, &arguments.service).await?;
            get(&stored, output)
        }
        ConfigCommand::Set(arguments) => set(options, arguments, output).await,
        ConfigCommand::Check(arguments) => check(options, arguments, output).await,
        ConfigCommand::Rm(arguments) => {
            let (client, stored) = Stored::read(options, &arguments.of.service).await?;
            stored.existing()?;
            replace(&client, &stored, None, &arguments.guard, output).await
        }
    }
}

/// The key of a service config, as it was read.
struct Stored {
    key: String,
    /// The value and the mod revision, if the key exists.
    value: Option<(Vec<u8>, i64)>,
}

impl Stored {
    async fn read(options: &Options, service: &str) -> Result<(Client, Self), Failure> {
        if service.is_empty() || service.contains('/') {
            return Err(Failure::usage(format!(
                "{service:?} is not a service name: it is empty or contains a slash"
            )));
        }
        let key = ControlKeys::new(&options.control_prefix, service).config();
        let client = connection::client(options).await?;
        let read = client.kv_client().get(key.as_str(), None).await;
        let read = read.map_err(|error| {
            Failure::of_etcd(&format!("read the key {:?}", escaped(&key)), &error)
        })?;
        let found = read.kvs().first();
        let value = found.map(|kv| (kv.value().to_vec(), kv.mod_revision()));
        Ok((client, Self { key, value }))
    }

    fn revision(&self) -> i64 {
        self.value.as_ref().map_or(0, |(_, revision)| *revision)
    }

    fn existing(&self) -> Result<&[u8], Failure> {
        match &self.value {
            Some((value, _)) => Ok(value),
            None => Err(Failure::negative(format!(
                "there is no service config: the key {:?} does not exist",
                escaped(&self.key)
            ))),
        }
    }
}

/// Prints the value. The revision is printed to stderr, so that stdout can be edited and passed to `config set`.
fn get(stored: &Stored, output: &mut Output) -> Result<ExitCode, Failure> {
    let value = stored.existing()?;
    let checked = parse(value);
    if output.is_json() {
        output.json(&json!({
            "key": stored.key,
            "revision": stored.revision(),
            "config": serde_json::from_slice::<Value>(value).ok(),
            "error": checked.as_ref().err(),
        }))?;
    } else {
        crate::error::log(&format!("revision {}", stored.revision()));
        for line in pretty(value).lines() {
            output.line(line)?;
        }
    }
    match checked {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(reason) => Err(Failure::negative(reason)),
    }
}

async fn set(
    options: &Options,
    arguments: &SetArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let new = read_file(&arguments.file)?;
    parse(&new).map_err(Failure::negative)?;
    let (client, stored) = Stored::read(options, &arguments.of.service).await?;
    replace(&client, &stored, Some(new), &arguments.guard, output).await
}

async fn check(
    options: &Options,
    arguments: &CheckArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let checked = if let Some(file) = &arguments.file {
        parse(&read_file(file)?)
    } else {
        let (_, stored) = Stored::read(options, &arguments.of.service).await?;
        parse(stored.existing()?)
    };
    if output.is_json() {
        output.json(&json!({ "valid": checked.is_ok(), "error": checked.as_ref().err() }))?;
    }
    match checked {
        Ok(()) if output.is_json() => Ok(ExitCode::SUCCESS),
        Ok(()) => {
            output.line("the service config is valid")?;
            Ok(ExitCode::SUCCESS)
        }
        Err(reason) => Err(Failure::negative(reason)),
    }
}

/// Prints the changes, and writes or deletes the key, unless it was changed since it was read.
async fn replace(
    client: &Client,
    stored: &Stored,
    new: Option<Vec<u8>>,
    guard: &Guard,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let read_at = stored.revision();
    if let Some(expected) = guard.revision.filter(|expected| *expected != read_at) {
        return Err(Failure::conflict(format!(
            "the key {:?} has the revision {read_at}, and not {expected}: another writer has changed it",
            escaped(&stored.key)
        )));
    }
    let old = stored.value.as_ref().map(|(value, _)| pretty(value));
    let (old, shown) = (old.unwrap_or_default(), new.as_deref().map(pretty));
    let shown = shown.unwrap_or_default();
    let changes = diff(&old, &shown);
    if !output.is_json() {
        for (mark, line) in changes.iter().flatten() {
            output.line(&format!("{mark} {line}"))?;
        }
    }
    if changes.is_none() && stored.value.is_some() == new.is_some() {
        return report("unchanged", read_at, stored, output);
    }
    if guard.dry_run {
        return report("not written (--dry-run)", read_at, stored, output);
    }
    let key = stored.key.as_str();
    let (operation, verb, done) = match new {
        Some(new) => (TxnOp::put(key, new, None), "write", "written"),
        None => (TxnOp::delete(key, None), "delete", "deleted"),
    };
    let what = format!("{verb} {:?}", escaped(key));
    let unchanged = Compare::mod_revision(key, CompareOp::Equal, read_at);
    let transaction = Txn::new().when([unchanged]).and_then([operation]);
    let answer = client.kv_client().txn(transaction).await;
    let answer = answer.map_err(|error| Failure::of_etcd(&what, &error))?;
    if !answer.succeeded() {
        return Err(Failure::conflict(format!(
            "cannot {what}: another writer has changed the key meanwhile; try again"
        )));
    }
    let header = answer.header();
    let revision = header.map_or(0, etcd_client::ResponseHeader::revision);
    report(done, revision, stored, output)
}

fn report(
    done: &str,
    revision: i64,
    stored: &Stored,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    if output.is_json() {
        output.json(&json!({ "key": stored.key, "result": done, "revision": revision }))?;
    } else {
        let key = escaped(&stored.key);
        output.line(&format!("{key}: {done}, revision {revision}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks a value as clients do. Returns the reason why they cannot use it.
fn parse(value: &[u8]) -> Result<(), String> {
    if value.len() > VALUE_MAX {
        return Err(format!(
            "the service config has {} bytes, and the limit is {VALUE_MAX}",
            value.len()
        ));
    }
    let text = std::str::from_utf8(value);
    let text = text.map_err(|error| format!("the service config is not text: {error}"))?;
    match text.parse::<ServiceConfig>() {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// Formats a value on several lines, as JSON that can be edited and written again. A value that is not JSON is escaped.
fn pretty(value: &[u8]) -> String {
    let parsed = serde_json::from_slice::<Value>(value);
    let pretty = parsed.and_then(|value| serde_json::to_string_pretty(&value));
    match pretty {
        Ok(pretty) => escaped_json(&pretty) + "\n",
        Err(_) => escaped_bytes(value) + "\n",
    }
}

fn read_file(file: &str) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = if file == "-" {
        std::io::stdin()
            .lock()
            .read_to_end(&mut bytes)
            .map(|_| bytes)
    } else {
        std::fs::read(file)
    };
    read.map_err(|error| Failure::local(format!("cannot read {}: {error}", escaped(file))))
}

/// Limit on the length of a value in bytes. Clients reject longer values.
const VALUE_MAX: usize = 64 << 10;
