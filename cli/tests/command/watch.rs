//! `watch`.

use nix::sys::signal::Signal;
use serde_json::Value;

use super::support::{
    SERVICE, code, command, dead_address, etcd, line_with, lines, register, signal,
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
    registration.deregister().await.unwrap();
    line_with(&mut output, &format!(" - {second} ")).await;
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
    registration.deregister().await.unwrap();
    line_with(&mut output, "leave").await;
}
