//! `register`: the sidecar.

use std::path::Path;

use nix::sys::signal::Signal;
use tokio::net::TcpListener;
use tokio::process::Child;

use super::support::{
    SERVICE, bare, client, code, command, etcd, eventually, get, outcome, signal,
};
use tonic_etcd::testing::Etcd;

/// Starts `register` with a shell script as the command. The file `ready` is the check of the command.
fn start(etcd: &Etcd, directory: &Path, options: &[&str], script: &str) -> Child {
    let fixed = ["register", "10.0.0.5:80", SERVICE, "--ready-command"];
    let ready = ["test -e ready"];
    let arguments = [&fixed[..], &ready, options, &["--", "sh", "-c", script]].concat();
    let mut command = command(etcd, &arguments);
    command.current_dir(directory).spawn().unwrap()
}

/// A script that runs until SIGTERM. It records the signal, and exits with 7.
const SERVER: &str =
    "trap 'echo TERM > signal; exit 7' TERM; touch started; while :; do sleep 0.02; done";

async fn registered(etcd: &Etcd, wanted: bool) {
    let client = client(etcd).await;
    let key = format!("/gRPC/{SERVICE}/10.0.0.5:80");
    eventually("the key is as expected", async || {
        get(&client, &key).await.is_some() == wanted
    })
    .await;
}

#[tokio::test]
async fn the_command_is_registered_while_it_responds_and_deregistered_before_it_stops() {
    let etcd = etcd().await;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let options = ["--grace-period", "2s", "--weight", "3"];
    let mut sidecar = start(&etcd, directory.path(), &options, SERVER);
    eventually("the command runs", async || path("started").exists()).await;
    let client = client(&etcd).await;
    let key = format!("/gRPC/{SERVICE}/10.0.0.5:80");
    assert_eq!(
        get(&client, &key).await,
        None,
        "the command does not respond yet"
    );
    std::fs::write(path("ready"), "").unwrap();
    registered(&etcd, true).await;
    assert!(get(&client, &key).await.unwrap().contains("\"weight\":3"));

    signal(&sidecar, Signal::SIGTERM);
    registered(&etcd, false).await;
    assert!(
        !path("signal").exists(),
        "the key is deleted before the command gets the signal"
    );
    assert_eq!(
        code(&mut sidecar).await,
        Some(7),
        "the code is that of the command"
    );
    assert_eq!(std::fs::read_to_string(path("signal")).unwrap(), "TERM\n");
}

#[tokio::test]
async fn a_command_that_exits_is_deregistered() {
    let etcd = etcd().await;
    let directory = tempfile::tempdir().unwrap();
    let script = "while [ ! -e stop ]; do sleep 0.02; done; exit 3";
    let mut sidecar = start(&etcd, directory.path(), &[], script);
    std::fs::write(directory.path().join("ready"), "").unwrap();
    registered(&etcd, true).await;
    std::fs::write(directory.path().join("stop"), "").unwrap();
    assert_eq!(code(&mut sidecar).await, Some(3));
    // The key is deleted before the sidecar exits, and does not wait for its lease.
    let client = client(&etcd).await;
    let key = format!("/gRPC/{SERVICE}/10.0.0.5:80");
    assert_eq!(get(&client, &key).await, None);
}

#[tokio::test]
async fn a_command_that_stops_responding_is_deregistered_until_it_responds_again() {
    let etcd = etcd().await;
    let directory = tempfile::tempdir().unwrap();
    let ready = directory.path().join("ready");
    std::fs::write(&ready, "").unwrap();
    let options = [
        "--check-interval",
        "50ms",
        "--failures",
        "2",
        "--grace-period",
        "10ms",
    ];
    let mut sidecar = start(&etcd, directory.path(), &options, SERVER);
    registered(&etcd, true).await;
    std::fs::remove_file(&ready).unwrap();
    registered(&etcd, false).await;
    std::fs::write(&ready, "").unwrap();
    registered(&etcd, true).await;
    signal(&sidecar, Signal::SIGTERM);
    assert_eq!(code(&mut sidecar).await, Some(7));
}

#[tokio::test]
async fn the_check_can_open_a_tcp_connection() {
    let etcd = etcd().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut sidecar = command(
        &etcd,
        &[
            "register",
            "10.0.0.5:80",
            SERVICE,
            "--check-address",
            &address,
            "--grace-period",
            "10ms",
            "--",
            "sleep",
            "60",
        ],
    )
    .spawn()
    .unwrap();
    registered(&etcd, true).await;
    signal(&sidecar, Signal::SIGTERM);
    assert_eq!(code(&mut sidecar).await, Some(128 + 15));
}

#[tokio::test]
async fn a_command_that_never_responds_is_stopped() {
    let etcd = etcd().await;
    let directory = tempfile::tempdir().unwrap();
    let options = ["--ready-timeout", "300ms"];
    let mut sidecar = start(&etcd, directory.path(), &options, SERVER);
    assert_eq!(code(&mut sidecar).await, Some(4));
    let client = client(&etcd).await;
    let key = format!("/gRPC/{SERVICE}/10.0.0.5:80");
    assert_eq!(get(&client, &key).await, None);
}

#[tokio::test]
async fn a_command_that_does_not_exist_has_the_exit_code_of_a_shell() {
    let failed = outcome(bare(&[
        "register",
        "10.0.0.5:80",
        SERVICE,
        "--",
        "/does/not/exist",
    ]))
    .await;
    assert_eq!(failed.code, Some(127), "{failed:?}");
    let invalid = outcome(bare(&["register", "nonsense", SERVICE, "--", "true"])).await;
    assert_eq!(invalid.code, Some(2), "{invalid:?}");
}
