//! Load reports of servers on bare `h2`, which the tests control.

use http::HeaderValue;
use prost::Message;
use tokio::time::Instant;
use tonic::metadata::{Binary, MetadataValue};

use super::support::{Cut, EMPTY_MESSAGE, PATIENCE, ok};
use super::*;
use crate::channel::{ChannelBuilder, LoadReports, PickInfo, PickPolicy, ReadyEndpoints};
use crate::load_report::{OrcaLoadReport, REQUESTS_IN_FLIGHT, TRAILER};

fn encoded(report: &OrcaLoadReport) -> HeaderValue {
    let value = MetadataValue::<Binary>::from_bytes(&report.encode_to_vec());
    HeaderValue::from_bytes(value.as_encoded_bytes()).expect("a value")
}

/// Returns the report of a server that serves 100 calls per second.
fn utilization(utilization: f64) -> HeaderValue {
    encoded(&OrcaLoadReport {
        application_utilization: utilization,
        rps_fractional: 100.0,
        ..OrcaLoadReport::default()
    })
}

fn in_flight(calls: f64) -> HeaderValue {
    let named = (REQUESTS_IN_FLIGHT.to_owned(), calls);
    encoded(&OrcaLoadReport {
        named_metrics: BTreeMap::from([named]),
        ..OrcaLoadReport::default()
    })
}

/// Starts a server whose responses have these values in the trailer of the reports.
fn reporting(values: Vec<HeaderValue>) -> Cut {
    Raw::answering(
        |_| {},
        move |(request, mut respond)| {
            let values = values.clone();
            async move {
                let mut body = request.into_body();
                while let Some(Ok(data)) = body.data().await {
                    let _ = body.flow_control().release_capacity(data.len());
                }
                let Ok(mut stream) = respond.send_response(grpc_head(), false) else {
                    return;
                };
                let _ = stream.send_data(Bytes::from_static(EMPTY_MESSAGE), false);
                let mut trailers = ok();
                for value in values {
                    trailers.append(TRAILER, value);
                }
                let _ = stream.send_trailers(trailers);
            }
        },
    )
}

fn reads() -> ChannelBuilder {
    BalancedChannel::builder().load_reports(LoadReports::new())
}

#[tokio::test]
async fn the_last_report_is_in_the_status_and_only_if_reports_are_read() {
    let server = reporting(vec![utilization(0.5)]);
    for (builder, expected) in [(reads(), Some(0.5)), (BalancedChannel::builder(), None)] {
        let channel = builder.addresses([server.address()]).connect_lazy();
        say(&channel).await.expect("a reply");
        let [endpoint] = <[_; 1]>::try_from(channel.endpoints()).expect("one endpoint");
        let report = endpoint.load_report.as_ref();
        let utilization = report.and_then(|report| report.utilization());
        assert_eq!(utilization, expected);
        let text = endpoint.to_string();
        assert_eq!(text.contains(", utilization 0.50"), expected.is_some());
    }
}

#[tokio::test]
async fn a_failed_call_without_messages_has_a_report_as_well() {
    let server = Raw::answering(
        |_| {},
        |(_, mut respond)| async move {
            let head = Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "5")
                .header(TRAILER, utilization(0.5));
            let _ = respond.send_response(head.body(()).expect("a head"), true);
        },
    );
    let channel = reads().addresses([server.address()]).connect_lazy();
    let error = say(&channel).await.expect_err("a failure");
    assert_eq!(error.code(), Code::NotFound);
    assert!(channel.endpoints()[0].load_report.is_some());
}

#[tokio::test]
async fn trailers_that_are_not_a_report_change_nothing() {
    let text = HeaderValue::from_static;
    for values in [
        vec![text("%")],
        vec![text("////")],
        vec![utilization(0.5), utilization(0.5)],
        vec![],
    ] {
        let server = reporting(values);
        let channel = reads().addresses([server.address()]).connect_lazy();
        say(&channel).await.expect("a reply");
        assert_eq!(channel.endpoints()[0].load_report, None);
    }
}

/// Picks the endpoint with the lowest utilization.
struct LeastUtilized;

impl PickPolicy for LeastUtilized {
    fn pick(&self, _: &PickInfo, endpoints: &ReadyEndpoints<'_>) -> Option<usize> {
        let utilization = |index| endpoints.get(index)?.load_report()?.utilization();
        let known = (0..endpoints.len()).map(|index| utilization(index).map(|one| (index, one)));
        // Without all reports, the channel's policy picks, so that each endpoint is called.
        let known: Vec<_> = known.collect::<Option<_>>()?;
        let least = known.into_iter().min_by(|a, b| a.1.total_cmp(&b.1));
        least.map(|(index, _)| index)
    }
}

