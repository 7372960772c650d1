//! The compared clients, and their processes.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::cases::{Callers, Case};
use super::clock::Epoch;
use super::server::Servers;

/// The time in which a process must end, besides the time of its calls.
const PATIENCE: Duration = Duration::from_secs(20);

/// The clients of this program: the name in the output, and that of the policy.
const OWN: [(&str, &str); 6] = [
    ("latency", "latency"),
    ("latency with reports", "latency_reports"),
    ("least request", "least_request"),
    ("round robin", "round_robin"),
    ("round robin with reports", "round_robin_reports"),
    ("stock tonic", "stock"),
];

/// Those of grpc-go. Its weighted round robin uses the reports of the servers.
const GRPC_GO: [(&str, &str); 3] = [
    ("grpc-go round_robin", "round_robin"),
    ("grpc-go weighted_round_robin", "weighted_round_robin"),
    ("grpc-go least_request", "least_request_experimental"),
];

pub struct Peer {
    pub name: &'static str,
    policy: &'static str,
    program: PathBuf,
    mode: &'static str,
}

impl Peer {
    /// Returns all clients. Those of grpc-go are left out if the directory in the variable `BENCH_PEERS` does not contain the program.
    pub fn all() -> Vec<Self> {
        let peers = |program: &Path, mode: &'static str, policies: &[(&'static str, _)]| {
            let peer = |&(name, policy): &_| Self {
                name,
                policy,
                program: program.to_owned(),
                mode,
            };
            policies.iter().map(peer).collect::<Vec<_>>()
        };
        let mut all = peers(&std::env::current_exe().unwrap(), "client", &OWN);
        let folder = std::env::var_os("BENCH_PEERS").map(PathBuf::from);
        match folder.map(|folder| folder.join("go-peers")) {
            Some(program) if program.exists() => {
                all.extend(peers(&program, "policies", &GRPC_GO));
            }
            _ => println!(
                "LEFT OUT: the policies of grpc-go, whose client `make bench-policies` builds if Go is installed"
            ),
        }
        all
    }

    /// Starts the servers and the client of one case. The client makes its first call at the epoch.
    pub fn start(&self, case: &Case, epoch: Epoch, time: Duration) -> Running {
        let servers = Servers::start(case.fault, case.servers, epoch);
        let period = match case.callers {
            Callers::EachAfter(period) => period,
            Callers::Closed => Duration::ZERO,
        };
        let mut command = Command::new(&self.program);
        command
            .args([self.mode, self.policy, &servers.addresses.join(",")])
            .args([case.clients.to_string(), epoch.to_string()])
            .arg(period.as_micros().to_string())
            .args([time * 2 / 3, time].map(|time| time.as_millis().to_string()))
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        Running {
            client: command.spawn().unwrap(),
            _servers: servers,
        }
    }
}

/// The processes of one client in one case. Dropping them kills the processes.
pub struct Running {
    client: Child,
    _servers: Servers,
}

impl Running {
    /// Waits for the result, which the client prints in about `after`. Returns the columns of its line.
    pub async fn outcome(mut self, after: Duration) -> String {
        let mut stdout = self.client.stdout.take().unwrap();
        let mut line = String::new();
        let read = timeout(after + PATIENCE, stdout.read_to_string(&mut line)).await;
        read.expect("a client printed nothing").unwrap();
        let numbers: Vec<f64> = line
            .split_whitespace()
            .map(|number| number.parse().unwrap())
            .collect();
        let [calls, bad, failed, p50, p99, p999] = numbers[..] else {
            panic!("a client has failed: {line}");
        };
        format!(
            "{calls},{:.2},{:.1},{:.1},{:.1},{failed}",
            bad * 100.0 / calls.max(1.0),
            p50 / 1e3,
            p99 / 1e3,
            p999 / 1e3
        )
    }
}
