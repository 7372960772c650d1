//! The commands and their arguments.

use clap::{Args, Parser, Subcommand};

use crate::call::CallArguments;
use crate::config::ConfigCommand;
use crate::control::{DrainArguments, ResumeArguments, WeightArguments};
use crate::options::Options;
use crate::register::RegisterArguments;

/// Lists, checks, registers, watches, drains and calls gRPC servers that are registered in etcd.
#[derive(Debug, Parser)]
#[command(name = "tonic-etcd", version, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) options: Options,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER_HELP: &str = "\
Exit codes:
  0  success
  1  a negative result: a finding, a failed check, an unknown service or instance
  2  an option or an argument is not valid
  3  etcd is unreachable, or has rejected a request
  4  a server did not respond or did not confirm in time
  5  the operating system rejected an operation
  6  another writer has changed the key; nothing was written
`register` exits with the code of its child: 128 + n after signal n, 126 or 127 if the child cannot be started.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the services below the prefix, with their numbers of instances.
    Services,
    /// List what is registered for a service: addresses, attributes, leases, and the keys that cannot be read.
    Ls(LsArguments),
    /// Diagnose etcd, the keys of a service (default: all services) and its servers, and print what to do about each finding.
    Doctor(DoctorArguments),
    /// Run a command, and register its address while it responds. On SIGTERM or SIGINT, deregister first, then stop the command.
    Register(RegisterArguments),
    /// Show the instances of a service, and each join (+), leave (-) and change (~), until SIGINT. A live view on a terminal, otherwise lines.
    Watch(WatchArguments),
    /// Take a server out of service: its calls in flight complete, and it gets no new ones.
    Drain(DrainArguments),
    /// Put a drained or paused server into service again.
    Resume(ResumeArguments),
    /// Change the weight of a server: its share of calls relative to the other servers.
    Weight(WeightArguments),
    /// Read, check, write or delete the service config of a service, which its clients apply.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Send a unary call with a JSON message to a service, and print the response and the server that sent it. The server must support
    /// reflection.
    Call(CallArguments),
    /// Print the completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page of the command in roff.
    Man,
}

/// How servers are dialled.
#[derive(Args, Clone, Debug)]
#[allow(
    clippy::struct_field_names,
    reason = "the names are those of the options"
)]
pub(crate) struct ServerTls {
    /// Use TLS to the servers, and verify them against this CA certificate (PEM file).
    #[arg(long, value_name = "FILE", group = "server_roots")]
    pub(crate) server_cacert: Option<std::path::PathBuf>,
    /// Use TLS to the servers, and verify them against the root certificates of the system.
    #[arg(long, group = "server_roots")]
    pub(crate) server_tls: bool,
    /// The name in the certificates of the servers. `call` needs it: the addresses come from etcd, so their hosts prove nothing.
    #[arg(long, value_name = "NAME", requires = "server_roots")]
    pub(crate) server_name: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct LsArguments {
    /// The service, such as helloworld.Greeter.
    pub(crate) service: String,
    /// Dial each address, and show the result: TCP, HTTP/2, gRPC health.
    #[arg(long)]
    pub(crate) check: bool,
    #[command(flatten)]
    pub(crate) tls: ServerTls,
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArguments {
    /// The service. Default: all services below the prefix.
    pub(crate) service: Option<String>,
    /// Clients run on other hosts than the servers: report every loopback address, even if all addresses are loopback addresses.
    #[arg(long)]
    pub(crate) remote_clients: bool,
    /// Do not dial the servers.
    #[arg(long)]
    pub(crate) no_dial: bool,
    #[command(flatten)]
    pub(crate) tls: ServerTls,
}

#[derive(Args, Debug)]
pub(crate) struct WatchArguments {
    /// The service, such as helloworld.Greeter.
    pub(crate) service: String,
    /// Dial each new address once, and show how long it took to respond.
    #[arg(long)]
    pub(crate) check: bool,
    #[command(flatten)]
    pub(crate) tls: ServerTls,
}
