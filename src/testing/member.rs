//! One member of the cluster: its ports, its files, and its process while it runs.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::task::spawn_blocking;

use super::{binary, error::ProcessError, port::Port, process::Process};

/// Timeout for a graceful exit. A leader that transfers its leadership to a member that is also
/// exiting needs 7 s.
const STOP_BOUND: Duration = Duration::from_secs(10);

/// Time within which SIGKILL, SIGSTOP or SIGCONT must take effect. A process cannot ignore these
/// signals.
const SIGNAL_BOUND: Duration = Duration::from_secs(5);

/// Number of log lines that an error contains.
const TAIL_LINES: usize = 20;

/// The ports that a member listens on.
#[derive(Debug)]
pub(super) struct Ports {
    /// The port for clients.
    pub(super) client: Port,
    /// The port for the other members.
    pub(super) peer: Port,
    /// The port for TLS clients.
    pub(super) tls: Port,
}

impl Ports {
    /// Draws three free ports.
    pub(super) fn draw() -> io::Result<Self> {
        Ok(Self {
            client: Port::draw()?,
            peer: Port::draw()?,
            tls: Port::draw()?,
        })
    }
}

/// One member, running or stopped.
#[derive(Debug)]
pub(super) struct Member {
    /// Its index among the members.
    pub(super) index: usize,
    /// The path of the etcd binary.
    pub(super) binary: PathBuf,
    /// The temporary directory of the whole cluster.
    pub(super) directory: PathBuf,
    /// The ports that it listens on.
    pub(super) ports: Ports,
    /// The flags that every start passes to etcd, except for `--data-dir`.
    pub(super) flags: Vec<OsString>,
    /// The process of the member. `None` if the member is stopped, or once the exit of the process
    /// was detected.
    pub(super) process: Option<Process>,
}

impl Member {
    /// Returns the name of the member with this index, which is also the name of its data
    /// directory.
    pub(super) fn name(index: usize) -> String {
        format!("m{index}")
    }

    /// Returns the client address.
    pub(super) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client_port())
    }

    /// Returns the address for TLS clients.
    pub(super) fn tls_endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.ports.tls.number())
    }

    /// Returns the port for clients.
    pub(super) fn client_port(&self) -> u16 {
        self.ports.client.number()
    }

    /// Returns the complete log of the member.
    pub(super) fn log(&self) -> String {
        let bytes = fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Returns the last lines of the log.
    pub(super) fn log_tail(&self) -> String {
        tail(&self.log(), TAIL_LINES).to_owned()
    }

    /// Starts the process. Does not wait until the member is healthy.
    pub(super) fn start(&mut self) -> Result<(), ProcessError> {
        let path = self.log_path();
        let log = OpenOptions::new().create(true).append(true).open(path);
        let log = log.map_err(ProcessError::Prepare)?;
        let mut command = binary::command(&self.binary);
        command
            .arg("--data-dir")
            .arg(self.data_directory())
            .args(&self.flags)
            .stdout(log.try_clone().map_err(ProcessError::Prepare)?)
            .stderr(log);
        self.process = Some(Process::start(&mut command, &self.directory)?);
        Ok(())
    }

    /// Fails if the process has exited since it was started. Succeeds if there is no process,
    /// because the member was stopped or its exit was already detected.
    pub(super) fn check_running(&mut self) -> Result<(), ProcessError> {
        let Some(exited) = self.process.take_if(Process::has_exited) else {
            return Ok(());
        };
        let status = exited.reap().map_err(signal_error(self.index))?;
        Err(ProcessError::ExitedEarly {
            member: self.index,
            status,
            log: self.log_tail(),
        })
    }

    /// Sends SIGTERM to the process, and kills it if it does not exit in time. Has no effect if the
    /// member is stopped.
    pub(super) async fn stop(&mut self) -> Result<(), ProcessError> {
        let failed = signal_error(self.index);
        let Some(process) = self.running() else {
            return Ok(());
        };
        process.signal(Signal::SIGTERM).map_err(&failed)?;
        // A frozen process handles SIGTERM only after SIGCONT has resumed it.
        process.signal(Signal::SIGCONT).map_err(&failed)?;
        if process.exits_within(STOP_BOUND).await {
            self.process = None;
            return Ok(());
        }
        tracing::warn!(
            member = self.index,
            "etcd did not exit in time after SIGTERM; killing it"
        );
        self.kill().await
    }

    /// Kills the process and waits until it has exited. Has no effect if the member is stopped.
    pub(super) async fn kill(&mut self) -> Result<(), ProcessError> {
        let failed = signal_error(self.index);
        let Some(process) = self.running() else {
            return Ok(());
        };
        process.signal(Signal::SIGKILL).map_err(failed)?;
        if !process.exits_within(SIGNAL_BOUND).await {
            return Err(ProcessError::StillRunning { member: self.index });
        }
        self.process = None;
        Ok(())
    }

    /// Freezes the process if `frozen` is true, else resumes it. Waits until the signal has taken
    /// effect.
    pub(super) async fn set_frozen(&mut self, frozen: bool) -> Result<(), ProcessError> {
        let member = self.index;
        let process = self.running().ok_or(ProcessError::NotRunning { member })?;
        let signal = if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        process.signal(signal).map_err(signal_error(member))?;
        if process.is_frozen_within(frozen, SIGNAL_BOUND).await {
            return Ok(());
        }
        Err(signal_error(member)(io::ErrorKind::TimedOut.into()))
    }

    /// Deletes the data directory.
    pub(super) async fn wipe(&mut self) -> Result<(), ProcessError> {
        self.check_stopped()?;
        let data = self.data_directory();
        let removal = spawn_blocking(move || fs::remove_dir_all(data)).await;
        match removal.unwrap_or_else(|error| Err(error.into())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(ProcessError::Prepare(error))
            }
            _ => Ok(()),
        }
    }

    /// Copies the data directory to the backup directory.
    pub(super) async fn back_up(&mut self) -> Result<(), ProcessError> {
        self.check_stopped()?;
        let (data, backup) = (self.data_directory(), self.backup_directory());
        replace(data, backup).await
    }

    /// Replaces the data directory by its backup.
    pub(super) async fn restore(&mut self) -> Result<(), ProcessError> {
        self.check_stopped()?;
        let (data, backup) = (self.data_directory(), self.backup_directory());
        replace(backup, data).await
    }

    /// Fails if the process is running.
    pub(super) fn check_stopped(&mut self) -> Result<(), ProcessError> {
        let member = self.index;
        match self.running() {
            Some(_) => Err(ProcessError::StillRunning { member }),
            None => Ok(()),
        }
    }

    /// Returns the process; `None` if it was stopped or has exited by itself.
    fn running(&mut self) -> Option<&mut Process> {
        // Dropping an exited process reaps it.
        drop(self.process.take_if(Process::has_exited));
        self.process.as_mut()
    }

    /// Returns the path of the data directory.
    fn data_directory(&self) -> PathBuf {
        self.directory.join(Self::name(self.index))
    }

    /// Returns the path of the backup directory.
    fn backup_directory(&self) -> PathBuf {
        self.data_directory().with_extension("backup")
    }

    /// Returns the path of the log file.
    fn log_path(&self) -> PathBuf {
        self.data_directory().with_extension("log")
    }
}

