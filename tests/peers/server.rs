//! grpc-go's interop client against the registered test service on tonic.

use tokio::process::Command;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tonic_etcd::ServeRegistered;
use tonic_etcd::testing::Etcd;

use crate::process::launcher;
use crate::servers::Options;
use crate::service::router;
use crate::support::tls::Localhost;
use crate::support::{SOON, etcd, eventually, registry};

const CASES: [&str; 16] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "status_code_and_message",
    "special_status_message",
    "custom_metadata",
    "unimplemented_method",
    "unimplemented_service",
    "rpc_soak",
    "channel_soak",
];

async fn every_case(etcd: &Etcd, tls: Option<&Localhost>) {
    let Some(client) = launcher("grpc-go", "grpc-go-client") else {
        return;
    };
    let registry = registry(etcd).await;
    let service = format!("interop-{}", tls.is_some());
    let options = Options {
        tls,
        ..Options::default()
    };
    let registration = registry.registration(&service);
    let (stop, stopped) = oneshot::channel::<()>();
    let address = "127.0.0.1:0".parse().unwrap();
    let serving = router(options).serve_registered_with_shutdown(address, registration, async {
        let _ = stopped.await;
    });
    let server = tokio::spawn(serving);
    let resolver = registry.resolver(&service).start();
    eventually("the server is registered", async || {
        resolver.instances().len() == 1
    })
    .await;
    let port = resolver.instances()[0].address().port().unwrap();
    let mut failed = Vec::new();
    for case in CASES {
        let mut command = Command::new(&client);
        command
            .arg("-server_host=localhost")
            .arg(format!("-server_port={port}"));
        command.arg(format!("-test_case={case}"));
        if case.ends_with("_soak") {
            command.args(["-soak_iterations=20", "-soak_overall_timeout_seconds=20"]);
        }
        if let Some(localhost) = tls {
            let [_, _, ca] = localhost.files();
            command.args(["-use_tls", "-use_test_ca"]);
            command.arg(format!("-ca_file={}", ca.display()));
        }
        let output = timeout(SOON * 2, command.kill_on_drop(true).output()).await;
        let output = output.expect("the case must end").unwrap();
        if !output.status.success() {
            let logged = String::from_utf8_lossy(&output.stderr).into_owned();
            failed.push(format!("{case}: {logged}"));
        }
    }
    println!(
        "TLS {}: {} cases, {} failed",
        tls.is_some(),
        CASES.len(),
        failed.len()
    );
    assert!(failed.is_empty(), "{failed:#?}");
    drop(stop);
    let ended = timeout(SOON, server).await;
    ended.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_interop_case_of_the_grpc_go_client_passes() {
    let etcd = etcd().await;
    every_case(&etcd, None).await;
    every_case(&etcd, Some(&Localhost::new())).await;
}