/// Makes this many calls. Returns how many of them each endpoint has got.
async fn calls(channel: &BalancedChannel, calls: usize, servers: &[Cut; 2]) -> [u64; 2] {
    let counts = || {
        let endpoints = channel.endpoints();
        [0, 1].map(|index: usize| {
            let address = servers[index].address();
            let mut endpoints = endpoints.iter();
            let endpoint = endpoints.find(|endpoint| endpoint.address.as_str() == address);
            endpoint.expect("an endpoint").calls
        })
    };
    let before = counts();
    for _ in 0..calls {
        say(channel).await.expect("a reply");
    }
    let after = counts();
    [after[0] - before[0], after[1] - before[1]]
}

#[tokio::test]
async fn a_policy_of_the_program_sees_the_reports() {
    let servers = [0.8, 0.2].map(|load| reporting(vec![utilization(load)]));
    let builder = reads().pick_policy(LeastUtilized);
    let channel = builder
        .policy(LbPolicy::WeightedRoundRobin)
        .addresses(servers.iter().map(Cut::address))
        .connect_lazy();
    ready(&channel, 2).await;
    calls(&channel, 2, &servers).await;
    assert_eq!(calls(&channel, 20, &servers).await, [0, 20]);
}

/// Makes batches of 50 calls until the shares are those that are expected.
async fn until_shares(builder: ChannelBuilder, servers: &[Cut; 2], expected: [u64; 2]) {
    let channel = builder
        .addresses(servers.iter().map(Cut::address))
        .connect_lazy();
    ready(&channel, 2).await;
    let end = Instant::now() + PATIENCE;
    let mut shares = [0, 0];
    while shares != expected {
        assert!(Instant::now() < end, "{shares:?} instead of {expected:?}");
        shares = calls(&channel, 50, servers).await;
    }
}

fn soon() -> LoadReports {
    LoadReports::new()
        .blackout_period(Duration::ZERO)
        .weight_update_period(Duration::from_millis(100))
}

#[tokio::test]
async fn weighted_round_robin_follows_the_reported_utilization() {
    let servers = [0.2, 0.8].map(|load| reporting(vec![utilization(load)]));
    let builder = BalancedChannel::builder()
        .policy(LbPolicy::WeightedRoundRobin)
        .load_reports(soon());
    until_shares(builder, &servers, [40, 10]).await;
}

#[tokio::test]
async fn reported_weights_multiply_the_weights_of_the_source() {
    let servers = [0.2, 0.8].map(|load| reporting(vec![utilization(load)]));
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .policy(LbPolicy::WeightedRoundRobin)
        .load_reports(soon())
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    for (server, weight) in servers.iter().zip([1, 16]) {
        let attributes = Attributes::new().with_weight(weight);
        insert(&changes, &server.address(), attributes);
    }
    ready(&channel, 2).await;
    let end = Instant::now() + PATIENCE;
    while calls(&channel, 50, &servers).await != [10, 40] {
        assert!(Instant::now() < end, "the shares are not 1 to 4");
    }
}

#[cfg(feature = "service-config")]
#[tokio::test]
async fn a_service_config_enables_the_weights_of_weighted_round_robin_and_not_of_round_robin() {
    let servers = [0.2, 0.8].map(|load| reporting(vec![utilization(load)]));
    let config = r#"{"loadBalancingConfig": [{"weighted_round_robin": {"blackoutPeriod": "0s", "weightUpdatePeriod": "0.1s"}}]}"#;
    let builder = BalancedChannel::builder().service_config(config);
    until_shares(builder, &servers, [40, 10]).await;
    let config = r#"{"loadBalancingConfig": [{"round_robin": {}}]}"#;
    let channel = BalancedChannel::builder()
        .service_config(config)
        .addresses(servers.iter().map(Cut::address))
        .connect_lazy();
    ready(&channel, 2).await;
    assert_eq!(calls(&channel, 50, &servers).await, [25, 25]);
    let endpoints = channel.endpoints();
    assert!(endpoints.iter().all(|one| one.load_report.is_none()));
}

#[tokio::test]
async fn a_server_that_is_busy_with_calls_of_other_clients_gets_few_calls() {
    let servers = [100.0, 1.0].map(|calls| reporting(vec![in_flight(calls)]));
    let addresses = servers.iter().map(Cut::address);
    let channel = reads().addresses(addresses).connect_lazy();
    ready(&channel, 2).await;
    // Each server gets calls until it has reported its load.
    calls(&channel, 20, &servers).await;
    let [busy, other] = calls(&channel, 200, &servers).await;
    assert!(busy <= 20 && other >= 180, "{busy} and {other} calls");
}
