//! A real Prometheus scrapes the example of the cluster, and answers the queries of the dashboard and of the alerts.
//!
//! `make operate` runs these tests. It installs Prometheus.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a failed step is a failed test"
)]

mod compose;

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

fn docs(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/docs")).join(path)
}

/// Returns a port that nothing listens on.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Sends a GET request and returns the body of the response.
async fn get(port: u16, path: &str) -> std::io::Result<String> {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    socket.read_to_string(&mut text).await?;
    Ok(text
        .split_once("\r\n\r\n")
        .map_or("", |(_, body)| body)
        .to_owned())
}

/// A Prometheus that scrapes ports of this host every second.
struct Prometheus {
    _process: Child,
    _folder: tempfile::TempDir,
    port: u16,
}

impl Prometheus {
    async fn start(targets: &[u16]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let alerts = docs("prometheus/alerts.yaml");
        let targets = targets.iter().map(|port| format!("'127.0.0.1:{port}'"));
        let targets = targets.collect::<Vec<_>>().join(", ");
        let configuration = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n  - job_name: greeter\n    static_configs: [{{targets: [{targets}]}}]\n",
            alerts.display()
        );
        let file = folder.path().join("prometheus.yaml");
        fs::write(&file, configuration).unwrap();
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.path().join("data").display()
            ))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("prometheus is installed");
        let started = Self {
            _process: process,
            _folder: folder,
            port,
        };
        let ready = async {
            while !get(port, "/-/ready")
                .await
                .is_ok_and(|text| text.contains("Ready"))
            {
                sleep(Duration::from_millis(100)).await;
            }
        };
        timeout(Duration::from_secs(30), ready)
            .await
            .expect("Prometheus is ready");
        started
    }

    /// Returns the samples of a query at a time, in seconds since 1970.
    async fn query(&self, expression: &str, time: f64) -> Vec<Value> {
        let encoded = utf8_percent_encode(expression, NON_ALPHANUMERIC);
        let path = format!("/api/v1/query?query={encoded}&time={time}");
        let answer: Value = serde_json::from_str(&get(self.port, &path).await.unwrap()).unwrap();
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        answer["data"]["result"].as_array().unwrap().clone()
    }
}

/// Returns the command for an example, which is built together with the tests.
fn example(name: &str) -> Command {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    folder.pop();
    Command::new(folder.join("examples").join(name))
}

fn now() -> f64 {
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

/// Returns the expressions of a dashboard, with the values of its variables.
fn expressions(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    let expression = |target: &Value| {
        let expression = target["expr"].as_str().unwrap();
        expression
            .replace("$job", ".*")
            .replace("$__rate_interval", "10s")
    };
    targets.map(expression).collect()
}

#[tokio::test]
async fn prometheus_scrapes_the_cluster_and_answers_each_query_of_the_dashboard() {
    let metrics = free_port();
    let prometheus = Prometheus::start(&[metrics]).await;
    let mut cluster = example("greeter_cluster");
    cluster.env_remove("ETCD_ENDPOINTS");
    cluster.args(["--metrics", &format!("127.0.0.1:{metrics}")]);
    let mut cluster = cluster
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    // While the cluster runs, the calls of the client are counted.
    let deadline = Instant::now() + LIMIT;
    let calls = "sum(rate(grpc_client_call_duration_seconds_count{grpc_status=\"OK\"}[10s])) > 10";
    while prometheus.query(calls, now()).await.is_empty() {
        assert!(Instant::now() < deadline, "the calls are not counted");
        sleep(STEP).await;
    }
    let dashboard = fs::read_to_string(docs("grafana/dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let expressions = expressions(&dashboard);
    assert!(expressions.len() > 10);
    for expression in expressions {
        // A rate needs two scrapes after the first request of its kind.
        while prometheus.query(&expression, now()).await.is_empty() {
            assert!(Instant::now() < deadline, "no samples: {expression}");
            sleep(STEP).await;
        }
    }
    let three = "sum(tonic_etcd_lb_endpoints{tonic_etcd_state=\"ready\"}) >= 3";
    while prometheus.query(three, now()).await.is_empty() {
        assert!(
            Instant::now() < deadline,
            "fewer than three endpoints are ready"
        );
        sleep(STEP).await;
    }
    // In a healthy cluster, no alert is active.
    let alerts: Value =
        serde_json::from_str(&get(prometheus.port, "/api/v1/alerts").await.unwrap()).unwrap();
    assert_eq!(alerts["data"]["alerts"], serde_json::json!([]), "{alerts}");
    let rules: Value =
        serde_json::from_str(&get(prometheus.port, "/api/v1/rules").await.unwrap()).unwrap();
    for rule in rules["data"]["groups"][0]["rules"].as_array().unwrap() {
        assert_eq!(rule["lastError"].as_str().unwrap_or(""), "", "{rule}");
    }
    let status = timeout(Duration::from_secs(60), cluster.wait())
        .await
        .unwrap();
    assert!(
        status.unwrap().success(),
        "the cluster must succeed with metrics"
    );
}

#[tokio::test]
async fn the_alerts_fire_for_synthetic_series() {
    let tests = docs("prometheus/alerts_test.yaml");
    let output = Command::new("promtool")
        .args(["test", "rules"])
        .arg(tests)
        .output();
    let output = output.await.expect("promtool is installed");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
}

/// The text of a link to a section, as GitHub derives it from the heading.
fn anchor(heading: &str) -> String {
    let letters = heading.trim_start_matches(['#', ' ']).chars();
    let kept = letters.filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn each_alert_links_to_a_section_that_exists() {
    let page = fs::read_to_string(docs("operations.md")).unwrap();
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchors: Vec<_> = headings.map(anchor).collect();
    let alerts = fs::read_to_string(docs("prometheus/alerts.yaml")).unwrap();
    let (mut alerts_seen, mut links) = (0, 0);
    for line in alerts.lines().map(str::trim) {
        alerts_seen += usize::from(line.starts_with("- alert:"));
        if let Some(link) = line.strip_prefix("runbook_url: ") {
            let page = concat!(
                env!("CARGO_PKG_REPOSITORY"),
                "/blob/main/docs/operations.md"
            );
            let (url, anchor) = link.split_once('#').unwrap();
            assert_eq!(url, page);
            assert!(anchors.iter().any(|known| known == anchor), "{link}");
            links += 1;
        }
    }
    assert_eq!(links, alerts_seen, "each alert needs a link");
}

/// Timeout for an event that should occur within seconds.
const LIMIT: Duration = Duration::from_secs(60);
/// The time between two queries.
const STEP: Duration = Duration::from_millis(200);
