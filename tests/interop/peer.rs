//! Builds the Go program, and runs it and our examples.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::OnceCell;
use tokio::time::timeout;
use tonic_etcd::testing::Etcd;

use crate::support::{SOON, eventually};

/// The path of the Go program.
#[derive(Clone)]
pub struct Go(PathBuf);

/// Builds the program once. Returns `None` if Go is missing or too old, and prints the reason.
pub async fn go() -> Option<Go> {
    static BUILT: OnceCell<Option<Go>> = OnceCell::const_new();
    BUILT.get_or_init(build).await.clone()
}

async fn build() -> Option<Go> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop");
    let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("interop-peer");
    let mut command = Command::new("go");
    command.args(["build", "-o"]).arg(&program).arg(".");
    // Uses only the installed Go toolchain: no other version is downloaded.
    command.current_dir(folder).env("GOTOOLCHAIN", "local");
    let output = match command.output().await {
        Ok(output) => output,
        Err(error) => return left_out(&format!("no Go: {error}")),
    };
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && stderr.contains("requires go >=") {
        return left_out(stderr.trim());
    }
    assert!(output.status.success(), "go build: {stderr}");
    Some(Go(program))
}

/// Prints why the tests are skipped. Writes directly to stderr, because the test runner hides the output of tests that pass.
fn left_out(reason: &str) -> Option<Go> {
    let line = format!("left out: the tests with grpc-go ({reason})\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    None
}

impl Go {
    /// Runs a mode of the program to its end and returns its output.
    pub async fn run(&self, arguments: &[&str]) -> String {
        self.run_for(Duration::ZERO, arguments).await
    }

    /// Runs a mode of the program that takes about this time. Returns its output.
    pub async fn run_for(&self, time: Duration, arguments: &[&str]) -> String {
        let output = self.output(time, arguments).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a mode of the program with a standard input, and returns its output.
    pub async fn run_with(&self, arguments: &[&str], input: &str) -> String {
        let mut command = Command::new(&self.0);
        command.args(arguments).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).await.unwrap();
        drop(stdin);
        let output = timeout(SOON * 2, child.wait_with_output()).await;
        let output = output.unwrap_or_else(|_| panic!("{arguments:?} timed out"));
        let output = output.unwrap();
        assert!(output.status.success(), "{arguments:?} failed");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a mode of the program that must fail, and returns its error output.
    pub async fn fails(&self, arguments: &[&str]) -> String {
        let output = self.output(Duration::ZERO, arguments).await;
        assert!(!output.status.success(), "{arguments:?} must fail");
        String::from_utf8(output.stderr).unwrap()
    }

    async fn output(&self, time: Duration, arguments: &[&str]) -> Output {
        let mut command = Command::new(&self.0);
        command.args(arguments).kill_on_drop(true);
        let output = timeout(time + SOON * 2, command.output()).await;
        let output = output.unwrap_or_else(|_| panic!("{arguments:?} timed out"));
        output.unwrap()
    }

    pub async fn certificates(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        self.run(&["certificates", folder.path().to_str().unwrap()])
            .await;
        folder
    }

    /// Starts a server and waits until it is registered.
    pub async fn server(
        &self,
        etcd: &Etcd,
        service: &str,
        name: &str,
        certificate: Option<&str>,
    ) -> Peer {
        let mut command = Command::new(&self.0);
        command.args(["server", "-service", service, "-name", name]);
        command.args(["-etcd", &etcd.endpoints().join(",")]);
        if let Some(certificate) = certificate {
            command.args(["-certificate", certificate]);
        }
        Peer::start(&mut command).serving().await
    }

    /// Starts a server that refuses some calls with a pushback and is not registered.
    pub async fn limited_server(&self) -> Peer {
        let mut command = Command::new(&self.0);
        Peer::start(command.arg("limited-server")).serving().await
    }

    /// Starts a server that reports its load and is not registered.
    pub async fn reporting_server(&self) -> Peer {
        let mut command = Command::new(&self.0);
        Peer::start(command.arg("orca-server")).serving().await
    }
}

/// A process: the Go program as a server, or one of our examples.
pub struct Peer {
    child: Child,
    pid: u32,
    address: String,
    lines: Lines<BufReader<ChildStdout>>,
}

/// Starts one of our examples, which are built together with the tests.
pub fn example(name: &str, etcd: &Etcd) -> Peer {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    folder.pop();
    let mut command = Command::new(folder.join("examples").join(name));
    command.env("ETCD_ENDPOINTS", etcd.endpoints().join(","));
    Peer::start(&mut command)
}

impl Peer {
    fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        Self {
            pid: child.id().unwrap(),
            address: String::new(),
            lines: BufReader::new(child.stdout.take().unwrap()).lines(),
            child,
        }
    }

    /// Waits until a Go server has printed its address.
    async fn serving(mut self) -> Self {
        let line = timeout(SOON, self.lines.next_line()).await.unwrap();
        let line = line.unwrap().expect("the program prints a line");
        let address = line
            .strip_prefix("serving ")
            .expect("the program prints its address");
        address.clone_into(&mut self.address);
        self
    }

    /// Returns the address of a Go server. The address of an example is empty.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the name that an example's greeter puts into its replies.
    pub fn name(&self) -> String {
        format!("server {}", self.pid)
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.pid).unwrap()), signal).unwrap();
    }

    /// Waits until the process ends and returns its remaining output.
    pub async fn ended(&mut self) -> String {
        let mut printed = String::new();
        let reading = async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                printed.push_str(&line);
                printed.push('\n');
            }
            self.child.wait().await.unwrap();
        };
        timeout(SOON, reading).await.expect("the program ends");
        printed
    }
}

