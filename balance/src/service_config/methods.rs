//! Parses `methodConfig`: the settings of methods.

use std::collections::hash_map::Entry;

use tonic::Code;

use super::error::ServiceConfigError;
use super::node::{Node, escaped};
use crate::call::method_config::{MethodPolicy, MethodSettings, MethodTable, MethodTimeout};
use crate::call::retry::{HedgingPolicy, RetryPolicy};

type Result<T> = std::result::Result<T, ServiceConfigError>;

/// Parses the entries of `methodConfig`.
pub(super) fn method_table(entries: &Node<'_>) -> Result<MethodTable> {
    let mut table = MethodTable::default();
    for entry in entries.items()? {
        let settings = settings(&entry)?;
        let Some(names) = entry.field("name")? else {
            continue;
        };
        for name in names.items()? {
            insert(&mut table, &name, settings.clone())?;
        }
    }
    Ok(table)
}

/// Adds an entry under a name. An empty name stands for all methods.
fn insert(table: &mut MethodTable, name: &Node<'_>, settings: MethodSettings) -> Result<()> {
    let text = |field| match name.field(field)? {
        Some(text) => text.text(),
        None => Ok(""),
    };
    let (service, method) = (text("service")?, text("method")?);
    let is_new = match (service, method) {
        ("", "") => table.all.replace(settings).is_none(),
        ("", _) => return Err(name.missing("service", "the service of the method")),
        _ => match table.named.entry(format!("{service}/{method}").into()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(vacant) => {
                vacant.insert(settings);
                true
            }
        },
    };
    if is_new {
        return Ok(());
    }
    let found = match (service, method) {
        ("", _) => "a second entry for all methods".to_owned(),
        (service, "") => format!("a second entry for the service {}", escaped(service)),
        _ => format!(
            "a second entry for the method {}",
            escaped(&format!("{service}/{method}"))
        ),
    };
    Err(name.rejected("a name that occurs once", &found))
}

fn settings(entry: &Node<'_>) -> Result<MethodSettings> {
    let timeout = entry.field("timeout")?;
    let timeout = timeout.map(|timeout| timeout.duration()).transpose()?;
    let wait_for_ready = entry.field("waitForReady")?;
    let retry = entry.field("retryPolicy")?;
    let hedging = entry.field("hedgingPolicy")?;
    let policy = match (retry, hedging) {
        (Some(_), Some(hedging)) => {
            return Err(hedging.rejected("no hedgingPolicy beside a retryPolicy", "both"));
        }
        (Some(retry), None) => Some(MethodPolicy::Retry(retry_policy(&retry)?)),
        (None, Some(hedging)) => Some(MethodPolicy::Hedge(hedging_policy(&hedging)?)),
        (None, None) => None,
    };
    Ok(MethodSettings {
        policy,
        timeout: timeout.map(MethodTimeout::new),
        wait_for_ready: wait_for_ready.map(|wait| wait.boolean()).transpose()?,
        max_request_bytes: bytes(entry, "maxRequestMessageBytes")?,
        max_response_bytes: bytes(entry, "maxResponseMessageBytes")?,
    })
}

/// Returns a limit on messages. A limit beyond 32 bits is no limit, because the length of a message has 32 bits.
fn bytes(entry: &Node<'_>, name: &str) -> Result<Option<u32>> {
    let Some(limit) = entry.field(name)? else {
        return Ok(None);
    };
    let limit = limit.integer(0)?;
    Ok(Some(u32::try_from(limit).unwrap_or(u32::MAX)))
}

/// Parses a `retryPolicy`. All fields are required (gRFC A6). More than five attempts count as five.
fn retry_policy(node: &Node<'_>) -> Result<RetryPolicy> {
    let required = |name, expected| match node.field(name)? {
        Some(field) => Ok(field),
        None => Err(node.missing(name, expected)),
    };
    let backoff = |name| required(name, "a duration above zero")?.positive_duration();
    let multiplier = required("backoffMultiplier", MULTIPLIER)?;
    let codes = required("retryableStatusCodes", CODES)?;
    let parsed = status_codes(&codes)?;
    if parsed.is_empty() {
        return Err(codes.rejected(CODES, "an empty array"));
    }
    Ok(RetryPolicy::new(parsed)
        .max_attempts(attempts(&required("maxAttempts", ATTEMPTS)?)?)
        .initial_backoff(backoff("initialBackoff")?)
        .max_backoff(backoff("maxBackoff")?)
        .multiplier(multiplier.number(MULTIPLIER, |number| number > 0.0)?))
}

/// Parses a `hedgingPolicy`. Only the number of attempts is required (gRFC A6). Without a delay, all attempts are sent at once, and without
/// codes, every failure is fatal.
fn hedging_policy(node: &Node<'_>) -> Result<HedgingPolicy> {
    let Some(attempt_limit) = node.field("maxAttempts")? else {
        return Err(node.missing("maxAttempts", ATTEMPTS));
    };
    let delay = node.field("hedgingDelay")?;
    let delay = delay.map(|delay| delay.duration()).transpose()?;
    let codes = node.field("nonFatalStatusCodes")?;
    let codes = codes.map(|codes| status_codes(&codes)).transpose()?;
    let policy = HedgingPolicy::new(attempts(&attempt_limit)?, delay.unwrap_or_default());
    Ok(policy.non_fatal_codes(codes.unwrap_or_default()))
}

/// Returns a number of attempts. The policies reduce it to their limit, 5.
fn attempts(node: &Node<'_>) -> Result<u32> {
    let attempts = node.integer(2)?;
    Ok(u32::try_from(attempts).unwrap_or(u32::MAX))
}

/// Parses a list of status codes, each by its name in capitals or by its number.
fn status_codes(node: &Node<'_>) -> Result<Vec<Code>> {
    let code = |node: Node<'_>| {
        const EXPECTED: &str = "the name of a status code, such as \"UNAVAILABLE\"";
        let by_name = node.text().ok().map(|name| {
            let mut names = CODE_NAMES.iter().zip(0..);
            names
                .find(|(known, _)| **known == name)
                .map(|(_, code)| code)
        });
        let code = match by_name {
            Some(code) => code,
            // Go leaves the element at its zero value, which is `OK`.
            None if node.is_null() => Some(0),
            None => node
                .integer_in(0, 16)
                .ok()
                .and_then(|code| i32::try_from(code).ok()),
        };
        let code = code.ok_or_else(|| node.unexpected(EXPECTED))?;
        Ok(Code::from_i32(code))
    };
    node.items()?.into_iter().map(code).collect()
}

const ATTEMPTS: &str = "an integer of at least 2";
const MULTIPLIER: &str = "a number above 0";
const CODES: &str = "an array with at least one status code";
/// The names of the status codes, in the order of their numbers.
const CODE_NAMES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
