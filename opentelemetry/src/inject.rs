//! Writes the context of a span to the headers of a request.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Injector, TextMapPropagator};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Returns the function for [`Traces::propagator`](tonic_balance::traces::Traces::propagator) that writes the context of a span with this
/// propagator. The usual propagator is `opentelemetry_sdk::propagation::TraceContextPropagator`, which writes the headers `traceparent` and
/// `tracestate` of W3C Trace Context.
///
/// The subscriber must have the layer of the crate `tracing-opentelemetry`. Otherwise the spans have no context, and no header is written. A
/// header that the request has already is replaced. A header whose name or value is not valid in HTTP is left out.
///
/// ```
/// use opentelemetry_sdk::propagation::TraceContextPropagator;
/// use tonic_balance::traces::Traces;
/// use tonic_etcd_opentelemetry::inject;
///
/// let traces = Traces::new().propagator(inject(TraceContextPropagator::new()));
/// ```
pub fn inject(
    propagator: impl TextMapPropagator + Send + Sync + 'static,
) -> impl Fn(&Span, &mut HeaderMap) + Send + Sync + 'static {
    move |span, headers| propagator.inject_context(&span.context(), &mut Headers(headers))
}

/// The headers of a request, as propagators write them.
struct Headers<'a>(&'a mut HeaderMap);

impl Injector for Headers<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}