/// Returns the etcd flags of the member with this index, except for `--data-dir`. `peers` contains,
/// for each member, the port at which the other members reach it.
pub(super) fn flags(
    index: usize,
    ports: &[Ports],
    peers: &[u16],
    tls: bool,
    token: &str,
) -> Vec<OsString> {
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    let cluster: Vec<_> = peers
        .iter()
        .enumerate()
        .map(|(index, peer)| format!("{}={}", Member::name(index), url(*peer)))
        .collect();
    let mut flags = vec![
        format!("--name={}", Member::name(index)),
        format!("--initial-cluster={}", cluster.join(",")),
        format!("--initial-cluster-token={token}"),
        "--initial-cluster-state=new".to_owned(),
    ];
    if let (Some(ports), Some(peer)) = (ports.get(index), peers.get(index)) {
        let client = url(ports.client.number());
        let secure = format!(",https://127.0.0.1:{}", ports.tls.number());
        let secure = if tls { secure.as_str() } else { "" };
        flags.extend([
            format!("--listen-client-urls={client}{secure}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={}", url(ports.peer.number())),
            format!("--initial-advertise-peer-urls={}", url(*peer)),
        ]);
    }
    flags.into_iter().map(OsString::from).collect()
}

/// Returns a function that converts the I/O error of an operation on the process of this member.
fn signal_error(member: usize) -> impl Fn(io::Error) -> ProcessError {
    move |cause| ProcessError::Signal { member, cause }
}

/// Returns the last `lines` lines of a text.
fn tail(text: &str, lines: usize) -> &str {
    let text = text.trim_end();
    let mut breaks = text.rmatch_indices('\n');
    match breaks.nth(lines.saturating_sub(1)) {
        Some((at, _)) => &text[at + 1..],
        None => text,
    }
}

/// Replaces a directory by a copy of another directory.
async fn replace(from: PathBuf, to: PathBuf) -> Result<(), ProcessError> {
    let copied = spawn_blocking(move || {
        // Checks that `from` exists before `to` is removed. Without this check, a missing backup
        // would delete the data.
        fs::read_dir(&from)?;
        if to.exists() {
            fs::remove_dir_all(&to)?;
        }
        copy(&from, &to)
    });
    let copied = copied.await.unwrap_or_else(|error| Err(error.into()));
    copied.map_err(ProcessError::Prepare)
}

/// Copies a directory with all of its content.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_has_at_most_the_requested_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a\nb\nc", 3), "a\nb\nc");
        assert_eq!(tail("a\nb", 9), "a\nb");
        assert_eq!(tail("\n", 2), "");
    }

    #[test]
    fn a_member_is_configured_with_all_peers_and_its_own_ports() {
        let ports = [Ports::draw(), Ports::draw()].map(|ports| ports.expect("free ports"));
        let peers = [1, 2];
        let flags = flags(1, &ports, &peers, true, "a-token");
        let [_, own] = ports;
        let (client, tls) = (own.client.number(), own.tls.number());
        let expected = [
            "--name=m1".to_owned(),
            "--initial-cluster=m0=http://127.0.0.1:1,m1=http://127.0.0.1:2".to_owned(),
            "--initial-cluster-token=a-token".to_owned(),
            "--initial-cluster-state=new".to_owned(),
            format!("--listen-client-urls=http://127.0.0.1:{client},https://127.0.0.1:{tls}"),
            format!("--advertise-client-urls=http://127.0.0.1:{client}"),
            format!("--listen-peer-urls=http://127.0.0.1:{}", own.peer.number()),
            "--initial-advertise-peer-urls=http://127.0.0.1:2".to_owned(),
        ];
        assert_eq!(flags, expected.map(OsString::from));
    }
}