/// Outcomes of a Go client's calls since the last report.
#[derive(Debug, Deserialize)]
pub struct Tally {
    pub ok: u64,
    pub failed: u64,
    pub servers: BTreeMap<String, u64>,
    pub errors: BTreeMap<String, u64>,
}

/// A Go client that calls continuously.
pub struct Load {
    _child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Load {
    pub async fn start(go: &Go, etcd: &Etcd, arguments: &[&str]) -> Self {
        // The load starts only after both servers are registered, because calls fail without a server.
        let registry = tonic_etcd::Registry::connect(etcd.endpoints())
            .await
            .unwrap();
        let resolver = registry.resolver("helloworld.Greeter").start();
        eventually("both servers are registered", async || {
            resolver.instances().len() == 2
        })
        .await;
        let mut command = Command::new(&go.0);
        command.args(["load", "-etcd", &etcd.endpoints().join(",")]);
        command.args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        Self {
            input: child.stdin.take().unwrap(),
            lines: BufReader::new(child.stdout.take().unwrap()).lines(),
            _child: child,
        }
    }

    pub async fn report(&mut self) -> Tally {
        self.input.write_all(b"\n").await.unwrap();
        let line = timeout(SOON, self.lines.next_line()).await.unwrap();
        serde_json::from_str(&line.unwrap().expect("the client prints a report")).unwrap()
    }

    /// Requests reports until one satisfies the condition and contains more than 30 successful calls. Returns this report, with the
    /// failures of all reports so far.
    pub async fn until(&mut self, what: &str, condition: impl Fn(&Tally) -> bool) -> Tally {
        let mut failed = 0;
        let mut found = None;
        let mut errors = BTreeMap::new();
        eventually(what, async || {
            let mut tally = self.report().await;
            failed += tally.failed;
            for (error, count) in std::mem::take(&mut tally.errors) {
                *errors.entry(error).or_default() += count;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            let done = tally.ok > 30 && condition(&tally);
            found = Some(tally);
            done
        })
        .await;
        let found = found.expect("a report");
        Tally {
            failed,
            errors,
            ..found
        }
    }
}
