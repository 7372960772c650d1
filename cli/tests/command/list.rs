//! `services` and `ls`.

use std::time::Duration;

use tonic_etcd::Registry;

use super::support::{SERVICE, dead_address, etcd, grpc_server, put, register, run};

#[tokio::test]
async fn services_and_ls_list_what_is_registered() {
    let etcd = etcd().await;
    let client = super::support::client(&etcd).await;
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let _registration = registry
        .registration(SERVICE)
        .address("10.0.0.5:50051")
        .weight(3)
        .zone("eu-1a")
        .version("1.2.0")
        .ttl(Duration::from_secs(30))
        .register()
        .await
        .unwrap();

    let services = run(&etcd, &["services"]).await;
    assert_eq!(services.code, Some(0), "{services:?}");
    let row: Vec<_> = services
        .stdout
        .lines()
        .nth(1)
        .unwrap()
        .split_whitespace()
        .collect();
    assert_eq!(row, [SERVICE, "1"]);

    let listed = run(&etcd, &["ls", SERVICE]).await;
    assert_eq!(listed.code, Some(0), "{listed:?}");
    let row = listed.stdout.lines().nth(1).unwrap();
    for cell in [
        "10.0.0.5:50051",
        "registered",
        "1.2.0",
        "eu-1a",
        "/30 s",
        "EtcdNaming",
    ] {
        assert!(row.contains(cell), "{cell}: {row}");
    }

    let json = run(&etcd, &["--json", "ls", SERVICE]).await.json();
    assert_eq!(json[0]["address"], "10.0.0.5:50051");
    assert_eq!(json[0]["weight"], 3);
    assert_eq!(json[0]["ttl"], 30);

    // A value that cannot be read is listed with its reason. Its key could otherwise control the terminal.
    put(&client, "\u{1b}[2J", r#"{"a":1}"#).await;
    let listed = run(&etcd, &["ls", SERVICE]).await;
    assert_eq!(listed.code, Some(1), "{listed:?}");
    assert!(
        listed.stdout.contains("JSON without an address"),
        "{listed:?}"
    );
    assert!(!listed.stdout.contains('\u{1b}'), "{listed:?}");
    assert!(listed.stdout.contains("\\u{1b}[2J"), "{listed:?}");
}

#[tokio::test]
async fn ls_check_dials_each_server() {
    let etcd = etcd().await;
    let (alive, dead) = (grpc_server().await, dead_address().await);
    let _alive = register(&etcd, alive).await;
    let listed = run(&etcd, &["ls", SERVICE, "--check"]).await;
    assert_eq!(listed.code, Some(0), "{listed:?}");
    assert!(listed.stdout.contains("serving ("), "{listed:?}");

    let _dead = register(&etcd, dead).await;
    let listed = run(&etcd, &["--json", "ls", SERVICE, "--check"]).await;
    assert_eq!(listed.code, Some(1), "{listed:?}");
    for row in listed.json() {
        let is_alive = row["address"] == alive.to_string();
        assert_eq!(row["ready"], is_alive, "{row}");
    }
}
