//! The arguments of `register`.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::options::duration;

#[derive(Args, Debug)]
pub(crate) struct RegisterArguments {
    /// The address that clients dial, as host:port.
    pub(crate) address: String,
    /// The service, such as helloworld.Greeter.
    pub(crate) service: String,
    /// The instance id. Default: the address.
    #[arg(long)]
    pub(crate) id: Option<String>,
    /// The share of calls relative to the other servers.
    #[arg(long)]
    pub(crate) weight: Option<u32>,
    /// The zone of the server.
    #[arg(long)]
    pub(crate) zone: Option<String>,
    /// The version of the server.
    #[arg(long = "server-version", value_name = "VERSION")]
    pub(crate) version: Option<String>,
    /// A metadata entry. Can be given repeatedly.
    #[arg(long, value_name = "NAME=VALUE", value_parser = entry)]
    pub(crate) metadata: Vec<(String, String)>,
    /// The time after which the key expires if this process is killed.
    #[arg(long, default_value = "15s", value_parser = duration, value_name = "DURATION")]
    pub(crate) ttl: Duration,
    /// How to find out whether the command responds.
    #[arg(long, value_enum, default_value_t = Check::Tcp)]
    pub(crate) ready: Check,
    /// Run this shell command for the check: its success means that the server responds.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) ready_command: Option<String>,
    /// The address that the check dials. Default: the advertised address.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) check_address: Option<String>,
    /// How long the command may take until it responds for the first time.
    #[arg(long, default_value = "60s", value_parser = duration, value_name = "DURATION")]
    pub(crate) ready_timeout: Duration,
    /// The time between two checks.
    #[arg(long, default_value = "5s", value_parser = duration, value_name = "DURATION")]
    pub(crate) check_interval: Duration,
    /// The number of failed checks in a row after which the server is deregistered. One success registers it again.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) failures: u32,
    /// The time between the deregistration and the signal to the command. Clients learn of the deregistration in this time.
    #[arg(long, default_value = "1s", value_parser = duration, value_name = "DURATION")]
    pub(crate) grace_period: Duration,
    /// The time between the signal to the command and SIGKILL.
    #[arg(long, default_value = "30s", value_parser = duration, value_name = "DURATION")]
    pub(crate) stop_timeout: Duration,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

/// How to find out whether a server responds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Check {
    /// A TCP connection can be opened.
    Tcp,
    /// The server speaks gRPC, and its health service, if it has one, returns SERVING.
    Grpc,
}

fn entry(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}
