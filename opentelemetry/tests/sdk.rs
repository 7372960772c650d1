//! The values that the SDK of OpenTelemetry exports.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

use std::time::Duration;

use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::data::{
    AggregatedMetrics, HistogramDataPoint, Metric, MetricData, ResourceMetrics, ScopeMetrics,
    SumDataPoint,
};
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use tonic::body::Body;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_balance::BalancedChannel;
use tonic_balance::metrics::{Kind, Metrics, Recorder, instruments};
use tonic_etcd_opentelemetry::OpenTelemetry;
use tower_service::Service;

/// Starts a server without services. It answers every call with `UNIMPLEMENTED`.
async fn server() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let routes = tonic::service::Routes::default();
    let serving = Server::builder().add_routes(routes);
    tokio::spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));
    address
}

async fn call(channel: &mut BalancedChannel) {
    let mut request = http::Request::new(Body::empty());
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = "/helloworld.Greeter/SayHello".parse().unwrap();
    let service = "helloworld.Greeter";
    request
        .extensions_mut()
        .insert(tonic::GrpcMethod::new(service, "SayHello"));
    let outcome = tokio::time::timeout(Duration::from_secs(20), channel.call(request)).await;
    assert_eq!(
        outcome.unwrap().unwrap_err().code(),
        tonic::Code::Unimplemented
    );
}

fn find<'a>(exported: &'a [ResourceMetrics], name: &str) -> Option<&'a Metric> {
    let scopes = exported.last()?.scope_metrics();
    scopes
        .flat_map(ScopeMetrics::metrics)
        .find(|metric| metric.name() == name)
}

fn labels<'a>(attributes: impl Iterator<Item = &'a opentelemetry::KeyValue>) -> Vec<String> {
    let mut labels: Vec<_> = attributes
        .map(|label| format!("{}={}", label.key, label.value))
        .collect();
    labels.sort();
    labels
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sdk_exports_counters_histograms_and_gauges_with_labels_and_buckets() {
    let exporter = InMemoryMetricExporter::default();
    let reader = PeriodicReader::builder(exporter.clone()).build();
    let provider = SdkMeterProvider::builder().with_reader(reader).build();
    let recorder = OpenTelemetry::new(provider.meter("tonic-etcd"));
    let all = instruments().iter();
    let metrics = all.fold(Metrics::new(recorder), |metrics, one| {
        metrics.enable(one.name())
    });
    let mut channel = BalancedChannel::builder()
        .service("greeter")
        .metrics(metrics)
        .addresses([server().await])
        .connect()
        .await
        .unwrap();
    for _ in 0..3 {
        call(&mut channel).await;
    }
    provider.force_flush().unwrap();
    let finished = exporter.get_finished_metrics().unwrap();

    let started = find(&finished, "grpc.client.attempt.started").unwrap();
    assert_eq!(started.unit(), "{attempt}");
    let AggregatedMetrics::U64(MetricData::Sum(sum)) = started.data() else {
        panic!("{started:?}");
    };
    // With bound instruments, the SDK also exports values that were never recorded, in any order.
    let expected = [
        "grpc.method=helloworld.Greeter/SayHello",
        "grpc.target=greeter",
    ];
    let mut points = sum.data_points();
    let point = points.find(|point| labels(point.attributes()) == expected);
    assert_eq!(point.unwrap().value(), 3);

    let duration = find(&finished, "grpc.client.call.duration").unwrap();
    assert_eq!(duration.unit(), "s");
    let AggregatedMetrics::F64(MetricData::Histogram(histogram)) = duration.data() else {
        panic!("{duration:?}");
    };
    let status = "grpc.status=UNIMPLEMENTED".to_owned();
    let mut points = histogram.data_points();
    let point = points.find(|point| labels(point.attributes()).contains(&status));
    let point = point.unwrap();
    assert_eq!(point.count(), 3);
    assert_eq!(
        point.bounds().count(),
        41,
        "the buckets are those of gRFC A66"
    );

    let open = find(&finished, "grpc.subchannel.open_connections").unwrap();
    let AggregatedMetrics::I64(MetricData::Sum(sum)) = open.data() else {
        panic!("{open:?}");
    };
    assert_eq!(sum.data_points().next().unwrap().value(), 1);

    let endpoints = find(&finished, "tonic_etcd.lb.endpoints").unwrap();
    let AggregatedMetrics::F64(MetricData::Gauge(gauge)) = endpoints.data() else {
        panic!("{endpoints:?}");
    };
    let ready = ["grpc.target=greeter", "tonic_etcd.state=ready"];
    let mut points = gauge.data_points();
    let point = points.find(|point| labels(point.attributes()) == ready);
    assert!((point.unwrap().value() - 1.0).abs() < f64::EPSILON);
    drop(channel);
    provider.shutdown().unwrap();
}

/// Returns the number and the sum of the values of the histogram in the last export, and the value of the counter.
fn totals(exported: &[ResourceMetrics], histogram: &str, counter: &str) -> (u64, f64, u64) {
    let AggregatedMetrics::F64(MetricData::Histogram(values)) =
        find(exported, histogram).unwrap().data()
    else {
        panic!("{histogram} is no histogram");
    };
    let AggregatedMetrics::U64(MetricData::Sum(sum)) = find(exported, counter).unwrap().data()
    else {
        panic!("{counter} is no counter");
    };
    (
        values.data_points().map(HistogramDataPoint::count).sum(),
        values.data_points().map(HistogramDataPoint::sum).sum(),
        sum.data_points().map(SumDataPoint::value).sum(),
    )
}

#[test]
fn every_value_of_many_threads_is_exported_once_during_and_after_exports() {
    const THREADS: u32 = 8;
    const VALUES: u32 = 10_001;
    let exporter = InMemoryMetricExporter::default();
    let reader = PeriodicReader::builder(exporter.clone()).build();
    let provider = SdkMeterProvider::builder().with_reader(reader).build();
    let recorder = OpenTelemetry::new(provider.meter("tonic-etcd"));
    let of_kind = |kind| instruments().iter().find(|one| one.kind() == kind).unwrap();
    let (of_counter, of_histogram) = (of_kind(Kind::Counter), of_kind(Kind::Histogram));
    let counter = recorder.counter(of_counter, &[]).unwrap();
    let histogram = recorder.histogram(of_histogram, &[]).unwrap();

    counter.add(1);
    histogram.record(1.0);
    provider.force_flush().unwrap();
    let totals = || {
        let exports = exporter.get_finished_metrics().unwrap();
        totals(&exports, of_histogram.name(), of_counter.name())
    };
    assert_eq!(totals(), (1, 1.0, 1));

    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..VALUES {
                    counter.add(1);
                    histogram.record(1.0);
                }
            });
        }
        for _ in 0..20 {
            provider.force_flush().unwrap();
        }
    });
    provider.force_flush().unwrap();
    let all = u64::from(THREADS * VALUES) + 1;
    let sum = f64::from(THREADS * VALUES) + 1.0;
    assert_eq!(totals(), (all, sum, all));

    // The values of a channel that is dropped before the export are not lost.
    counter.add(1);
    histogram.record(1.0);
    drop((counter, histogram));
    provider.force_flush().unwrap();
    let (all, sum) = (all + 1, sum + 1.0);
    assert_eq!(totals(), (all, sum, all));
}
