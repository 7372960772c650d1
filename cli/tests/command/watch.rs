//! `watch`.

use nix::sys::signal::Signal;
use serde_json::Value;

use super::pty::{Screen, Terminal, until_stopped};
use super::support::{
    SERVICE, SOON, code, command, dead_address, etcd, grpc_server, line_with, lines, register,
    signal,
};

#[tokio::test]
async fn watch_prints_joins_changes_and_leaves() {
    let etcd = etcd().await;
    let first = dead_address().await;
    let first_registration = register(&etcd, first).await;
    let mut watch = command(&etcd, &["watch", SERVICE]).spawn().unwrap();
    let mut output = lines(&mut watch);
    line_with(&mut output, &format!(" + {first} /gRPC/{SERVICE}/")).await;

    let second = dead_address().await;
    let registration = register(&etcd, second).await;
    line_with(&mut output, &format!(" + {second} ")).await;
    registration.set_weight(7).await.unwrap();
    let changed = line_with(&mut output, &format!(" ~ {second} ")).await;
    assert!(changed.contains("weight=7"), "{changed}");
    // The time since the join.
    assert!(changed.contains(" after="), "{changed}");
    registration.deregister().await.unwrap();
    let left = line_with(&mut output, &format!(" - {second} ")).await;
    assert!(left.contains(" after="), "{left}");
    assert!(!left.contains('\u{1b}'), "{left}");
    // A removal of the last instance is a change as well, although a channel would keep it for a while.
    first_registration.deregister().await.unwrap();
    line_with(&mut output, &format!(" - {first} ")).await;

    signal(&watch, Signal::SIGINT);
    assert_eq!(code(&mut watch).await, Some(0));
}

#[tokio::test]
async fn watch_prints_json_lines() {
    let etcd = etcd().await;
    let address = dead_address().await;
    let mut watch = command(&etcd, &["--json", "watch", SERVICE])
        .spawn()
        .unwrap();
    let mut output = lines(&mut watch);
    let registration = register(&etcd, address).await;
    let join = line_with(&mut output, "join").await;
    let join: Value = serde_json::from_str(&join).unwrap();
    assert_eq!(join["address"], address.to_string());
    assert!(join["lease"].is_string(), "{join}");
    assert!(join["after_ms"].is_null(), "{join}");
    registration.deregister().await.unwrap();
    let leave = line_with(&mut output, "leave").await;
    let leave: Value = serde_json::from_str(&leave).unwrap();
    assert!(leave["after_ms"].is_f64(), "{leave}");
}

#[tokio::test]
async fn watch_shows_a_live_view_on_a_terminal() {
    let etcd = etcd().await;
    let alive = grpc_server().await;
    let _alive = register(&etcd, alive).await;
    let mut command = command(&etcd, &["watch", "--check", SERVICE]);
    command.env("NO_COLOR", "1");
    let (mut watch, terminal) = Terminal::spawn(command, 70, 20);
    let alive_row = format!("\n{alive}  1 ");
    let screen = terminal
        .until("the instance and the result of its check", SOON, |screen| {
            let text = screen.text();
            text.contains(&alive_row) && text.contains("  serving (")
        })
        .await;
    assert!(screen.is_alternate() && !screen.cursor_is_visible());
    let text = screen.text();
    let heading = text.lines().next().unwrap();
    assert!(heading.starts_with(SERVICE), "{text}");
    assert!(heading.contains("  1 instance  "), "{text}");
    assert!(heading.ends_with("  in sync"), "{text}");

    // A server that joins, cannot be reached and leaves.
    let dead = dead_address().await;
    let registration = register(&etcd, dead).await;
    terminal
        .until("the new instance", SOON, |screen| {
            let text = screen.text();
            text.contains("  2 instances  ") && text.contains(&format!(" + {dead} "))
        })
        .await;
    registration.deregister().await.unwrap();
    let left = format!(" - {dead} ");
    let screen = terminal
        .until("the instance has left", SOON, |screen| {
            let text = screen.text();
            text.contains("  1 instance  ") && text.contains(&left)
        })
        .await;
    assert!(!screen.text().contains(&format!("\n{dead}  ")));
    assert!(!screen.has_wrapped && !screen.was_coloured);

    // The events remain visible after the end.
    signal(&watch, Signal::SIGINT);
    assert_eq!(code(&mut watch).await, Some(0));
    let screen = terminal
        .until("the terminal is restored", SOON, |screen| {
            !screen.is_alternate() && screen.text().contains(&left)
        })
        .await;
    assert!(screen.cursor_is_visible());
    assert!(!screen.text().contains("ADDRESS"), "{}", screen.text());
}

fn is_restored(screen: &Screen) -> bool {
    !screen.is_alternate() && screen.cursor_is_visible()
}

fn is_live(screen: &Screen) -> bool {
    screen.is_alternate() && !screen.cursor_is_visible() && screen.text().contains("0 instances")
}

#[tokio::test]
async fn sigterm_and_sigquit_restore_the_terminal_of_watch() {
    let etcd = etcd().await;
    for (ending, expected) in [(Signal::SIGTERM, 143), (Signal::SIGQUIT, 131)] {
        let (mut watch, terminal) = Terminal::spawn(command(&etcd, &["watch", SERVICE]), 80, 24);
        terminal.until("the view", SOON, is_live).await;
        signal(&watch, ending);
        assert_eq!(code(&mut watch).await, Some(expected));
        terminal
            .until("the terminal is restored", SOON, is_restored)
            .await;
    }
}

/// The shell needs the terminal while the command is stopped.
#[tokio::test]
async fn a_stop_restores_the_terminal_of_watch_until_it_is_continued() {
    let etcd = etcd().await;
    let (mut watch, terminal) = Terminal::spawn(command(&etcd, &["watch", SERVICE]), 80, 24);
    for _ in 0..2 {
        terminal.until("the view", SOON, is_live).await;
        signal(&watch, Signal::SIGTSTP);
        until_stopped(&watch, SOON).await;
        terminal
            .until("the terminal is restored", SOON, is_restored)
            .await;
        signal(&watch, Signal::SIGCONT);
    }
    terminal.until("the view", SOON, is_live).await;
    signal(&watch, Signal::SIGINT);
    assert_eq!(code(&mut watch).await, Some(0));
}

/// The lines after the view cannot be written any more.
#[tokio::test]
async fn a_hangup_of_the_terminal_ends_watch_with_the_code_of_the_signal() {
    let etcd = etcd().await;
    let address = dead_address().await;
    let _registration = register(&etcd, address).await;
    let (mut watch, terminal) = Terminal::spawn(command(&etcd, &["watch", SERVICE]), 80, 24);
    terminal
        .until("the event", SOON, |screen| {
            screen.text().contains(&format!(" + {address} "))
        })
        .await;
    terminal.close();
    signal(&watch, Signal::SIGHUP);
    assert_eq!(code(&mut watch).await, Some(129));
}
