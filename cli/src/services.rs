//! `services`: the services below the prefix.

use std::process::ExitCode;

use serde_json::json;

use crate::error::Failure;
use crate::escape::escaped;
use crate::options::Options;
use crate::output::Output;
use crate::{connection, keys, table};

pub(crate) async fn run(options: &Options, output: &mut Output) -> Result<ExitCode, Failure> {
    let client = connection::client(options).await?;
    let services = keys::services(options, &client).await?;
    if output.is_json() {
        for (service, keys) in &services {
            output.json(&json!({ "service": service, "keys": keys }))?;
        }
    } else if !services.is_empty() {
        let rows: Vec<_> = services
            .iter()
            .map(|(service, keys)| vec![escaped(service), keys.to_string()])
            .collect();
        for line in table::lines(&["SERVICE", "KEYS"], &rows) {
            output.line(&line)?;
        }
    }
    if services.is_empty() {
        return Err(Failure::negative(format!(
            "no service is registered below {:?}; check --prefix and --format",
            keys::root(options)
        )));
    }
    Ok(ExitCode::SUCCESS)
}
