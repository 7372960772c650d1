//! Runs the programs that `scripts/setup-interop` installed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::support::{SOON, eventually};

/// Returns the folder of the programs.
fn root() -> PathBuf {
    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
    temporary.parent().unwrap().join("interop")
}

/// Returns the launcher of a program. `part` is the part of the installation that contains the program. If the part is missing, prints the
/// reason once and returns `None`.
pub fn launcher(part: &str, program: &str) -> Option<PathBuf> {
    static REPORTED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let missing = fs::read_to_string(root().join("missing"));
    let missing = missing.expect("`make interop` must have installed the peers");
    let reason = missing.lines().find_map(|line| {
        let (name, reason) = line.split_once('\t')?;
        (name == part).then_some(reason)
    });
    let Some(reason) = reason else {
        return Some(root().join("bin").join(program));
    };
    if REPORTED.lock().unwrap().insert(part.to_owned()) {
        // The line is written directly to stderr, because the test harness captures the output of `eprintln!`.
        let line = format!("left out: the tests with {part} ({reason})\n");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
    None
}

/// A running program with its workers. Dropping it kills all of them.
pub struct Program {
    child: Child,
    /// The program's own process group.
    group: Pid,
    log: PathBuf,
}

impl Program {
    pub fn start(mut command: Command) -> Self {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("peers");
        fs::create_dir_all(&folder).unwrap();
        let program = Path::new(command.as_std().get_program()).file_name();
        let program = program.unwrap().to_str().unwrap();
        let number = STARTED.fetch_add(1, Ordering::SeqCst);
        let log = folder.join(format!("{program}-{number}.log"));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).unwrap())
            .process_group(0)
            .kill_on_drop(true);
        let child = command.spawn().unwrap();
        let group = Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
        Self { child, group, log }
    }

    /// Waits for the line with the port of the program.
    pub async fn port(&mut self) -> u16 {
        let mut lines = BufReader::new(self.child.stdout.take().unwrap()).lines();
        let reading = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Some(port) = line.strip_prefix("listening on ") {
                    return port.parse().unwrap();
                }
            }
            panic!("the program has not started: {}", self.logged());
        };
        let port = timeout(SOON, reading).await;
        port.unwrap_or_else(|_| panic!("the program does not start: {}", self.logged()))
    }

    /// Waits until the program accepts connections on a port.
    pub async fn listens(&mut self, port: u16) {
        eventually("the program listens", async || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the program has ended: {}", self.logged());
            TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
    }

    /// Sends a signal to the started process, not to its workers.
    pub fn signal(&self, signal: Signal) {
        kill(self.group, signal).unwrap();
    }

    /// Returns the output to stderr so far.
    pub fn logged(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap()).into_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // The whole group is killed, because the workers survive if only the started process is killed. tokio reaps the started process.
        let _ = killpg(self.group, Signal::SIGKILL);
    }
}
