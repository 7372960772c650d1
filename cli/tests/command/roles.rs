//! The command against an etcd with authentication, with the roles of `docs/security.md`.

use etcd_client::{Client, Permission, PermissionType};
use nix::sys::signal::Signal;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{Registry, ServeRegistered};

use super::support::{
    Outcome, SERVICE, client, code, command, dead_address, etcd, eventually, line_with, lines,
    outcome, signal,
};

const PASSWORD: &str = "secret";

/// Enables authentication. The users have the names of their roles: `root`, `server`, `client`, `operator` and `nobody`, which has no
/// permissions.
async fn protect(etcd: &Etcd) {
    use PermissionType::{Read, Readwrite};
    let mut root: Client = client(etcd).await;
    for name in ["root", "server", "client", "operator", "nobody"] {
        root.role_add(name).await.unwrap();
        root.user_add(name, PASSWORD, None).await.unwrap();
        root.user_grant_role(name, name).await.unwrap();
    }
    let instances = format!("/gRPC/{SERVICE}/");
    let control = format!("/gRPC.control/{SERVICE}/");
    for (role, kind, prefix) in [
        ("server", Readwrite, instances.clone()),
        ("server", Read, format!("{control}instances/")),
        ("server", Readwrite, format!("{control}status/")),
        ("client", Read, instances.clone()),
        ("operator", Readwrite, format!("{control}instances/")),
        ("operator", Read, control.clone()),
        ("operator", Read, instances),
    ] {
        let permission = Permission::new(kind, prefix).with_prefix();
        root.role_grant_permission(role, permission).await.unwrap();
    }
    // A single key.
    for (role, kind) in [("client", Read), ("operator", Readwrite)] {
        let permission = Permission::new(kind, format!("{control}config"));
        root.role_grant_permission(role, permission).await.unwrap();
    }
    root.auth_enable().await.unwrap();
}

fn as_user(etcd: &Etcd, user: &str, arguments: &[&str]) -> tokio::process::Command {
    let mut command = command(etcd, arguments);
    command.env("ETCDCTL_USER", user);
    command.env("ETCDCTL_PASSWORD", PASSWORD);
    command
}

async fn run_as(etcd: &Etcd, user: &str, arguments: &[&str]) -> Outcome {
    outcome(as_user(etcd, user, arguments)).await
}

/// Checks that a command fails because of a missing permission, and that its message names the permission and what to do.
async fn denied(etcd: &Etcd, user: &str, arguments: &[&str], what: &str) {
    let failed = run_as(etcd, user, arguments).await;
    assert_eq!(failed.code, Some(3), "{user} {arguments:?}: {failed:?}");
    assert_eq!(failed.stderr.lines().count(), 1, "{failed:?}");
    for text in [what, "permission denied", "grant", "--user"] {
        assert!(failed.stderr.contains(text), "{text}: {failed:?}");
    }
    assert!(!failed.stderr.contains(PASSWORD), "{failed:?}");
}

/// A server of the library with the role `server`.
async fn server(etcd: &Etcd) -> (oneshot::Sender<()>, JoinHandle<()>, String) {
    let registry = Registry::builder(etcd.endpoints()).user("server", PASSWORD);
    let registry = registry.connect().await.unwrap();
    let registration = registry
        .registration(SERVICE)
        .operator_control("/gRPC.control/");
    let handle = registration.handle();
    let (_, health) = tonic_health::server::health_reporter();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(async move {
        let router = Server::builder().add_service(health);
        let stopped = async { drop(stopped.await) };
        let address = "127.0.0.1:0".parse().unwrap();
        let served = router.serve_registered_with_shutdown(address, registration, stopped);
        served.await.unwrap();
    });
    let address = handle.address().await.unwrap().to_string();
    eventually("the server is registered", async || {
        let listed = run_as(etcd, "root", &["ls", SERVICE]).await;
        listed.stdout.contains(&address)
    })
    .await;
    (stop, serving, address)
}

#[tokio::test]
async fn an_operator_controls_a_server_and_clients_may_only_read() {
    let etcd = etcd().await;
    protect(&etcd).await;
    let (stop, serving, address) = server(&etcd).await;

    for user in ["client", "operator"] {
        let listed = run_as(&etcd, user, &["ls", SERVICE, "--check"]).await;
        assert_eq!(listed.code, Some(0), "{user}: {listed:?}");
        assert!(listed.stdout.contains(&address), "{user}: {listed:?}");
        let diagnosed = run_as(&etcd, user, &["doctor", SERVICE]).await;
        assert_eq!(diagnosed.code, Some(0), "{user}: {diagnosed:?}");
        assert!(
            diagnosed.stdout.contains("read granted, write denied"),
            "{diagnosed:?}"
        );
    }
    for arguments in [
        &["drain", SERVICE, &address][..],
        &["resume", SERVICE, &address],
        &["weight", SERVICE, &address, "3"],
    ] {
        let done = run_as(&etcd, "operator", arguments).await;
        assert_eq!(done.code, Some(0), "{arguments:?}: {done:?}");
        assert!(done.stdout.contains("done"), "{arguments:?}: {done:?}");
    }
    let listed = run_as(&etcd, "operator", &["--json", "ls", SERVICE]).await;
    assert_eq!(listed.json()[0]["weight"], 3, "{listed:?}");

    // A client reads neither the control keys of servers nor status keys. A server reads them, and writes only its status.
    for user in ["client", "server"] {
        let key = format!("/gRPC.control/{SERVICE}/");
        denied(&etcd, user, &["weight", SERVICE, &address, "5"], &key).await;
    }
    drop(stop);
    serving.await.unwrap();
}

