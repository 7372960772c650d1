//! The options on the command line.

use std::str::FromStr;
use std::time::Duration;

use super::Result;

#[derive(Clone, Debug)]
pub struct Options {
    /// Number of clients, and also of servers.
    pub number: usize,
    /// Duration of the measurement at rest.
    pub rest: Duration,
    /// Duration of the scenario `outage`.
    pub outage: Duration,
    /// Time to live of the leases. `None` leaves it to the library, which selects it by the number of servers.
    pub ttl: Option<Duration>,
    /// Number of services that one process watches, in the scenario `services`.
    pub services: usize,
    /// Number of instances of the service in the scenario `instances`.
    pub instances: usize,
    pub seed: u64,
    /// The selected scenarios. If there are none, all scenarios run.
    wanted: Vec<String>,
}

impl Options {
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            number: 100,
            rest: Duration::from_secs(30),
            outage: Duration::from_secs(60),
            ttl: None,
            services: 1_000,
            instances: 10_000,
            seed: fastrand::u64(..),
            wanted: Vec::new(),
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().unwrap_or_default();
            match argument.as_str() {
                // cargo adds this argument.
                "--bench" => {}
                "--number" => options.number = number(&argument, &value())?,
                "--rest" => options.rest = seconds(&argument, &value())?,
                "--outage" => options.outage = seconds(&argument, &value())?,
                "--ttl" => options.ttl = Some(seconds(&argument, &value())?),
                "--services" => options.services = number(&argument, &value())?,
                "--instances" => options.instances = number(&argument, &value())?,
                "--seed" => options.seed = number(&argument, &value())?,
                name if SCENARIOS.contains(&name) => options.wanted.push(argument),
                _ => {
                    return Err(format!(
                        "unknown argument {argument:?}; the scenarios are {}",
                        SCENARIOS.join(", ")
                    ));
                }
            }
        }
        Ok(options)
    }

    /// Returns the TTL of the leases.
    pub fn lease_ttl(&self) -> Duration {
        self.ttl.unwrap_or_else(|| default_ttl(self.number))
    }

    /// Returns whether the scenario was selected.
    pub fn wants(&self, scenario: &str) -> bool {
        debug_assert!(
            SCENARIOS.contains(&scenario),
            "{scenario} cannot be selected"
        );
        self.wanted.is_empty() || self.wanted.iter().any(|wanted| wanted == scenario)
    }
}

/// Returns the TTL that `RegistrationBuilder::ttl` documents for a service with this number of servers.
pub fn default_ttl(servers: usize) -> Duration {
    Duration::from_secs((servers as u64 * 60 / 1_000).clamp(15, 120))
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T> {
    value
        .parse()
        .map_err(|_| format!("{name} needs a number, not {value:?}"))
}

fn seconds(name: &str, value: &str) -> Result<Duration> {
    number(name, value).map(Duration::from_secs)
}

const SCENARIOS: [&str; 14] = [
    "start",
    "rest",
    "servers",
    "clients",
    "storm",
    "restart",
    "pause",
    "outage",
    "wipe",
    "three",
    "slow",
    "password",
    "services",
    "instances",
];
