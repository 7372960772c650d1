//! Load reports of registered servers, and the calls that the servers get because of them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]
#![cfg(feature = "orca")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use support::greeter::greeter_client::GreeterClient;
use support::utilization::reporting_greeter;
use support::{Registered, SERVICE, SOON, all_ready, etcd, eventually, hello, registry};
use tokio::time::{Instant, interval, timeout};
use tonic::Request;
use tonic::transport::{Endpoint, Server};
use tonic_etcd::channel::{LoadReports, ServedBy};
use tonic_etcd::orca::LoadRecorder;
use tonic_etcd::{BalancedChannel, LbPolicy, Registry, ServeRegistered};

/// Starts a registered server that can serve this many calls per second.
fn serve(registry: &Registry, capacity: f64) -> Registered {
    let router = reporting_greeter("limited", capacity);
    let registration = registry.registration(SERVICE);
    let registration = registration.grace_period(Duration::from_millis(10));
    Registered::serve_with(|stopped| async move {
        let address = "127.0.0.1:0".parse().unwrap();
        router
            .serve_registered_with_shutdown(address, registration, stopped)
            .await
    })
}

/// Makes calls at a constant rate. Returns the number of calls that each server has served, from the smallest.
async fn calls(channel: &BalancedChannel, number: usize) -> Vec<u32> {
    let mut ticks = interval(Duration::from_millis(4));
    let mut shares = BTreeMap::new();
    for _ in 0..number {
        ticks.tick().await;
        let mut client = GreeterClient::new(channel.clone());
        let reply = timeout(SOON, client.say_hello(hello())).await.unwrap();
        let reply = reply.unwrap();
        let by: &ServedBy = reply.extensions().get().unwrap();
        *shares.entry(by.address().to_string()).or_default() += 1;
    }
    let mut shares: Vec<_> = shares.into_values().collect();
    shares.sort_unstable();
    shares
}

#[tokio::test]
async fn a_server_that_reports_a_high_utilization_gets_fewer_calls() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let servers = [100.0, 300.0].map(|capacity| serve(&registry, capacity));
    let reports = LoadReports::new()
        .blackout_period(Duration::ZERO)
        .weight_update_period(Duration::from_millis(200));
    let channel = registry
        .channel(SERVICE)
        .policy(LbPolicy::WeightedRoundRobin)
        .load_reports(reports);
    let channel = channel.connect_lazy();
    all_ready(&channel, 2).await;
    // About 250 calls per second overload the first server, unless it gets only its share.
    let mut shares = Vec::new();
    let end = Instant::now() + 2 * SOON;
    while !matches!(*shares, [few, many] if few > 0 && (22 * few..40 * few).contains(&(10 * many)))
    {
        assert!(Instant::now() < end, "{shares:?} instead of 1 to 3");
        shares = calls(&channel, 200).await;
    }
    println!("the servers have got {shares:?} calls");
    let reports = channel.endpoints().into_iter();
    for report in reports.map(|endpoint| endpoint.load_report.unwrap()) {
        let utilization = report.utilization().unwrap();
        assert!((0.2..2.0).contains(&utilization), "{utilization}");
    }
    for server in servers {
        server.stopped().await.unwrap();
    }
}

#[tokio::test]
async fn the_report_of_a_registered_server_is_in_the_status_of_its_clients() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let server = serve(&registry, 1_000.0);
    let channel = registry.channel(SERVICE).load_reports(LoadReports::new());
    let channel = channel.wait_for_ready(true).connect().await.unwrap();
    eventually("the rate of the calls is reported", async || {
        calls(&channel, 10).await;
        let report = channel.endpoints()[0].load_report.clone().unwrap();
        assert_eq!(report.requests_in_flight(), Some(1));
        assert!(report.application_utilization().is_some());
        assert_eq!(report.errors_per_second(), None);
        report
            .requests_per_second()
            .is_some_and(|rate| (1.0..1_000.0).contains(&rate))
    })
    .await;
    server.stopped().await.unwrap();
}

/// `xds.service.orca.v3.OrcaLoadReportRequest`, without fields.
#[derive(Clone, PartialEq, prost::Message)]
struct ReportRequest {}

/// `xds.data.orca.v3.OrcaLoadReport`, with one of its fields.
#[derive(Clone, PartialEq, prost::Message)]
struct Report {
    #[prost(double, tag = "9")]
    application_utilization: f64,
}

#[tokio::test]
async fn a_client_of_the_out_of_band_service_receives_reports_without_calls() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let recorder = LoadRecorder::new();
    recorder.set_application_utilization(0.25);
    let router = Server::builder().add_service(recorder.service(Duration::from_millis(100)));
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let serving = tokio::spawn(router.serve_with_incoming(incoming));
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut client = tonic::client::Grpc::new(endpoint.connect().await.unwrap());
    client.ready().await.unwrap();
    let path = "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics";
    let codec = tonic_prost::ProstCodec::<ReportRequest, Report>::default();
    let request = Request::new(ReportRequest {});
    let stream = client.server_streaming(request, path.parse().unwrap(), codec);
    let mut reports = stream.await.unwrap().into_inner();
    let mut next = async || {
        let report = timeout(SOON, reports.message()).await.unwrap();
        report.unwrap().unwrap().application_utilization
    };
    assert!((next().await - 0.25).abs() < f64::EPSILON);
    recorder.set_application_utilization(0.5);
    assert!((next().await - 0.5).abs() < f64::EPSILON);
    serving.abort();
}
