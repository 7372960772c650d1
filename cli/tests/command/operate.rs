//! Servers of the library under load, which an operator drains and resumes with the command.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::Value;
use tokio::sync::oneshot;
use tonic::transport::Server;
use tonic_etcd::{BalancedChannel, Registry, ServeRegistered};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::support::{SERVICE, etcd, eventually, run};

/// Calls the channel until `stop` is true. Returns the number of calls and the errors.
async fn load(
    channel: BalancedChannel,
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicU64>,
) -> Vec<String> {
    let mut client = HealthClient::new(channel);
    let mut errors = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let service = String::new();
        if let Err(status) = client.check(HealthCheckRequest { service }).await {
            errors.push(status.to_string());
        }
        calls.fetch_add(1, Ordering::Relaxed);
    }
    errors
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_servers_under_load_are_drained_and_resumed_without_a_failed_call() {
    let etcd = etcd().await;
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let mut servers = Vec::new();
    for _ in 0..3 {
        let (_, health) = tonic_health::server::health_reporter();
        let registration = registry
            .registration(SERVICE)
            .operator_control("/gRPC.control/");
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(async move {
            Server::builder()
                .add_service(health)
                .serve_registered_with_shutdown(
                    "127.0.0.1:0".parse().unwrap(),
                    registration,
                    async { drop(stopped.await) },
                )
                .await
        });
        servers.push((stop, serving));
    }
    let channel = registry.channel(SERVICE).connect_lazy();
    eventually("three servers are known", async || {
        channel.endpoints().len() == 3
    })
    .await;
    let (stop, calls) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let callers: Vec<_> = (0..8)
        .map(|_| tokio::spawn(load(channel.clone(), Arc::clone(&stop), Arc::clone(&calls))))
        .collect();
    let mut addresses: Vec<_> = channel
        .endpoints()
        .into_iter()
        .map(|server| server.address)
        .collect();
    addresses.sort_by_key(ToString::to_string);
    for address in &addresses {
        let address = address.as_str();
        let drained = run(&etcd, &["drain", SERVICE, address]).await;
        assert_eq!(drained.code, Some(0), "{drained:?}");
        assert_eq!(
            listed(&run(&etcd, &["ls", SERVICE, "--json"]).await.json()),
            2
        );
        let before = calls.load(Ordering::Relaxed);
        eventually("the others serve calls", async || {
            calls.load(Ordering::Relaxed) > before + 100
        })
        .await;
        let resumed = run(&etcd, &["resume", SERVICE, address]).await;
        assert_eq!(resumed.code, Some(0), "{resumed:?}");
        eventually("the server is in use again", async || {
            let endpoints = channel.endpoints();
            let mut own = endpoints
                .iter()
                .filter(|server| server.address.as_str() == address);
            own.any(|server| server.connections > 0 && server.calls > 0)
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        assert_eq!(caller.await.unwrap(), Vec::<String>::new());
    }
    assert!(calls.load(Ordering::Relaxed) > 300);
    for (stop, serving) in servers {
        drop(stop);
        serving.await.unwrap().unwrap();
    }
}

/// Returns the number of servers with a key.
fn listed(lines: &[Value]) -> usize {
    let has_key = |line: &&Value| line["key"].as_str().is_some_and(|key| !key.is_empty());
    lines.iter().filter(has_key).count()
}
