//! The command that `register` runs.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::time::timeout;

use super::signals::{Received, Signals};
use crate::error::{Failure, code};
use crate::escape::escaped;

/// The running command. It is killed when this value is dropped.
#[derive(Debug)]
pub(super) struct Child(tokio::process::Child);

/// The end of a phase of `register`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Interrupt {
    /// The command has exited.
    Exited(ExitStatus),
    /// A signal requests the stop.
    Stop(Signal),
}

impl Child {
    pub(super) fn spawn(command: &[OsString]) -> Result<Self, Failure> {
        let (program, arguments) = command
            .split_first()
            .ok_or_else(|| Failure::usage("there is no command; write it after --"))?;
        // In a process group of its own, the command does not receive the SIGINT that a terminal sends to the group of this process. The
        // deregistration must precede the signal to the command.
        let spawned = Command::new(program)
            .args(arguments)
            .process_group(0)
            .kill_on_drop(true)
            .spawn();
        spawned.map(Self).map_err(|error| {
            let code = match error.kind() {
                io::ErrorKind::NotFound => code::NOT_FOUND,
                _ => code::CANNOT_EXECUTE,
            };
            let program = escaped(&program.to_string_lossy());
            Failure::new(code, format!("cannot start {program:?}: {error}"))
        })
    }

    /// Waits until the command exits, or until a signal requests the stop. Other signals are forwarded.
    pub(super) async fn interrupted(
        &mut self,
        signals: &mut Signals,
    ) -> Result<Interrupt, Failure> {
        loop {
            tokio::select! {
                // If the command exits because of a signal that both processes got, the exit is what counts.
                biased;
                status = self.0.wait() => return status.map(Interrupt::Exited).map_err(|error| cannot_wait(&error)),
                received = signals.next() => match received {
                    Received::Stop(signal) => return Ok(Interrupt::Stop(signal)),
                    Received::Forward(signal) => self.signal(signal),
                },
            }
        }
    }

    /// Sends a signal to the command. A failure means that it has exited already.
    fn signal(&self, signal: Signal) {
        let id = self.0.id().and_then(|id| i32::try_from(id).ok());
        if let Some(id) = id {
            kill(Pid::from_raw(id), signal).ok();
        }
    }

    /// Sends a signal, and waits until the command exits. Sends SIGKILL after the timeout. Further signals are forwarded meanwhile.
    pub(super) async fn stop(
        &mut self,
        signal: Signal,
        limit: Duration,
        signals: &mut Signals,
    ) -> Result<ExitStatus, Failure> {
        self.signal(signal);
        let exited = async {
            loop {
                match self.interrupted(signals).await? {
                    Interrupt::Exited(status) => return Ok(status),
                    Interrupt::Stop(signal) => self.signal(signal),
                }
            }
        };
        if let Ok(status) = timeout(limit, exited).await {
            return status;
        }
        self.signal(Signal::SIGKILL);
        self.0.wait().await.map_err(|error| cannot_wait(&error))
    }
}

fn cannot_wait(error: &io::Error) -> Failure {
    Failure::local(format!("cannot wait for the command: {error}"))
}

/// Returns the exit code that a shell would return.
pub(super) fn exit_code(status: ExitStatus) -> ExitCode {
    let ended_by = status.signal().and_then(|signal| u8::try_from(signal).ok());
    let returned = status.code().and_then(|code| u8::try_from(code).ok());
    ExitCode::from(match (returned, ended_by) {
        (Some(code), _) => code,
        (None, Some(signal)) => code::SIGNAL.saturating_add(signal),
        (None, None) => code::LOCAL,
    })
}
