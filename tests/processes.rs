//! The etcd of the `testing` feature, and the examples as separate programs.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;
#[path = "../cli/src/terminal/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    reason = "the test of a panic needs a part of the module"
)]
mod terminal;

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use support::program::{example, line_with, lines, signal};
use support::pty::{Screen, Terminal, until_stopped};
use support::{SOON, client, etcd, eventually, list};
use tokio::time::timeout;
use tonic_etcd::testing::{Etcd, ProcessError};

fn is_alive(pid: u32) -> bool {
    // A reaped process has no entry.
    PathBuf::from(format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn a_dropped_etcd_leaves_no_process_and_no_directory() {
    let cluster = Etcd::start_cluster(3).await.unwrap();
    let pids: Vec<_> = (0..3).map(|member| cluster.pid(member).unwrap()).collect();
    let command_line = std::fs::read_to_string(format!("/proc/{}/cmdline", pids[0])).unwrap();
    let arguments: Vec<_> = command_line.split('\0').collect();
    let data = arguments
        .iter()
        .position(|argument| argument.starts_with("--data-dir"))
        .unwrap();
    let data = arguments[data]
        .strip_prefix("--data-dir=")
        .unwrap_or(arguments[data + 1]);
    let data = PathBuf::from(data);
    assert!(data.exists());
    eventually("a leader is elected", async || {
        cluster.leader().await.is_some()
    })
    .await;
    drop(cluster);
    assert!(pids.iter().all(|pid| !is_alive(*pid)), "a process is left");
    assert!(
        !data.exists() && !data.parent().unwrap().exists(),
        "a directory is left"
    );
}

#[tokio::test]
async fn members_are_stopped_killed_frozen_wiped_and_restarted() {
    let mut etcd = etcd().await;
    client(&etcd).await.put("/a", "1", None).await.unwrap();
    for kill in [false, true] {
        if kill {
            etcd.kill(0).await.unwrap();
        } else {
            etcd.stop(0).await.unwrap();
        }
        assert_eq!(etcd.pid(0), None);
        etcd.restart(0).await.unwrap();
        assert_eq!(
            list(&client(&etcd).await, "/").await.len(),
            1,
            "the data must be kept"
        );
    }
    assert!(matches!(
        etcd.wipe(0).await,
        Err(ProcessError::StillRunning { .. })
    ));
    etcd.freeze(0).await.unwrap();
    let reading = async { client(&etcd).await.kv_client().get("/a", None).await };
    assert!(
        timeout(Duration::from_millis(300), reading).await.is_err(),
        "a frozen member must not answer"
    );
    etcd.thaw(0).await.unwrap();
    etcd.stop(0).await.unwrap();
    assert!(
        etcd.restore(0).await.is_err(),
        "`restore` must fail without a backup"
    );
    etcd.restart(0).await.unwrap();
    assert_eq!(list(&client(&etcd).await, "/").await.len(), 1);
    etcd.stop(0).await.unwrap();
    etcd.back_up(0).await.unwrap();
    etcd.wipe(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    assert!(list(&client(&etcd).await, "/").await.is_empty());
    assert!(matches!(
        etcd.back_up(0).await,
        Err(ProcessError::StillRunning { .. })
    ));
    etcd.stop(0).await.unwrap();
    etcd.restore(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    assert_eq!(list(&client(&etcd).await, "/").await.len(), 1);
    assert!(matches!(
        etcd.stop(7).await,
        Err(ProcessError::NoSuchMember { .. })
    ));
}

#[tokio::test]
async fn the_error_for_a_missing_binary_contains_its_path_or_instructions() {
    let error = Etcd::builder()
        .binary("/nonexistent/etcd")
        .start()
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("/nonexistent/etcd"), "{text}");
    assert!(
        ProcessError::NoBinary.to_string().contains("ETCD_BIN"),
        "{}",
        ProcessError::NoBinary
    );
}

#[tokio::test]
async fn the_discover_example_prints_what_the_register_example_changes() {
    let etcd = etcd().await;
    let mut discover = example("discover")
        .env("ETCD_ENDPOINTS", etcd.endpoint(0).unwrap())
        .spawn()
        .unwrap();
    let mut found = lines(&mut discover);
    line_with(&mut found, "0 servers").await;
    let mut register = example("register")
        .args(["/web/node1", "localhost:8000"])
        .env("ETCD_ENDPOINTS", etcd.endpoint(0).unwrap())
        .spawn()
        .unwrap();
    let mut log = lines(&mut register);
    line_with(&mut log, "localhost:8000 is registered as /web/node1").await;
    line_with(&mut found, "+ localhost:8000").await;
    // The first line is the current state, and the second is a renewal.
    for _ in 0..2 {
        let line = line_with(&mut log, "registered under lease").await;
        assert!(line.ends_with(" s left"), "{line}");
    }
    signal(&register, Signal::SIGINT);
    line_with(&mut log, "deregistered").await;
    assert!(
        timeout(SOON, register.wait())
            .await
            .unwrap()
            .unwrap()
            .success()
    );
    line_with(&mut found, "- localhost:8000").await;
    assert!(list(&client(&etcd).await, "/").await.is_empty());
}

#[tokio::test]
async fn the_discover_example_distinguishes_a_change_from_a_new_instance() {
    let etcd = etcd().await;
    let mut discover = example("discover")
        .env("ETCD_ENDPOINTS", etcd.endpoint(0).unwrap())
        .spawn()
        .unwrap();
    let mut found = lines(&mut discover);
    line_with(&mut found, "0 servers").await;
    let registry = support::registry(&etcd).await;
    let registration = registry
        .registration("greeter")
        .address("10.0.0.5:1")
        .zone("eu-1a")
        .register()
        .await
        .unwrap();
    let line = line_with(&mut found, "10.0.0.5:1  /gRPC/").await;
    assert!(
        line.starts_with("+ ") && line.ends_with("  zone eu-1a"),
        "{line}"
    );
    registration.set_weight(3).await.unwrap();
    let line = line_with(&mut found, "weight 3").await;
    assert!(line.starts_with("~ "), "{line}");
    registration.deregister().await.unwrap();
    // Before the deletion, the value marks the instance as leaving. The program may not see this value, so only the removal is checked.
    line_with(&mut found, "- 10.0.0.5:1").await;
}

#[tokio::test]
async fn the_register_example_deregisters_on_sigterm_and_reports_errors_in_plain_text() {
    let etcd = etcd().await;
    let mut register = example("register")
        .args(["/web/node1", "localhost:8000"])
        .env("ETCD_ENDPOINTS", etcd.endpoint(0).unwrap())
        .spawn()
        .unwrap();
    let mut log = lines(&mut register);
    line_with(&mut log, "is registered").await;
    signal(&register, Signal::SIGTERM);
    let status = timeout(SOON, register.wait()).await.unwrap().unwrap();
    assert!(status.success());
    assert!(list(&client(&etcd).await, "/").await.is_empty());
    let failing = example("register")
        .args(["/web/node1", "localhost:8000"])
        .env("ETCD_ENDPOINTS", "127.0.0.1:1")
        .stderr(std::process::Stdio::piped())
        .output();
    let output = timeout(SOON, failing).await.unwrap().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.starts_with("error: etcd did not respond at 127.0.0.1:1") && text.contains("refused"),
        "{text}"
    );
}

#[tokio::test]
async fn the_greeter_examples_find_each_other() {
    let etcd = etcd().await;
    let mut server = example("greeter_server")
        .env("ETCD_ENDPOINTS", etcd.endpoint(0).unwrap())
        .spawn()
        .unwrap();
    let by_hand = client(&etcd).await;
    eventually("the server is registered", async || {
        list(&by_hand, "/gRPC/helloworld.Greeter/").await.len() == 1
    })
    .await;
    let mut caller = example("greeter_client")
        .env("ETCD_ENDPOINTS", etcd.endpoint(0).unwrap())
        .spawn()
        .unwrap();
    let mut replies = lines(&mut caller);
    let name = format!("Hello world, this is server {}", server.id().unwrap());
    assert_eq!(line_with(&mut replies, "Hello").await, name);
    signal(&server, Signal::SIGTERM);
    assert!(
        timeout(SOON, server.wait())
            .await
            .unwrap()
            .unwrap()
            .success()
    );
    assert!(list(&by_hand, "/").await.is_empty());
}

#[tokio::test]
async fn the_greeter_cluster_example_succeeds() {
    let output = timeout(
        Duration::from_secs(90),
        example("greeter_cluster")
            .env_remove("ETCD_ENDPOINTS")
            .output(),
    )
    .await
    .unwrap()
    .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
    for (line, start) in text.lines().zip(CLUSTER_LINES) {
        assert!(line.starts_with(start), "{text}");
    }
    assert_eq!(text.lines().count(), CLUSTER_LINES.len(), "{text}");
    let last = text.lines().last().unwrap();
    assert!(last.ends_with(CLUSTER_END), "{last}");
}

/// The beginnings of the lines that the example of the cluster prints.
const CLUSTER_LINES: [&str; 8] = [
    "etcd ",
    "three servers     registered 3   alpha ",
    "delta has joined  registered 4   alpha ",
    "alpha has left    registered 3   alpha ",
    "beta is killed    registered ",
    "beta is back      registered 3   alpha ",
    "",
    "greeter cluster: ",
];
const CLUSTER_END: &str = " calls, 0 failed, 4 servers seen";

#[tokio::test]
async fn the_greeter_cluster_example_shows_a_live_picture_on_a_terminal() {
    let mut command = example("greeter_cluster");
    command.env_remove("ETCD_ENDPOINTS");
    let (mut child, terminal) = Terminal::spawn(command, 80, 24);
    let ready = |text: &str| text.matches("  READY ").count();
    let screen = terminal
        .until("three servers are ready", SOON, |screen| {
            let text = screen.text();
            ready(text) == 3 && text.contains("three servers") && !text.contains("\n0 calls/s")
        })
        .await;
    assert!(screen.is_alternate() && !screen.cursor_is_visible());
    let text = screen.text();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("greeter cluster  "), "{text}");
    assert!(lines[1].contains(" calls/s  p50 "), "{text}");
    assert!(lines[1].contains(" ms  p99 "), "{text}");
    assert!(lines[3].starts_with("SERVER"), "{text}");
    assert!(lines[4].contains("127.0.0.1:"), "{text}");
    assert!(text.contains("\nEVENTS\n"), "{text}");
    terminal
        .until("the fourth server is shown with its name", SOON, |screen| {
            let text = screen.text();
            ready(text) == 4 && text.contains("\ndelta  ")
        })
        .await;
    terminal
        .until("the death of a server is an event", SOON, |screen| {
            let text = screen.text();
            let mut lines = text.lines();
            lines.any(|line| line.contains("s  beta (127.0.0.1:") && line.contains(" is "))
        })
        .await;
    let status = timeout(Duration::from_secs(60), child.wait()).await;
    assert!(status.unwrap().unwrap().success());
    // The terminal is as before, with the lines that a pipe receives.
    let screen = terminal
        .until("the result is printed", SOON, |screen| {
            screen.text().contains(CLUSTER_END)
        })
        .await;
    assert!(!screen.is_alternate() && screen.cursor_is_visible());
    assert!(!screen.has_wrapped, "a line was too long");
    assert!(!screen.was_coloured, "NO_COLOR is set");
    let text = screen.text();
    for start in CLUSTER_LINES {
        assert!(text.lines().any(|line| line.starts_with(start)), "{text}");
    }
}

#[tokio::test]
async fn ctrl_c_restores_the_terminal_of_the_greeter_cluster_example() {
    let mut command = example("greeter_cluster");
    command.env_remove("ETCD_ENDPOINTS").env_remove("NO_COLOR");
    // A narrow terminal.
    let (mut child, terminal) = Terminal::spawn(command, 40, 10);
    terminal
        .until("a server is ready", SOON, |screen| {
            screen.is_alternate() && screen.text().contains("READY")
        })
        .await;
    signal(&child, Signal::SIGINT);
    let status = timeout(SOON, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(130));
    let screen = terminal
        .until("the terminal is restored", SOON, |screen| {
            !screen.is_alternate() && screen.cursor_is_visible()
        })
        .await;
    assert!(screen.was_coloured && !screen.has_wrapped);
    // The line begins in the first column again, although the full picture has left the cursor in another one.
    let text = screen.text();
    assert!(text.lines().any(|line| line.starts_with("etcd ")), "{text}");
}

#[tokio::test]
async fn the_greeter_cluster_example_restores_the_terminal_at_a_stop_a_quit_and_a_hangup() {
    let start = async || {
        let mut command = example("greeter_cluster");
        command.env_remove("ETCD_ENDPOINTS");
        let (child, terminal) = Terminal::spawn(command, 80, 24);
        terminal
            .until("the picture", SOON, |screen| {
                screen.is_alternate() && screen.text().contains("\nSERVER")
            })
            .await;
        (child, terminal)
    };
    let (mut child, terminal) = start().await;
    signal(&child, Signal::SIGTSTP);
    until_stopped(&child, SOON).await;
    let is_restored = |screen: &Screen| !screen.is_alternate() && screen.cursor_is_visible();
    terminal
        .until("the terminal is restored", SOON, is_restored)
        .await;
    signal(&child, Signal::SIGCONT);
    terminal
        .until("the picture is back", SOON, |screen| {
            screen.is_alternate() && screen.text().contains("\nSERVER")
        })
        .await;
    signal(&child, Signal::SIGQUIT);
    let status = timeout(SOON, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(131));
    terminal
        .until("the terminal is restored", SOON, is_restored)
        .await;

    // The lines after the picture cannot be written any more.
    let (mut child, terminal) = start().await;
    terminal.close();
    signal(&child, Signal::SIGHUP);
    let status = timeout(SOON, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(129));
}

/// The program of the next test: it shows a picture and panics.
#[test]
#[ignore = "the next test runs it in a process of its own"]
fn a_program_with_a_picture_that_panics() {
    let screen = terminal::Screen::open().unwrap();
    screen.draw(&["the picture".to_owned()]);
    panic!("a reason");
}

#[tokio::test]
async fn a_panic_restores_the_terminal_and_its_message_is_visible() {
    let mut command = tokio::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "--ignored", "--nocapture"]);
    command.arg("a_program_with_a_picture_that_panics");
    // A backtrace would scroll the message away.
    command.env("RUST_BACKTRACE", "0");
    let (mut child, terminal) = Terminal::spawn(command, 80, 24);
    assert!(
        !timeout(SOON, child.wait())
            .await
            .unwrap()
            .unwrap()
            .success()
    );
    let screen = terminal
        .until("the message of the panic", SOON, |screen| {
            screen.text().contains("a reason")
        })
        .await;
    assert!(!screen.is_alternate() && screen.cursor_is_visible());
    assert!(!screen.text().contains("the picture"), "{}", screen.text());
}
