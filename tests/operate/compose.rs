//! The files of the example for Docker Compose, and the programs that it scrapes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use tonic_etcd::testing::Etcd;

use super::{LIMIT, Prometheus, STEP, example, free_port, now};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/compose")
}

/// Runs a program. Returns `None` if it is missing or fails.
async fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder());
    let output = command.output().await.ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then_some(text)
}

#[tokio::test]
async fn promtool_accepts_the_configuration_of_prometheus() {
    let file = folder().join("prometheus.yaml");
    let output = Command::new("promtool")
        .args(["check", "config"])
        .arg(file)
        .output();
    let output = output.await.expect("promtool is installed");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 rule files found"), "{text}");
}

/// With Docker Compose, it checks the whole file. Otherwise, a parser for YAML checks the syntax, if Python has one.
#[tokio::test]
async fn the_compose_file_is_valid_and_mounts_files_that_exist() {
    let text = fs::read_to_string(folder().join("compose.yaml")).unwrap();
    let mounts = text.lines().filter_map(|line| {
        let mount = line.trim().strip_prefix("- ")?;
        let (source, _) = mount.strip_suffix(":ro")?.split_once(':')?;
        Some(folder().join(source))
    });
    let mounts: Vec<_> = mounts.collect();
    assert!(mounts.len() >= 5, "{mounts:?}");
    for mount in mounts {
        assert!(mount.exists(), "{}", mount.display());
    }
    if output_of("docker", &["compose", "version"]).await.is_some() {
        let valid = output_of("docker", &["compose", "config", "--quiet"]).await;
        assert!(valid.is_some(), "docker compose config rejects the file");
        return;
    }
    println!("LEFT OUT: `docker compose config`, because Docker Compose is missing");
    if output_of("python3", &["-c", "import yaml"]).await.is_none() {
        println!("LEFT OUT: the syntax of the files, because Python or its module yaml is missing");
        return;
    }
    for file in [
        "compose.yaml",
        "grafana/datasource.yaml",
        "grafana/dashboards.yaml",
    ] {
        let parse = "import sys, yaml; yaml.safe_load(open(sys.argv[1]))";
        let parsed = output_of("python3", &["-c", parse, file]).await;
        assert!(parsed.is_some(), "{file} is not valid YAML");
    }
}

fn program(name: &str, etcd: &Etcd, metrics: u16) -> Child {
    let mut command = example(name);
    command.env("ETCD_ENDPOINTS", etcd.endpoint(0).unwrap());
    command.args(["--metrics", &format!("127.0.0.1:{metrics}")]);
    command
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn prometheus_scrapes_the_example_server_and_the_example_client() {
    let (server, client) = (free_port(), free_port());
    let prometheus = Prometheus::start(&[server, client]).await;
    let etcd = Etcd::start().await.unwrap();
    let _server = program("greeter_server", &etcd, server);
    let _client = program("greeter_client", &etcd, client);
    let deadline = Instant::now() + LIMIT;
    for query in [
        "sum(up) == 2",
        "tonic_etcd_registration_registered{tonic_etcd_service=\"helloworld.Greeter\"} == 1",
        "sum(tonic_etcd_lb_endpoints{tonic_etcd_state=\"ready\"}) == 1",
        "sum(rate(grpc_client_call_duration_seconds_count{grpc_status=\"OK\"}[10s])) > 0.5",
    ] {
        while timeout(LIMIT, prometheus.query(query, now()))
            .await
            .unwrap()
            .is_empty()
        {
            assert!(Instant::now() < deadline, "no samples: {query}");
            sleep(STEP).await;
        }
    }
}
