//! Checks whether the server of the command responds.

use std::process::Stdio;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::timeout;
use tonic_etcd::Address;

use super::arguments::{Check, RegisterArguments};
use crate::error::Failure;
use crate::probe::Dial;

/// A check with its target.
#[derive(Debug)]
pub(super) struct Readiness {
    kind: Kind,
    timeout: Duration,
}

#[derive(Debug)]
enum Kind {
    Tcp(Address),
    Grpc(Address),
    Command(String),
}

impl Readiness {
    /// # Errors
    ///
    /// Fails if the address of the check is not valid.
    pub(super) fn new(arguments: &RegisterArguments, timeout: Duration) -> Result<Self, Failure> {
        let text = arguments.check_address.as_ref();
        let text = text.unwrap_or(&arguments.address);
        let address: Address = text.parse().map_err(|error| {
            Failure::usage(format!("the address {text:?} is not valid: {error}"))
        })?;
        let kind = match (&arguments.ready_command, arguments.ready) {
            (Some(command), _) => Kind::Command(command.clone()),
            (None, Check::Tcp) => Kind::Tcp(address),
            (None, Check::Grpc) => Kind::Grpc(address),
        };
        Ok(Self { kind, timeout })
    }

    /// Returns `None` if the server responds, and the reason otherwise.
    pub(super) async fn check(&self) -> Option<String> {
        match timeout(self.timeout, self.check_once()).await {
            Ok(reason) => reason,
            Err(_) => Some(format!("no response within {:?}", self.timeout)),
        }
    }

    async fn check_once(&self) -> Option<String> {
        match &self.kind {
            Kind::Tcp(address) => {
                let connected = TcpStream::connect(address.as_str()).await;
                connected.err().map(|error| format!("{address}: {error}"))
            }
            Kind::Grpc(address) => {
                let probe = Dial::plaintext(self.timeout).probe(address).await;
                let ready = probe.answer.is_ready();
                (!ready).then(|| format!("{address}: {}", probe.answer.text()))
            }
            Kind::Command(command) => {
                let status = Command::new("sh")
                    .args(["-c", command])
                    .stdin(Stdio::null())
                    .kill_on_drop(true)
                    .status()
                    .await;
                match status {
                    Ok(status) if status.success() => None,
                    Ok(status) => Some(format!("the check command has failed: {status}")),
                    Err(error) => Some(format!("the check command cannot be run: {error}")),
                }
            }
        }
    }
}
