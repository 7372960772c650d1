//! One running etcd, and the watchdog that ends it when its owner dies without a word.

use std::{
    io,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use tokio::time::{sleep, timeout};

use super::error::ProcessError;

/// What the watchdog runs, with the pid of etcd and the temporary directory as arguments.
///
/// Its standard input is a pipe that only the owner holds, so end of file means that the owner is
/// gone. `read` is built into every shell: unlike with `cat`, there is no second process to end.
/// The second removal is for what an etcd that was just dying still wrote.
const WATCHDOG: &str = r#"while read -r _; do :; done
kill -9 "$1" 2>/dev/null
rm -rf "$2" || { sleep 1; rm -rf "$2"; }"#;

/// How often a process is looked at while its exit or its stop is awaited.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// How often a dropped process is looked at, a millisecond apart, before it is given up.
const REAP_ATTEMPTS: usize = 2_000;

/// A running etcd with its watchdog. Dropped, it is killed and reaped.
///
/// These are children of [`std::process`], which belong to no runtime: an etcd started by one test
/// can be operated by another, on a runtime of its own.
#[derive(Debug)]
pub(super) struct Process {
    /// The server.
    etcd: Child,
    /// Absent only while the process is put together or taken apart.
    watchdog: Option<Child>,
}

impl Process {
    /// Starts `etcd` and the watchdog that removes `directory` if we die.
    pub(super) fn start(etcd: &mut Command, directory: &Path) -> Result<Self, ProcessError> {
        let mut process = Self {
            etcd: spawn(etcd)?,
            watchdog: None,
        };
        let mut watchdog = Command::new("sh");
        watchdog
            .args(["-c", WATCHDOG, "sh", &process.id().to_string()])
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        process.watchdog = Some(spawn(&mut watchdog)?);
        Ok(process)
    }

    /// The pid of etcd.
    pub(super) fn id(&self) -> u32 {
        self.etcd.id()
    }

    /// Sends a signal to etcd. Its pid is ours until it is reaped, so no stranger can get it.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        signal::kill(self.pid(), signal)?;
        Ok(())
    }

    /// Waits until etcd has exited, or until the bound has passed, which gives false.
    pub(super) async fn exits_within(&mut self, bound: Duration) -> bool {
        let exit = async {
            while !self.has_exited() {
                sleep(POLL_INTERVAL).await;
            }
        };
        timeout(bound, exit).await.is_ok()
    }

    /// Waits until a SIGSTOP (or, with `frozen` false, a SIGCONT) has taken effect.
    pub(super) async fn is_frozen_within(&self, frozen: bool, bound: Duration) -> bool {
        let change = async {
            while self.is_frozen().is_some_and(|now| now != frozen) {
                sleep(POLL_INTERVAL).await;
            }
        };
        timeout(bound, change).await.is_ok()
    }

    /// Reaps an etcd that has exited.
    pub(super) fn reap(mut self) -> io::Result<ExitStatus> {
        self.dismiss_watchdog();
        self.etcd.wait()
    }

    /// Whether etcd has exited. It is not reaped by asking: as long as the watchdog lives, the pid
    /// that the watchdog would kill must not become somebody else's.
    #[cfg(target_os = "linux")]
    pub(super) fn has_exited(&mut self) -> bool {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        // An error means that there is no such child any more.
        waitid(Id::Pid(self.pid()), flags) != Ok(WaitStatus::StillAlive)
    }

    /// Whether etcd has exited. Here asking also reaps it, a moment before its watchdog is ended.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn has_exited(&mut self) -> bool {
        !matches!(self.etcd.try_wait(), Ok(None))
    }

    /// Whether etcd is stopped by a SIGSTOP, where the system tells.
    #[cfg(target_os = "linux")]
    fn is_frozen(&self) -> Option<bool> {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(self.pid()), flags).ok()?;
        Some(matches!(status, WaitStatus::Stopped(..)))
    }

    /// Whether etcd is stopped by a SIGSTOP, where the system tells: not here.
    #[cfg(not(target_os = "linux"))]
    fn is_frozen(&self) -> Option<bool> {
        None
    }

    /// The pid of etcd, as signals want it.
    fn pid(&self) -> Pid {
        Pid::from_raw(self.etcd.id().cast_signed())
    }

    /// Kills and reaps the watchdog. This comes before etcd is reaped, see [`Process::has_exited`].
    fn dismiss_watchdog(&mut self) {
        if let Some(mut watchdog) = self.watchdog.take() {
            // Killed before `wait` closes its pipe, so it never gets to act on the end of file.
            watchdog.kill().ok();
            watchdog.wait().ok();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that it is gone, which is what is wanted.
        self.etcd.kill().ok();
        self.dismiss_watchdog();
        for _ in 0..REAP_ATTEMPTS {
            if !matches!(self.etcd.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Spawns a child in a process group of its own: Ctrl-C in a terminal reaches only the owner, which
/// then ends its servers in the order it wants.
fn spawn(command: &mut Command) -> Result<Child, ProcessError> {
    let spawned = command.process_group(0).spawn();
    spawned.map_err(|source| ProcessError::Spawn {
        program: command.get_program().into(),
        source,
    })
}
