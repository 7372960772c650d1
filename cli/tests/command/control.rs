//! `drain`, `resume` and `weight`, with a server that follows the contract of the control key.

use etcd_client::Client;
use serde_json::{Value, json};

use super::support::{
    SERVICE, client, code, command, dead_address, delete, etcd, eventually, get, line_with, lines,
    put, run, value,
};

/// Returns the control key's value and mod revision, once the state in it is `state`.
async fn control(client: &Client, id: &str, state: &str) -> (Value, i64) {
    let key = format!("/gRPC.control/{SERVICE}/instances/{id}");
    let mut found = None;
    eventually("the control key is written", async || {
        let read = client.kv_client().get(key.as_str(), None).await.unwrap();
        found = read.kvs().first().map(|kv| {
            let value: Value = serde_json::from_slice(kv.value()).unwrap();
            (value, kv.mod_revision())
        });
        found
            .as_ref()
            .is_some_and(|(value, _)| value["state"] == state)
    })
    .await;
    found.unwrap()
}

async fn write_status(client: &Client, id: &str, status: Value) {
    let key = format!("/gRPC.control/{SERVICE}/status/{id}");
    let mut kv = client.kv_client();
    kv.put(key, status.to_string(), None).await.unwrap();
}

#[tokio::test]
async fn a_server_is_drained_and_resumed() {
    let etcd = etcd().await;
    let client = client(&etcd).await;
    let address = dead_address().await.to_string();
    let key = put(&client, "alpha", &value(address.parse().unwrap())).await;

    // The instance is named by its address. The command waits until the server has no calls.
    let mut drain = command(&etcd, &["drain", SERVICE, &address])
        .spawn()
        .unwrap();
    let mut output = lines(&mut drain);
    let (written, revision) = control(&client, "alpha", "draining").await;
    assert_eq!(written["sticky"], false);
    let status = |state: &str, applied: i64, connections: u64| json!({"state": state, "weight": 1, "address": address, "applied": applied, "connections": connections});
    write_status(&client, "alpha", status("draining", revision, 2)).await;
    line_with(&mut output, "open connections: 2").await;
    delete(&client, &key).await;
    write_status(&client, "alpha", status("paused", revision, 0)).await;
    line_with(&mut output, "done (paused)").await;
    assert_eq!(code(&mut drain).await, Some(0));

    // The server has no instance key now. It is still listed, and found by its id.
    let listed = run(&etcd, &["ls", SERVICE]).await;
    assert_eq!(listed.code, Some(0), "{listed:?}");
    assert!(
        listed.stdout.contains("paused (0 connections)"),
        "{listed:?}"
    );
    let mut resume = command(&etcd, &["resume", SERVICE, "alpha"])
        .spawn()
        .unwrap();
    let (_, revision) = control(&client, "alpha", "serving").await;
    write_status(&client, "alpha", status("serving", revision, 0)).await;
    assert_eq!(code(&mut resume).await, Some(0));
}

#[tokio::test]
async fn a_weight_is_written_and_the_state_is_kept() {
    let etcd = etcd().await;
    let client = client(&etcd).await;
    let key = put(&client, "alpha", &value(dead_address().await)).await;
    let control_key = format!("/gRPC.control/{SERVICE}/instances/alpha");

    let no_wait = run(&etcd, &["drain", "--pause", "--no-wait", SERVICE, "alpha"]).await;
    assert_eq!(no_wait.code, Some(0), "{no_wait:?}");
    let unconfirmed = run(&etcd, &["weight", "--wait", "300ms", SERVICE, &key, "5"]).await;
    assert_eq!(unconfirmed.code, Some(4), "{unconfirmed:?}");
    let written: Value = serde_json::from_str(&get(&client, &control_key).await.unwrap()).unwrap();
    assert_eq!(
        written,
        json!({"state": "paused", "weight": 5, "sticky": false})
    );

    // A server that cannot use the value reports the reason.
    let mut weight = command(&etcd, &["weight", SERVICE, "alpha", "9"])
        .spawn()
        .unwrap();
    write_status(
        &client,
        "alpha",
        json!({"state": "serving", "applied": i64::MAX, "error": "no\u{7} weights here"}),
    )
    .await;
    assert_eq!(code(&mut weight).await, Some(1));
}
