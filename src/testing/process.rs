//! One running etcd, and the watchdog that kills it if its owner exits without cleanup.

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

/// The script of the watchdog. Its arguments are the pid of etcd and the temporary directory.
///
/// Its standard input is a pipe. Only the owner holds the other end, so end of file means that the
/// owner has exited. The script waits with `read`, which is built into every shell, because `cat`
/// would be a second process to kill. `rm` runs a second time if the first run fails. It can fail
/// because the dying etcd still writes files.
const WATCHDOG: &str = r#"while read -r _; do :; done
kill -9 "$1" 2>/dev/null
rm -rf "$2" || { sleep 1; rm -rf "$2"; }"#;

/// Time between two checks whether a process has exited or is stopped.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Maximum number of checks, one millisecond apart, whether a dropped etcd has exited. If it has
/// not exited by then, it is not reaped.
const REAP_ATTEMPTS: usize = 2_000;

/// A running etcd with its watchdog. Dropping it kills and reaps both.
///
/// Both are children of [`std::process`] and belong to no tokio runtime. So a test can use an etcd
/// that another test has started on another runtime.
#[derive(Debug)]
pub(super) struct Process {
    /// The server.
    etcd: Child,
    /// The watchdog. `None` before it is started and after it was killed.
    watchdog: Option<Child>,
}

impl Process {
    /// Starts `etcd`, and the watchdog that kills it and removes `directory` if the owner process
    /// dies.
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

    /// Returns the pid of etcd.
    pub(super) fn id(&self) -> u32 {
        self.etcd.id()
    }

    /// Sends a signal to etcd. The pid is not reused before etcd is reaped, so the signal cannot
    /// reach another process.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        signal::kill(self.pid(), signal)?;
        Ok(())
    }

    /// Waits until etcd has exited. Returns false if the timeout elapses first.
    pub(super) async fn exits_within(&mut self, bound: Duration) -> bool {
        let exit = async {
            while !self.has_exited() {
                sleep(POLL_INTERVAL).await;
            }
        };
        timeout(bound, exit).await.is_ok()
    }

    /// Waits until a SIGSTOP has taken effect if `frozen` is true, or a SIGCONT if it is false.
    /// Returns false if the timeout elapses first. On a system that does not report this state,
    /// returns true at once.
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

    /// Returns whether etcd has exited. Does not reap etcd, because the watchdog kills by pid: no
    /// other process may get this pid while the watchdog exists.
    #[cfg(target_os = "linux")]
    pub(super) fn has_exited(&mut self) -> bool {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        // An error means that the child no longer exists.
        waitid(Id::Pid(self.pid()), flags) != Ok(WaitStatus::StillAlive)
    }

    /// Returns whether etcd has exited. On this system, the check also reaps etcd. If etcd has
    /// exited, the callers then kill the watchdog: they drop the [`Process`] or call
    /// [`Process::reap`].
    #[cfg(not(target_os = "linux"))]
    pub(super) fn has_exited(&mut self) -> bool {
        !matches!(self.etcd.try_wait(), Ok(None))
    }

    /// Returns whether a signal such as SIGSTOP has stopped etcd; `None` if the state cannot be
    /// read.
    #[cfg(target_os = "linux")]
    fn is_frozen(&self) -> Option<bool> {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(self.pid()), flags).ok()?;
        Some(matches!(status, WaitStatus::Stopped(..)))
    }

    /// Returns `None`: this system does not report whether etcd is stopped by a SIGSTOP.
    #[cfg(not(target_os = "linux"))]
    fn is_frozen(&self) -> Option<bool> {
        None
    }

    /// Returns the pid of etcd in the type that `signal::kill` takes.
    fn pid(&self) -> Pid {
        Pid::from_raw(self.etcd.id().cast_signed())
    }

    /// Kills and reaps the watchdog. Where [`Process::has_exited`] does not reap etcd, this
    /// function is called before etcd is reaped, so that the watchdog cannot kill another process
    /// with the same pid.
    fn dismiss_watchdog(&mut self) {
        if let Some(mut watchdog) = self.watchdog.take() {
            // The watchdog is killed before `wait` closes its pipe, so that it never reads the end
            // of file.
            watchdog.kill().ok();
            watchdog.wait().ok();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that etcd has already exited.
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

/// Spawns a child in its own process group. Ctrl-C in a terminal then reaches only the owner, which
/// can end its servers in the order that it needs.
fn spawn(command: &mut Command) -> Result<Child, ProcessError> {
    let spawned = command.process_group(0).spawn();
    spawned.map_err(|cause| ProcessError::Spawn {
        program: command.get_program().into(),
        cause,
    })
}