#[tokio::test]
async fn an_operator_writes_the_service_config_and_clients_may_only_read_it() {
    let etcd = etcd().await;
    protect(&etcd).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    std::fs::write(&file, r#"{"methodConfig":[{"name":[{}],"timeout":"1s"}]}"#).unwrap();
    let file = file.to_str().unwrap();
    let key = format!("/gRPC.control/{SERVICE}/config");
    let set = &["config", "set", SERVICE, file];
    denied(&etcd, "client", set, &format!("write {key:?}")).await;
    let written = run_as(&etcd, "operator", set).await;
    assert_eq!(written.code, Some(0), "{written:?}");
    for user in ["client", "operator"] {
        let read = run_as(&etcd, user, &["config", "get", SERVICE]).await;
        assert_eq!(read.code, Some(0), "{user}: {read:?}");
    }
    let rm = &["config", "rm", SERVICE];
    denied(&etcd, "client", rm, &format!("delete {key:?}")).await;
    // A server has no permission for the key.
    denied(&etcd, "server", &["config", "get", SERVICE], &key).await;
    let removed = run_as(&etcd, "operator", rm).await;
    assert_eq!(removed.code, Some(0), "{removed:?}");
}

#[tokio::test]
async fn without_a_permission_each_command_says_what_is_missing() {
    let etcd = etcd().await;
    protect(&etcd).await;
    let keys = format!("/gRPC/{SERVICE}/");
    denied(&etcd, "nobody", &["ls", SERVICE], &keys).await;
    denied(&etcd, "nobody", &["drain", SERVICE, "a"], &keys).await;
    denied(&etcd, "nobody", &["call", SERVICE, "Check"], &keys).await;
    denied(&etcd, "nobody", &["watch", SERVICE], &keys).await;
    // The list of all services needs the whole prefix.
    denied(&etcd, "client", &["services"], "/gRPC/").await;

    let diagnosed = run_as(&etcd, "nobody", &["doctor", SERVICE]).await;
    assert_eq!(diagnosed.code, Some(1), "{diagnosed:?}");
    assert!(
        diagnosed.stdout.contains("permission-denied"),
        "{diagnosed:?}"
    );
    assert!(diagnosed.stdout.contains("grant"), "{diagnosed:?}");

    let wrong = command(&etcd, &["ls", SERVICE]);
    let wrong = outcome(wrong).await;
    assert_eq!(wrong.code, Some(3), "{wrong:?}");
    assert!(wrong.stderr.contains("--user"), "{wrong:?}");
    let mut wrong = as_user(&etcd, "operator", &["ls", SERVICE]);
    wrong.env("ETCDCTL_PASSWORD", "wrong");
    let wrong = outcome(wrong).await;
    assert_eq!(wrong.code, Some(3), "{wrong:?}");
    assert!(wrong.stderr.contains("ETCDCTL_PASSWORD"), "{wrong:?}");
}

#[tokio::test]
async fn a_client_watches_and_a_sidecar_needs_the_role_of_a_server() {
    let etcd = etcd().await;
    protect(&etcd).await;
    let mut watch = as_user(&etcd, "client", &["watch", SERVICE])
        .spawn()
        .unwrap();
    let mut output = lines(&mut watch);
    let address = dead_address().await.to_string();
    let sidecar = |user: &str| {
        let ready = ["--ready-command", "true", "--", "sleep", "60"];
        let arguments = [&["register", address.as_str(), SERVICE][..], &ready].concat();
        as_user(&etcd, user, &arguments)
    };
    let mut registered = sidecar("server").spawn().unwrap();
    line_with(&mut output, &format!(" + {address} ")).await;
    signal(&registered, Signal::SIGTERM);
    line_with(&mut output, &format!(" - {address} ")).await;
    assert_eq!(code(&mut registered).await, Some(143));
    signal(&watch, Signal::SIGINT);
    assert_eq!(code(&mut watch).await, Some(0));

    let refused = outcome(sidecar("client")).await;
    assert_eq!(refused.code, Some(3), "{refused:?}");
    for text in ["permission denied", "grant", "--user"] {
        assert!(refused.stderr.contains(text), "{text}: {refused:?}");
    }
}
