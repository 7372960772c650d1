//! The programs of the clients, and their processes.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use super::callers::Load;
use super::table::Sample;
use super::world::{SERVICE, World};

/// The time in which a process must print its next line, besides the time that the process itself needs.
const PATIENCE: Duration = Duration::from_secs(20);

/// The programs that `scripts/setup-bench-peers` builds.
pub struct Programs {
    pub go: PathBuf,
    pub tonic_xds: Option<PathBuf>,
}

impl Programs {
    /// Finds the programs in the directory in the variable `BENCH_PEERS`. Returns `None` without the program in Go.
    pub fn find() -> Option<Self> {
        let folder = PathBuf::from(std::env::var_os("BENCH_PEERS")?);
        let program = |name: &str| Some(folder.join(name)).filter(|path| path.exists());
        let programs = Self {
            go: program("go-peers")?,
            tonic_xds: program("tonic-xds"),
        };
        if programs.tonic_xds.is_none() {
            println!("LEFT OUT: tonic-xds, which could not be built");
        }
        Some(programs)
    }
}

/// One of the compared clients.
#[derive(Clone, Copy)]
pub enum Peer {
    Channel(&'static str),
    GrpcGo(&'static str),
    TonicXds,
    /// tonic's own balanced channel, which gets the addresses at its start.
    StockTonic,
    /// Two random choices over bare `h2` connections, which get the addresses at their start: the lower bound of the CPU per call.
    BareH2,
}

impl Peer {
    /// Returns all clients. The first one is the channel with its default policy.
    pub fn all(world: &World<'_>) -> Vec<Self> {
        let mut peers = vec![
            Self::Channel("latency"),
            Self::GrpcGo("round_robin"),
            Self::GrpcGo("weighted_round_robin"),
            Self::GrpcGo("least_request_experimental"),
        ];
        if world.plane().is_some() {
            peers.push(Self::TonicXds);
        }
        peers.extend([Self::StockTonic, Self::BareH2]);
        peers
    }

    /// Returns whether the client finds new servers, and connects again to servers that were restarted.
    pub fn resolves(self) -> bool {
        !matches!(self, Self::StockTonic | Self::BareH2)
    }

    pub fn name(self) -> String {
        match self {
            Self::Channel("latency") => "`BalancedChannel`".to_owned(),
            Self::Channel(policy) => format!("`BalancedChannel`, `{policy}`"),
            Self::GrpcGo(policy) => format!("grpc-go, `{policy}`"),
            Self::TonicXds => "tonic-xds".to_owned(),
            Self::StockTonic => "stock tonic".to_owned(),
            Self::BareH2 => "P2C over bare h2".to_owned(),
        }
    }

    /// Starts a client, and waits until its measurement begins.
    pub async fn start(self, world: &World<'_>, load: Load) -> Client {
        let this = std::env::current_exe().unwrap();
        let (program, mode, target, policy): (&Path, &[&str], _, _) = match self {
            Self::Channel(policy) => (&this, &["client"], world.etcd(), policy),
            Self::StockTonic => (&this, &["client"], world.etcd(), "stock"),
            Self::BareH2 => (&this, &["client"], world.etcd(), "bare_h2"),
            Self::GrpcGo(policy) => (&world.programs.go, &["client"], world.etcd(), policy),
            Self::TonicXds => {
                let program = world.programs.tonic_xds.as_ref().unwrap();
                (program, &[], world.plane().unwrap(), "p2c")
            }
        };
        let mut command = Command::new(program);
        command
            .args(mode)
            .args([target, SERVICE, policy])
            .args(load.args());
        let mut output = Output::start(command);
        let line = output.line(load.warm_up).await;
        assert_eq!(line, "measuring", "{}", self.name());
        Client(output)
    }
}

/// A client that is measuring. Dropping it kills the process.
pub struct Client(Output);

impl Client {
    /// Waits for the result. `duration` is the time of the measurement.
    pub async fn end(mut self, duration: Duration) -> Sample {
        let line = self.0.line(duration).await;
        Sample::parse(&line, duration)
    }
}

/// A process and its standard output. Dropping it kills the process.
pub struct Output {
    lines: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Output {
    pub fn start(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self {
            lines: stdout.lines(),
            _child: child,
        }
    }

    /// Reads a line, which the process prints in about `after`.
    pub async fn line(&mut self, after: Duration) -> String {
        let line = timeout(after + PATIENCE, self.lines.next_line()).await;
        line.expect("the process printed nothing")
            .unwrap()
            .expect("the process has failed")
    }
}
