//! The examples as separate programs.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;
use tonic_etcd::testing::Etcd;

use super::SOON;

/// Returns the command for an example, which is built together with the tests.
pub fn example(name: &str) -> Command {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    folder.pop();
    let mut command = Command::new(folder.join("examples").join(name));
    command
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true);
    command
}

/// Starts the example server. Its log is discarded.
pub fn greeter_server(etcd: &Etcd) -> Child {
    example("greeter_server")
        .env("ETCD_ENDPOINTS", etcd.endpoint(0).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Lines that a program prints.
pub type Output = Lines<BufReader<ChildStdout>>;

/// Reads a program's lines up to the first that contains a text, and returns that line.
pub async fn line_with(lines: &mut Output, text: &str) -> String {
    let found = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains(text) {
                return line;
            }
        }
        panic!("no line with {text:?}");
    };
    timeout(SOON, found)
        .await
        .unwrap_or_else(|_| panic!("no line with {text:?} in time"))
}

/// Returns the remaining output of a program, up to its end.
pub async fn rest(lines: &mut Output) -> String {
    let mut text = String::new();
    let end = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            text += &line;
            text.push('\n');
        }
    };
    timeout(SOON, end).await.expect("the program must end");
    text
}

pub fn lines(child: &mut Child) -> Output {
    BufReader::new(child.stdout.take().unwrap()).lines()
}

pub fn signal(child: &Child, signal: Signal) {
    kill(
        Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()),
        signal,
    )
    .unwrap();
}
