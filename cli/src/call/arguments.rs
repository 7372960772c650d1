//! The arguments of `call`.

use std::time::Duration;

use clap::Args;

use crate::cli::ServerTls;
use crate::options::duration;

#[derive(Args, Debug)]
pub(crate) struct CallArguments {
    /// The service in the registry, such as helloworld.Greeter.
    pub(crate) service: String,
    /// The method, such as `SayHello`. If the gRPC service has another name than the service in the registry: `package.Service/Method`.
    pub(crate) method: String,
    /// The request as JSON.
    #[arg(default_value = "{}")]
    pub(crate) request: String,
    /// Send the call this many times, and print a summary instead of the responses.
    #[arg(long, value_name = "CALLS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) load: Option<u64>,
    /// The number of calls at once.
    #[arg(long, default_value_t = 1, requires = "load", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) concurrency: u32,
    /// The limit on the number of calls per second.
    #[arg(long, default_value_t = 100, requires = "load", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) rate: u32,
    /// The limit on the duration of the load.
    #[arg(long, default_value = "60s", requires = "load", value_parser = duration, value_name = "DURATION")]
    pub(crate) duration: Duration,
    #[command(flatten)]
    pub(crate) tls: ServerTls,
}
