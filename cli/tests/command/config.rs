//! `config`: the service config of a service.

use std::fs;

use tokio::time::timeout;

use super::support::{
    SERVICE, SOON, client, command, etcd, get, line_with, lines, outcome_of, run,
};

const KEY: &str = "/gRPC.control/helloworld.Greeter/config";

/// Writes a file, and returns its directory and its path.
fn file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

#[tokio::test]
async fn a_config_is_written_changed_and_deleted_and_each_change_is_shown() {
    let etcd = etcd().await;
    let client = client(&etcd).await;
    let missing = run(&etcd, &["config", "get", SERVICE]).await;
    assert_eq!(missing.code, Some(1), "{missing:?}");

    let (_folder, path) = file(r#"{"methodConfig":[{"name":[{}],"timeout":"1s"}]}"#);
    let dry = run(&etcd, &["config", "set", SERVICE, &path, "--dry-run"]).await;
    assert_eq!(dry.code, Some(0), "{dry:?}");
    assert_eq!(get(&client, KEY).await, None);
    let set = run(&etcd, &["config", "set", SERVICE, &path]).await;
    assert_eq!(set.code, Some(0), "{set:?}");
    assert!(set.stdout.contains(r#"+       "timeout": "1s""#), "{set:?}");
    assert!(set.stdout.contains("written, revision "), "{set:?}");

    let (_folder, path) = file(r#"{"methodConfig":[{"name":[{}],"timeout":"2s"}]}"#);
    let set = run(&etcd, &["config", "set", SERVICE, &path]).await;
    assert!(set.stdout.contains(r#"-       "timeout": "1s""#), "{set:?}");
    assert!(set.stdout.contains(r#"+       "timeout": "2s""#), "{set:?}");
    let again = run(&etcd, &["config", "set", SERVICE, &path]).await;
    assert!(again.stdout.contains("unchanged"), "{again:?}");

    let read = run(&etcd, &["config", "get", SERVICE, "--json"]).await;
    let read = &read.json()[0];
    assert_eq!(read["config"]["methodConfig"][0]["timeout"], "2s");
    let revision = read["revision"].to_string();
    for subcommand in [&["set", SERVICE, &path][..], &["rm", SERVICE]] {
        let arguments = [&["config"][..], subcommand, &["--revision", "1"]].concat();
        let conflict = run(&etcd, &arguments).await;
        assert_eq!(conflict.code, Some(6), "{conflict:?}");
    }
    let removed = run(&etcd, &["config", "rm", SERVICE, "--revision", &revision]).await;
    assert_eq!(removed.code, Some(0), "{removed:?}");
    assert_eq!(get(&client, KEY).await, None);
    let removed = run(&etcd, &["config", "rm", SERVICE]).await;
    assert_eq!(removed.code, Some(1), "{removed:?}");
}

/// The output of the changes does not fit into the pipe, so the command waits between its read and its write.
#[tokio::test]
async fn a_key_that_changes_between_the_read_and_the_write_is_a_conflict() {
    let etcd = etcd().await;
    let client = client(&etcd).await;
    let names: Vec<_> = (0..2_000)
        .map(|name| format!(r#"{{"service":"{name}"}}"#))
        .collect();
    let large = format!(r#"{{"methodConfig":[{{"name":[{}]}}]}}"#, names.join(","));
    let (_folder, path) = file(&large);
    for (subcommand, verb) in [
        (&["set", SERVICE, &path][..], "cannot write"),
        (&["rm", SERVICE], "cannot delete"),
    ] {
        let mut kv = client.kv_client();
        let before = if subcommand[0] == "rm" {
            large.as_str()
        } else {
            "{}"
        };
        kv.put(KEY, before, None).await.unwrap();
        let arguments = [&["config"][..], subcommand].concat();
        let mut command = command(&etcd, &arguments).spawn().unwrap();
        let mut output = lines(&mut command);
        line_with(&mut output, "{").await;
        kv.put(KEY, "{ }", None).await.unwrap();
        line_with(&mut output, r#""service": "1999""#).await;
        let end = async { while output.next_line().await.unwrap().is_some() {} };
        timeout(SOON, end).await.unwrap();
        let outcome = outcome_of(command).await;
        assert_eq!(outcome.code, Some(6), "{outcome:?}");
        assert!(outcome.stderr.contains(verb), "{outcome:?}");
        assert_eq!(get(&client, KEY).await.as_deref(), Some("{ }"));
    }
}

#[tokio::test]
async fn a_config_that_clients_would_reject_is_not_written() {
    let etcd = etcd().await;
    let client = client(&etcd).await;
    let (_folder, path) = file(r#"{"methodConfig":[{"name":[{}],"timeout":5}]}"#);
    for subcommand in ["set", "check"] {
        let rejected = run(&etcd, &["config", subcommand, SERVICE, &path]).await;
        assert_eq!(rejected.code, Some(1), "{rejected:?}");
        let reason = "methodConfig[0].timeout: expected a duration";
        assert!(rejected.stderr.contains(reason), "{rejected:?}");
    }
    assert_eq!(get(&client, KEY).await, None);

    let mut kv = client.kv_client();
    kv.put(KEY, "\u{1b}[2J{", None).await.unwrap();
    let bad = run(&etcd, &["config", "check", SERVICE]).await;
    assert_eq!(bad.code, Some(1), "{bad:?}");
    let bad = run(&etcd, &["config", "get", SERVICE]).await;
    assert_eq!(bad.code, Some(1), "{bad:?}");
    assert!(bad.stdout.contains("\\u{1b}[2J{"), "{bad:?}");
    let hidden = "{\"healthCheckConfig\":{\"serviceName\":\"a\u{200d}\u{9b}31m\u{7f}\u{e0041}\"}}";
    kv.put(KEY, hidden, None).await.unwrap();
    let good = run(&etcd, &["config", "check", SERVICE]).await;
    assert_eq!(good.code, Some(0), "{good:?}");
    // The output can be edited and written again, and cannot control the terminal.
    let expected: serde_json::Value = serde_json::from_str(hidden).unwrap();
    let read = run(&etcd, &["config", "get", SERVICE]).await;
    let shown: serde_json::Value = serde_json::from_str(&read.stdout).unwrap();
    assert_eq!(shown, expected);
    let json = run(&etcd, &["--json", "config", "get", SERVICE]).await;
    assert_eq!(json.json()[0]["config"], expected);
    for output in [read.stdout, json.stdout] {
        assert!(
            output.contains("a\\u200d\\u009b31m\\u007f\\udb40\\udc41"),
            "{output}"
        );
        assert!(output.is_ascii(), "{output}");
    }
    let usage = run(&etcd, &["config", "get", "a/b"]).await;
    assert_eq!(usage.code, Some(2), "{usage:?}");
}
