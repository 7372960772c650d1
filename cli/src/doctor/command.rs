//! Runs `doctor`.

use std::process::ExitCode;

use super::etcd_facts::{self, Cluster};
use super::facts::{Access, Facts, Service};
use super::findings::findings;
use super::{report, service_facts};
use crate::cli::DoctorArguments;
use crate::connection;
use crate::error::{Failure, code};
use crate::keys;
use crate::options::Options;
use crate::output::Output;
use crate::probe::Dial;

pub(crate) async fn run(
    options: &Options,
    arguments: &DoctorArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let dial = Dial::new(&arguments.tls, options.timeout)?;
    let facts = gather(options, arguments, &dial).await?;
    let findings = findings(&facts);
    report::write(&facts, &findings, output)?;
    Ok(match (&facts.connection, findings.is_empty()) {
        (Err(_), _) => ExitCode::from(code::ETCD),
        (Ok(()), true) => ExitCode::SUCCESS,
        (Ok(()), false) => ExitCode::from(code::NEGATIVE),
    })
}

async fn gather(
    options: &Options,
    arguments: &DoctorArguments,
    dial: &Dial,
) -> Result<Facts, Failure> {
    let prefix = match &arguments.service {
        Some(service) => options.service_prefix(service),
        None => keys::root(options),
    };
    let mut facts = Facts {
        endpoints: options.endpoints.clone(),
        connection: Ok(()),
        members: Ok(Vec::new()),
        dead_endpoints: Vec::new(),
        alarms: Ok(Vec::new()),
        clocks: Vec::new(),
        user: options.credentials()?.map(|(user, _)| user),
        prefix,
        read: Access::Granted,
        write: Access::Granted,
        wanted: arguments.service.clone(),
        services: Vec::new(),
        elsewhere: Vec::new(),
        remote_clients: arguments.remote_clients,
        client_tls: dial.is_tls(),
    };
    let client = match connection::client(options).await {
        Ok(client) => client,
        Err(failure) if failure.is_usage() => return Err(failure),
        Err(failure) => {
            facts.connection = Err(failure.to_string());
            return Ok(facts);
        }
    };
    let Cluster {
        members,
        dead_endpoints,
        alarms,
        clocks,
    } = etcd_facts::cluster(options, &client).await;
    facts.members = members;
    facts.dead_endpoints = dead_endpoints;
    facts.alarms = alarms;
    facts.clocks = clocks;
    facts.read = etcd_facts::may_read(&client, &facts.prefix).await;
    facts.write = etcd_facts::may_write(&client, &facts.prefix).await;
    if facts.read != Access::Granted {
        return Ok(facts);
    }
    let names = match &arguments.service {
        Some(service) => vec![service.clone()],
        None => keys::services(options, &client)
            .await?
            .into_keys()
            .collect(),
    };
    let dial = (!arguments.no_dial).then_some(dial);
    for name in names {
        let service = service_facts::service(options, &client, &name, dial).await?;
        facts.services.push(service);
    }
    let has_keys = |service: &Service| !service.keys.is_empty();
    if let Some(wanted) = &arguments.service
        && !facts.services.iter().any(has_keys)
    {
        facts.elsewhere = service_facts::elsewhere(options, &client, wanted).await;
    }
    Ok(facts)
}
