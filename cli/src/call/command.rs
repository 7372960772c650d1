//! Runs `call`.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use http::uri::PathAndQuery;
use prost_reflect::{DynamicMessage, MethodDescriptor};
use serde_json::json;
use tokio::time::Instant;
use tonic::client::Grpc;
use tonic::{Request, Status};
use tonic_etcd::channel::ServedBy;
use tonic_etcd::error::{CallError, ChannelError};
use tonic_etcd::{BalancedChannel, TlsConfig};

use super::arguments::CallArguments;
use super::codec::DynamicCodec;
use super::{load, reflection};
use crate::connection;
use crate::error::{Failure, code};
use crate::escape::{escaped, escaped_json};
use crate::options::Options;
use crate::output::Output;
use crate::probe::millis;

pub(crate) async fn run(
    options: &Options,
    arguments: &CallArguments,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let channel = channel(options, arguments).await?;
    let (service, name) = match arguments.method.rsplit_once('/') {
        Some((service, name)) => (service.trim_start_matches('/'), name),
        None => (arguments.service.as_str(), arguments.method.as_str()),
    };
    let method = reflection::method(&channel, service, name).await?;
    let call = Call::new(channel, &method, &arguments.request)?;
    if arguments.load.is_some() {
        return load::run(call, arguments, output).await;
    }
    let result = call.send().await;
    let elapsed = result.elapsed;
    let server = result
        .server
        .as_deref()
        .map_or("no server".to_owned(), escaped);
    match result.outcome {
        Ok(response) if output.is_json() => {
            output.json(&json!({
                "server": result.server,
                "latency_ms": elapsed.as_secs_f64() * 1_000.0,
                "response": response,
            }))?;
        }
        Ok(response) => {
            output.line(&format!("{server} responded in {}", millis(elapsed)))?;
            let text = serde_json::to_string_pretty(&response).map_err(std::io::Error::from)?;
            output.line(&escaped_json(&text))?;
        }
        Err(status) => {
            return Err(Failure::new(
                code::TIMED_OUT,
                format!(
                    "{server}: the call failed: {:?}: {}",
                    status.code(),
                    status.message()
                ),
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn channel(options: &Options, arguments: &CallArguments) -> Result<BalancedChannel, Failure> {
    let registry = connection::registry(options).await?;
    // It shares the work of the channel's own resolver, and tells why the servers are not known.
    let mut resolver = registry.resolver(&arguments.service);
    if let Some(format) = &options.format {
        resolver = resolver.format(format.clone());
    }
    let resolver = resolver.start();
    let mut builder = registry
        .channel(&arguments.service)
        .timeout(options.timeout)
        .startup_timeout(options.timeout);
    if let Some(format) = options.format.clone() {
        builder = builder.map_source(|resolver| resolver.format(format));
    }
    let tls = &arguments.tls;
    if tls.server_cacert.is_some() || tls.server_tls {
        let name = tls.server_name.clone().ok_or_else(|| {
            Failure::usage(
                "set --server-name to the name in the certificates of the servers: their addresses come from etcd, so the hosts prove nothing",
            )
        })?;
        let config = TlsConfig::new(name);
        builder = builder.tls_config(match &tls.server_cacert {
            Some(path) => config.ca_certificate_file(path),
            None => config.with_native_roots(),
        });
    }
    let connected = builder.connect().await;
    connected.map_err(|error: ChannelError| match resolver.status().last_error {
        Some(cause) => {
            let keys = options.service_prefix(&arguments.service);
            Failure::of_resolver(&keys, &cause)
        }
        None => Failure::timed_out(error.to_string()),
    })
}

/// A unary call that can be sent repeatedly.
#[derive(Clone, Debug)]
pub(super) struct Call {
    channel: BalancedChannel,
    path: PathAndQuery,
    method: MethodDescriptor,
    request: DynamicMessage,
}

/// The result of one call.
#[derive(Debug)]
pub(super) struct CallResult {
    pub(super) elapsed: Duration,
    pub(super) server: Option<String>,
    pub(super) outcome: Result<DynamicMessage, Status>,
}

impl Call {
    fn new(
        channel: BalancedChannel,
        method: &MethodDescriptor,
        request: &str,
    ) -> Result<Self, Failure> {
        if method.is_client_streaming() || method.is_server_streaming() {
            return Err(Failure::usage(format!(
                "{} is a streaming method; only unary methods can be called",
                method.full_name()
            )));
        }
        let invalid = |error: &dyn Error| {
            Failure::usage(format!(
                "the request is not a valid {}: {error}",
                method.input().full_name()
            ))
        };
        let mut json = serde_json::Deserializer::from_str(request);
        let request = DynamicMessage::deserialize(method.input(), &mut json)
            .map_err(|error| invalid(&error))?;
        json.end().map_err(|error| invalid(&error))?;
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        let path = path.parse().map_err(|error| invalid(&error))?;
        Ok(Self {
            channel,
            path,
            method: method.clone(),
            request,
        })
    }

    pub(super) async fn send(&self) -> CallResult {
        let mut grpc = Grpc::new(self.channel.clone());
        let codec = DynamicCodec {
            output: self.method.output(),
        };
        let start = Instant::now();
        let request = Request::new(self.request.clone());
        let outcome = grpc.unary(request, self.path.clone(), codec).await;
        let elapsed = Instant::now().saturating_duration_since(start);
        let (server, outcome) = match outcome {
            Ok(response) => {
                let served_by = response.extensions().get::<ServedBy>();
                let server = served_by.map(|served_by| served_by.address().to_string());
                (server, Ok(response.into_inner()))
            }
            Err(status) => (failed_server(&status), Err(status)),
        };
        CallResult {
            elapsed,
            server,
            outcome,
        }
    }
}

/// Returns the server that failed the call.
fn failed_server(status: &Status) -> Option<String> {
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(failed) = error.downcast_ref::<CallError>() {
            return Some(failed.address().to_string());
        }
        cause = error.source();
    }
    None
}
