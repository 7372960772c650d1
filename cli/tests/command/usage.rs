//! Options, exit codes and errors.

use super::support::{SERVICE, bare, client, dead_address, etcd, outcome, run};

#[tokio::test]
async fn an_unreachable_etcd_is_one_line_and_exit_code_3() {
    let address = dead_address().await.to_string();
    let failed = outcome(bare(&["--endpoints", &address, "ls", SERVICE])).await;
    assert_eq!(failed.code, Some(3), "{failed:?}");
    assert_eq!(failed.stderr.lines().count(), 1, "{failed:?}");
    assert!(failed.stderr.contains(&address), "{failed:?}");
}

#[tokio::test]
async fn wrong_arguments_have_exit_code_2() {
    for arguments in [
        &["--timeout", "0s", "services"][..],
        &["--format", "nonsense", "services"],
        &["--endpoints", "http://", "services"],
        &["--cert", "x", "services"],
        &["weight", SERVICE, "a", "0"],
        // Without TLS, the name has no effect.
        &["ls", SERVICE, "--check", "--server-name", "a"],
        &["doctor", "--server-name", "a"],
        &["watch", SERVICE, "--check", "--server-name", "a"],
        &["call", SERVICE, "Check", "--server-name", "a"],
        &["ls", SERVICE, "--server-tls", "--server-cacert", "a"],
        &["nonsense"],
    ] {
        let failed = outcome(bare(arguments)).await;
        assert_eq!(failed.code, Some(2), "{arguments:?}: {failed:?}");
    }
}

#[tokio::test]
async fn an_unknown_service_or_instance_has_exit_code_1() {
    let etcd = etcd().await;
    for arguments in [&["services"][..], &["ls", "x"], &["drain", "x", "y"]] {
        let failed = run(&etcd, arguments).await;
        assert_eq!(failed.code, Some(1), "{arguments:?}: {failed:?}");
        assert_eq!(failed.stderr.lines().count(), 1, "{failed:?}");
    }
}

#[tokio::test]
async fn a_password_is_used_and_never_printed() {
    let etcd = etcd().await;
    let mut root = client(&etcd).await;
    root.role_add("root").await.unwrap();
    root.user_add("root", "hunter2", None).await.unwrap();
    root.user_grant_role("root", "root").await.unwrap();
    root.auth_enable().await.unwrap();

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    std::fs::write(&file, "hunter2\n").unwrap();
    let file = file.to_str().unwrap();
    let mut accepted = super::support::command(&etcd, &["doctor", "--user", "root"]);
    accepted.env("ETCDCTL_PASSWORD", "hunter2");
    let from_file = super::support::command(
        &etcd,
        &["doctor", "--user", "root", "--password-file", file],
    );
    let mut inline = super::support::command(&etcd, &["doctor"]);
    inline.env("ETCDCTL_USER", "root:hunter2");
    for command in [accepted, from_file, inline] {
        let found = outcome(command).await;
        // The only finding is that nothing is registered.
        assert_eq!(found.code, Some(1), "{found:?}");
        assert!(found.stdout.contains("not-registered"), "{found:?}");
        assert!(!format!("{found:?}").contains("hunter2"), "{found:?}");
    }
    let mut refused = super::support::command(&etcd, &["ls", SERVICE, "--user", "root"]);
    refused.env("ETCDCTL_PASSWORD", "wrong-one");
    let refused = outcome(refused).await;
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert!(refused.stderr.contains("--user"), "{refused:?}");
    assert!(!refused.stderr.contains("wrong-one"), "{refused:?}");
    let help = outcome({
        let mut help = bare(&["--help"]);
        help.env("ETCDCTL_USER", "root:hunter2");
        help
    });
    assert!(!help.await.stdout.contains("hunter2"));
}
