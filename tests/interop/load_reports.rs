//! Load reports from and to grpc-go, and the weights that grpc-go computes from ours.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_etcd::BalancedChannel;
use tonic_etcd::channel::LoadReports;
use tonic_etcd::orca::{LoadRecorder, ReportLoadLayer};

use crate::hello;
use crate::peer::go;
use crate::support::greeter::NamedGreeter;
use crate::support::greeter::greeter_client::GreeterClient;
use crate::support::greeter::greeter_server::GreeterServer;
use crate::support::utilization::{ReportingRouter, reporting_greeter};

/// Serves without a registration. Returns the address.
async fn serve(router: ReportingRouter) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = TcpIncoming::from(listener);
    let task = tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
    (address, task)
}

#[tokio::test]
async fn our_channel_reads_the_reports_of_a_go_server() {
    let Some(go) = go().await else { return };
    let server = go.reporting_server().await;
    let channel = BalancedChannel::builder()
        .load_reports(LoadReports::new())
        .addresses([server.address()])
        .connect_lazy();
    let mut client = GreeterClient::new(channel.clone());
    client.say_hello(hello("report")).await.unwrap();
    let report = channel.endpoints()[0].load_report.clone().unwrap();
    assert_eq!(report.application_utilization(), Some(0.42));
    assert_eq!(report.cpu_utilization(), Some(0.9));
    assert_eq!(report.memory_utilization(), Some(0.3));
    assert_eq!(report.requests_per_second(), Some(17.0));
    assert_eq!(report.errors_per_second(), Some(3.0));
    assert_eq!(report.requests_in_flight(), Some(5));
    assert_eq!(report.named_utilization("pool"), Some(0.5));
    assert_eq!(report.request_cost("rows"), Some(12.0));
}

#[tokio::test]
async fn a_go_client_reads_the_reports_of_our_server() {
    let Some(go) = go().await else { return };
    let recorder = LoadRecorder::new();
    recorder.set_application_utilization(0.75);
    recorder.set_named_metric("queue", 3.0);
    recorder.set_named_utilization("pool", 0.25);
    let greeter = GreeterServer::new(NamedGreeter("reporting".to_owned()));
    let router = Server::builder()
        .layer(ReportLoadLayer::new(recorder.clone()))
        .add_service(greeter)
        .add_service(recorder.service(Duration::from_millis(100)));
    let (address, serving) = serve(router).await;
    let printed = go
        .run(&["orca-client", "-address", &address.to_string()])
        .await;
    let lines: Vec<_> = printed.lines().collect();
    let out_of_band = "stream 0.75 0 3 0.25";
    assert_eq!(lines, ["call 0.75 1 3 0.25", out_of_band, out_of_band]);
    serving.abort();
}

#[tokio::test]
async fn grpc_gos_weighted_round_robin_follows_our_reports() {
    let Some(go) = go().await else { return };
    let (first, serving_first) = serve(reporting_greeter("first", 1_000.0)).await;
    let (second, serving_second) = serve(reporting_greeter("second", 4_000.0)).await;
    let addresses = format!("{first},{second}");
    for out_of_band in ["-oob=false", "-oob=true"] {
        let arguments = ["orca-balance", "-addresses", &addresses, out_of_band];
        let printed = go.run(&arguments).await;
        let words = printed.split_whitespace();
        let counts: Vec<u32> = words.filter_map(|word| word.parse().ok()).collect();
        let [first, second] = *counts else {
            panic!("{printed}")
        };
        assert!((15..=25).contains(&first), "{out_of_band}: {printed}");
        assert_eq!(first + second, 100, "{out_of_band}: {printed}");
    }
    serving_first.abort();
    serving_second.abort();
}
