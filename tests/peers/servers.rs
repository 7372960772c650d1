//! The servers of the test service: grpc-go, grpc-java, grpcio, grpc-js, and a server on tonic.

use std::path::PathBuf;
use std::time::Duration;

use tokio::process::Command;

use crate::process::{Program, launcher};
use crate::service::{InProcess, router};
use crate::support::tls::Localhost;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tonic,
    Go,
    Java,
    Grpcio,
    Js,
}

impl Kind {
    /// Returns the name of the part that `scripts/setup-interop` installs for the server, or `None` for tonic, which needs no installation.
    fn part(self) -> Option<&'static str> {
        match self {
            Self::Tonic => None,
            Self::Go => Some("grpc-go"),
            Self::Java => Some("grpc-java"),
            Self::Grpcio => Some("grpcio"),
            Self::Js => Some("grpc-js"),
        }
    }

    /// Returns the program of a server that runs as a process of its own. Returns `None` if it is not installed, or for tonic.
    pub fn server_command(self) -> Option<PathBuf> {
        Self::launcher(self.part()?)
    }

    fn launcher(part: &str) -> Option<PathBuf> {
        launcher(part, &format!("{part}-server"))
    }

    /// Returns the interop cases that the server lists as unsupported.
    pub async fn unsupported(self) -> Vec<String> {
        let Some(launcher) = self.part().and_then(Self::launcher) else {
            return Vec::new();
        };
        let mut command = Command::new(launcher);
        command.arg("--list-unsupported").kill_on_drop(true);
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{self:?}: {output:?}");
        let names = String::from_utf8(output.stdout).unwrap();
        names.lines().map(str::to_owned).collect()
    }
}

/// Differences from the defaults of the implementation.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    pub tls: Option<&'a Localhost>,
    pub max_age: Option<Duration>,
    pub max_metadata: Option<u32>,
}

/// A server that runs until it is dropped.
pub struct Server {
    pub address: String,
    running: Running,
}

enum Running {
    InProcess { _server: InProcess },
    Program(Program),
}

impl Server {
    /// Starts a server. Returns `None` if the server is not installed.
    pub async fn start(kind: Kind, options: Options<'_>) -> Option<Self> {
        let Some(name) = kind.part() else {
            let server = InProcess::start(router(options)).await;
            return Some(Self {
                address: server.address.to_string(),
                running: Running::InProcess { _server: server },
            });
        };
        let mut command = Command::new(Kind::launcher(name)?);
        command.arg("--port=0");
        if let Some(localhost) = options.tls {
            let [certificate, key, _] = localhost.files();
            command.arg(format!("--tls-cert={}", certificate.display()));
            command.arg(format!("--tls-key={}", key.display()));
        }
        if let Some(age) = options.max_age {
            command.arg(format!("--max-age-ms={}", age.as_millis()));
        }
        if let Some(bytes) = options.max_metadata {
            command.arg(format!("--max-metadata={bytes}"));
        }
        let mut program = Program::start(command);
        let port = program.port().await;
        Some(Self {
            address: format!("127.0.0.1:{port}"),
            running: Running::Program(program),
        })
    }

    /// Returns the server's output to stderr so far.
    pub fn logged(&self) -> String {
        match &self.running {
            Running::InProcess { .. } => String::new(),
            Running::Program(program) => program.logged(),
        }
    }
}
