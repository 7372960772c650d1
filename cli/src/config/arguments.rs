//! The arguments of `config`.

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the service config of a service.
    Get(ServiceArguments),
    /// Check a service config, and write it. Prints the changes. Fails if the key is changed meanwhile.
    Set(SetArguments),
    /// Check the service config of a service, or of a file, as clients do.
    Check(CheckArguments),
    /// Delete the service config of a service. Its clients then use their own options again.
    Rm(RmArguments),
}

#[derive(Args, Debug)]
pub(crate) struct ServiceArguments {
    /// The service, such as helloworld.Greeter.
    pub(crate) service: String,
}

#[derive(Args, Debug)]
pub(crate) struct SetArguments {
    #[command(flatten)]
    pub(crate) of: ServiceArguments,
    /// The file with the service config in gRPC's JSON format; - for the standard input.
    pub(crate) file: String,
    #[command(flatten)]
    pub(crate) guard: Guard,
}

#[derive(Args, Debug)]
pub(crate) struct CheckArguments {
    #[command(flatten)]
    pub(crate) of: ServiceArguments,
    /// A file with a service config; - for the standard input. Default: the service config in etcd.
    pub(crate) file: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct RmArguments {
    #[command(flatten)]
    pub(crate) of: ServiceArguments,
    #[command(flatten)]
    pub(crate) guard: Guard,
}

#[derive(Args, Debug)]
pub(crate) struct Guard {
    /// Print the changes, and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Fail unless the key has this revision, as `config get` prints it; 0 if the key must not exist.
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<i64>,
}
