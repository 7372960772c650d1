//! `tonic-etcd register` as a sidecar of servers in other languages. `make interop` builds the command.

use std::net::TcpListener;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::timeout;
use tonic_etcd::Registry;

use crate::servers::Kind;
use crate::support::{SOON, client, etcd, eventually, list};
use crate::{calling, empty};

const SERVICE: &str = "grpc.testing.TestService";

/// The server is registered while it responds, is called through its key, and leaves in order: its key is deleted before it stops.
async fn a_server_with_the_sidecar_is_called_and_leaves_without_a_failed_call(kind: Kind) {
    let Some(server) = kind.server_command() else {
        return;
    };
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let mut sidecars = Vec::new();
    for _ in 0..2 {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let mut folder = std::env::current_exe().unwrap();
        folder.pop();
        folder.pop();
        let sidecar = Command::new(folder.join("tonic-etcd"))
            .env("ETCDCTL_ENDPOINTS", etcd.endpoints().join(","))
            .args(["register", &address, SERVICE, "--"])
            .arg(&server)
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("`make interop` has built the command");
        sidecars.push(sidecar);
    }
    let prefix = format!("/gRPC/{SERVICE}/");
    eventually("both servers are registered", async || {
        list(&by_hand, &prefix).await.len() == 2
    })
    .await;
    let channel = registry.channel(SERVICE).connect().await.unwrap();
    let callers = calling(&channel, 4, empty);
    eventually("both servers are called", async || {
        let endpoints = channel.endpoints();
        endpoints.len() == 2 && endpoints.iter().all(|endpoint| endpoint.calls > 50)
    })
    .await;
    end(sidecars.remove(0)).await;
    assert_eq!(list(&by_hand, &prefix).await.len(), 1);
    let calls = callers.none_failed().await;
    println!("{kind:?}: {calls} calls, 0 failed");
    end(sidecars.remove(0)).await;
    assert_eq!(list(&by_hand, &prefix).await, []);
}

/// Ends a sidecar in order. A sidecar that is killed leaves its server behind.
async fn end(mut sidecar: Child) {
    let pid = Pid::from_raw(sidecar.id().unwrap().cast_signed());
    kill(pid, Signal::SIGTERM).unwrap();
    let ended = timeout(SOON, sidecar.wait()).await;
    ended.expect("the sidecar ends").unwrap();
}

for_each_server!(a_server_with_the_sidecar_is_called_and_leaves_without_a_failed_call);
