//! `doctor`: a healthy cluster has no finding, and each of twelve faults has one.

use std::net::SocketAddr;

use etcd_client::{AlarmAction, AlarmType, Client, Permission, PermissionType, PutOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic_etcd::testing::Etcd;

use super::authority::Authority;
use super::support::{
    Outcome, SERVICE, builder, client, command, dead_address, delete, etcd, eventually,
    grpc_server, outcome, put, register, run, value,
};

/// Returns the names and the subjects of the findings.
fn findings(outcome: &Outcome) -> Vec<(String, String)> {
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let lines = outcome.json();
    let found: Vec<_> = lines
        .iter()
        .filter(|line| line["finding"].is_string())
        .map(|line| {
            assert!(!text(&line["advice"]).is_empty(), "{line}");
            (text(&line["finding"]), text(&line["subject"]))
        })
        .collect();
    let code = i32::from(!found.is_empty());
    assert_eq!(outcome.code, Some(code), "{outcome:?}");
    found
}

/// Asserts that `doctor` has exactly one finding, whose subject contains a text.
async fn finds(etcd: &Etcd, options: &[&str], name: &str, subject: &str) {
    let arguments = [&["--json", "--timeout", "3s", "doctor", SERVICE], options].concat();
    let found = run(etcd, &arguments).await;
    let list = findings(&found);
    let [(found_name, found_subject)] = &list[..] else {
        panic!("expected only {name}: {found:?}");
    };
    assert_eq!(found_name, name, "{found:?}");
    assert!(found_subject.contains(subject), "{subject}: {found:?}");
}

async fn finds_nothing(etcd: &Etcd) {
    let found = run(etcd, &["--json", "doctor"]).await;
    assert_eq!(findings(&found), [], "{found:?}");
}

/// Seeds an instance, checks the finding, and removes the instance.
async fn finds_instance(
    (etcd, client): (&Etcd, &Client),
    (id, value): (&str, &str),
    options: &[&str],
    name: &str,
) {
    let key = put(client, id, value).await;
    finds(etcd, options, name, id).await;
    delete(client, &key).await;
}

#[tokio::test]
async fn a_healthy_cluster_has_no_finding_and_each_seeded_fault_is_found() {
    let etcd = etcd().await;
    let client = client(&etcd).await;
    let alive = grpc_server().await;
    let _registration = register(&etcd, alive).await;
    let seeded = (&etcd, &client);
    finds_nothing(&etcd).await;
    let text = run(&etcd, &["doctor", SERVICE]).await;
    assert!(text.stdout.contains("no findings"), "{text:?}");
    assert!(text.stdout.contains("1 of 1 instances respond"), "{text:?}");

    // 1. The service exists under another prefix.
    finds(&etcd, &["--prefix", "/prod/"], "wrong-prefix", SERVICE).await;

    // 2. A key without a lease.
    let other = grpc_server().await;
    let without_lease = format!("/gRPC/{SERVICE}/manual");
    let mut kv = client.kv_client();
    kv.put(without_lease.as_str(), value(other), None)
        .await
        .unwrap();
    finds(&etcd, &[], "no-lease", "manual").await;
    delete(&client, &without_lease).await;

    // 3. Two keys with one address.
    let duplicate = put(&client, "twice", &value(alive)).await;
    finds(&etcd, &[], "duplicate-address", &alive.to_string()).await;
    delete(&client, &duplicate).await;

    // 4. A loopback address among others, or seen from another host.
    let remote = put(&client, "remote", r#"{"Op":0,"Addr":"192.0.2.1:80"}"#).await;
    finds(
        &etcd,
        &["--no-dial"],
        "loopback-address",
        &alive.to_string(),
    )
    .await;
    delete(&client, &remote).await;
    finds(
        &etcd,
        &["--remote-clients"],
        "loopback-address",
        &alive.to_string(),
    )
    .await;

    // 5. A value that cannot be read.
    finds_instance(seeded, ("strange", r#"{"a":1}"#), &[], "unreadable-value").await;

    // 6. A dead server, 7. an HTTP/1 server, 8. a TLS server.
    let dead = value(dead_address().await);
    finds_instance(seeded, ("dead", &dead), &[], "server-dead").await;
    let http1 = value(http1_server().await);
    finds_instance(seeded, ("http1", &http1), &[], "not-grpc").await;
    let authority = Authority::new();
    authority.sign("server", "localhost");
    let tls = tls_server(&authority).await;
    finds_instance(seeded, ("tls", &value(tls)), &[], "tls-mismatch").await;

    // With the CA, the same server is healthy, and the plaintext server has the finding.
    let key = put(&client, "tls", &value(tls)).await;
    let ca = authority.path("ca.pem");
    let with_ca = ["--server-cacert", ca.to_str().unwrap()];
    finds(&etcd, &with_ca, "tls-mismatch", &alive.to_string()).await;
    delete(&client, &key).await;

    // 9. A lease that is not renewed.
    let lease = client.lease_client().grant(8, None).await.unwrap().id();
    let expiring = format!("/gRPC/{SERVICE}/expiring");
    let options = PutOptions::new().with_lease(lease);
    kv.put(expiring.as_str(), value(other), Some(options))
        .await
        .unwrap();
    eventually("the expiring lease is found", async || {
        let found = run(&etcd, &["--json", "doctor", SERVICE]).await;
        let names: Vec<_> = findings(&found).into_iter().map(|(name, _)| name).collect();
        assert!(names.is_empty() || names == ["lease-expiring"], "{found:?}");
        !names.is_empty()
    })
    .await;
    delete(&client, &expiring).await;

    // 10. The alarm NOSPACE.
    let mut maintenance = client.maintenance_client();
    maintenance
        .alarm(AlarmAction::Activate, AlarmType::Nospace, None)
        .await
        .unwrap();
    finds(&etcd, &[], "alarm-nospace", "").await;
    maintenance
        .alarm(AlarmAction::Deactivate, AlarmType::Nospace, None)
        .await
        .unwrap();
    finds_nothing(&etcd).await;
}

#[tokio::test]
async fn a_missing_permission_is_found() {
    let etcd = etcd().await;
    let _registration = register(&etcd, grpc_server().await).await;
    let mut root = client(&etcd).await;
    for (user, role) in [("root", "root"), ("reader", "reader"), ("other", "other")] {
        root.user_add(user, "secret", None).await.unwrap();
        root.role_add(role).await.unwrap();
        root.user_grant_role(user, role).await.unwrap();
    }
    let own = Permission::new(PermissionType::Read, format!("/gRPC/{SERVICE}/")).with_prefix();
    root.role_grant_permission("reader", own).await.unwrap();
    root.auth_enable().await.unwrap();
    let doctor = async |user: &str| {
        let mut command = command(&etcd, &["--json", "doctor", SERVICE, "--user", user]);
        command.env("ETCDCTL_PASSWORD", "secret");
        findings(&outcome(command).await)
    };
    assert_eq!(doctor("reader").await, []);
    let denied = doctor("other").await;
    assert_eq!(denied.len(), 1, "{denied:?}");
    assert_eq!(denied[0].0, "permission-denied");
    let mut anonymous = command(&etcd, &["doctor", SERVICE]);
    anonymous.env_remove("ETCDCTL_USER");
    let anonymous = outcome(anonymous).await;
    assert_eq!(anonymous.code, Some(3), "{anonymous:?}");
    assert!(
        anonymous.stdout.contains("etcd-unreachable"),
        "{anonymous:?}"
    );
}

#[tokio::test]
async fn a_member_that_is_down_is_found() {
    let mut etcd = builder().members(3).start().await.unwrap();
    let _registration = register(&etcd, grpc_server().await).await;
    finds_nothing(&etcd).await;
    etcd.kill(1).await.unwrap();
    // The election of a new leader may take a moment.
    eventually("a majority has a leader", async || {
        etcd.leader().await.is_some()
    })
    .await;
    let down = etcd.endpoint(1).unwrap();
    finds(&etcd, &[], "member-down", &down).await;
}

/// Starts a server that answers like an HTTP/1 server to a client of HTTP/2.
async fn http1_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut request = [0; 33];
            let _ = socket.read_exact(&mut request).await;
            let answer = b"HTTP/1.1 505 HTTP Version Not Supported\r\ncontent-length: 0\r\n\r\n";
            let _ = socket.write_all(answer).await;
        }
    });
    address
}

/// Starts a gRPC server that requires TLS.
async fn tls_server(authority: &Authority) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let identity = Identity::from_pem(authority.read("server.pem"), authority.read("server.key"));
    let (_, health) = tonic_health::server::health_reporter();
    let router = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))
        .unwrap()
        .add_service(health);
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}
