//! The spans that the SDK of OpenTelemetry exports, and the context that a server receives.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry::trace::{SpanId, SpanKind, Status, TraceId, TracerProvider};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use tonic::body::Body;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_balance::traces::Traces;
use tonic_balance::{BalancedChannel, RetryPolicy};
use tonic_etcd_opentelemetry::inject;
use tower_service::Service;
use tracing::Instrument;
use tracing_subscriber::layer::SubscriberExt;

/// The values of `traceparent` that a server has received.
type Received = Arc<Mutex<Vec<String>>>;

/// Starts a server that answers the first call with `UNAVAILABLE`, and all others with `UNIMPLEMENTED`.
async fn server() -> (String, Received) {
    let received = Received::default();
    let log = Arc::clone(&received);
    let interceptor = InterceptorLayer::new(move |request: tonic::Request<()>| {
        let context = request.metadata().get("traceparent");
        let context = context.map_or("", |context| context.to_str().unwrap());
        let mut log = log.lock().unwrap();
        log.push(context.to_owned());
        match log.len() {
            1 => Err(tonic::Status::unavailable("try again")),
            _ => Ok(request),
        }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let routes = tonic::service::Routes::default();
    let serving = Server::builder().layer(interceptor).add_routes(routes);
    tokio::spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));
    (address, received)
}

async fn call(channel: &mut BalancedChannel) {
    let mut request = http::Request::new(Body::empty());
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = "/helloworld.Greeter/SayHello".parse().unwrap();
    // A context that the caller has set itself is replaced.
    let stale = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    request
        .headers_mut()
        .insert("traceparent", stale.parse().unwrap());
    let outcome = tokio::time::timeout(Duration::from_secs(20), channel.call(request)).await;
    assert_eq!(
        outcome.unwrap().unwrap_err().code(),
        tonic::Code::Unimplemented
    );
}

/// Returns the trace and the span that a value of `traceparent` names. The trace must be sampled.
fn context(traceparent: &str) -> (TraceId, SpanId) {
    let parts: Vec<_> = traceparent.split('-').collect();
    let ["00", trace, span, "01"] = parts[..] else {
        panic!("{traceparent}");
    };
    let trace = TraceId::from_hex(trace).unwrap();
    (trace, SpanId::from_hex(span).unwrap())
}

fn attribute(span: &SpanData, key: &str) -> String {
    let mut attributes = span.attributes.iter();
    let attribute = attributes.find(|attribute| attribute.key.as_str() == key);
    attribute.map_or(String::new(), |attribute| attribute.value.to_string())
}

#[tokio::test]
async fn each_server_receives_the_span_of_its_attempt_as_the_parent() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    // All tasks of this test run on this thread, so a subscriber for the thread is enough.
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
    let (address, received) = server().await;
    let traces = Traces::new().propagator(inject(TraceContextPropagator::new()));
    let policy = RetryPolicy::new([tonic::Code::Unavailable]);
    let mut channel = BalancedChannel::builder()
        .retry(policy.initial_backoff(Duration::from_millis(1)))
        .traces(traces)
        .addresses([&*address])
        .connect()
        .await
        .unwrap();
    let caller = tracing::info_span!("caller");
    call(&mut channel).instrument(caller).await;
    provider.force_flush().unwrap();
    let finished = exporter.get_finished_spans().unwrap();

    let named = |name: &str| {
        let spans = finished.iter().filter(|span| span.name == name);
        spans.collect::<Vec<_>>()
    };
    let [caller] = named("caller")[..] else {
        panic!("{finished:?}");
    };
    let [sent] = named("Sent.helloworld.Greeter.SayHello")[..] else {
        panic!("{finished:?}");
    };
    assert_eq!(sent.parent_span_id, caller.span_context.span_id());
    assert_eq!(sent.span_kind, SpanKind::Internal);
    assert_eq!(sent.status, Status::error("UNIMPLEMENTED"));
    let attempts = named("Attempt.helloworld.Greeter.SayHello");
    let received = received.lock().unwrap().clone();
    assert_eq!((attempts.len(), received.len()), (2, 2), "{finished:?}");
    for (index, attempt) in attempts.into_iter().enumerate() {
        let expected = (
            caller.span_context.trace_id(),
            attempt.span_context.span_id(),
        );
        assert_eq!(context(&received[index]), expected);
        assert_eq!(attempt.parent_span_id, sent.span_context.span_id());
        assert_eq!(attempt.span_kind, SpanKind::Client);
        let status = ["UNAVAILABLE", "UNIMPLEMENTED"][index];
        assert_eq!(attempt.status, Status::error(status));
        let (host, port) = address.rsplit_once(':').unwrap();
        assert_eq!(attribute(attempt, "server.address"), host);
        assert_eq!(attribute(attempt, "server.port"), port);
        let previous = attribute(attempt, "previous-rpc-attempts");
        assert_eq!(previous, index.to_string());
    }
}
