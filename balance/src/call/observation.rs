//! The metrics and the span of a call.

use std::sync::Arc;

use tokio::time::Instant;
use tonic::Code;

use crate::metrics::{CallRecord, MethodMetrics, Sends};
use crate::traces::OpenSpan;

/// The metrics and the span of a call that has not ended, as far as they are enabled. The future of the call holds this value, then the body
/// of the response. A call that is dropped before its end is recorded as cancelled.
#[derive(Debug)]
pub(super) struct CallObservation {
    metrics: Option<CallRecord>,
    span: Option<OpenSpan>,
}

impl CallObservation {
    /// Creates the value for a call with a span.
    pub(super) fn traced(span: OpenSpan) -> Self {
        Self {
            metrics: None,
            span: Some(span),
        }
    }

    /// Starts the metrics of a call, if they are enabled.
    pub(super) fn measure(
        this: &mut Option<Box<Self>>,
        method: Option<&Arc<MethodMetrics>>,
        now: Instant,
    ) {
        let Some(method) = method else {
            return;
        };
        let metrics = Some(CallRecord::start(Arc::clone(method), now));
        match this {
            Some(observation) => observation.metrics = metrics,
            None => {
                *this = Some(Box::new(Self {
                    metrics,
                    span: None,
                }));
            }
        }
    }

    /// Starts to count the sends of a call that leaves the common path, if metrics are enabled. `sent` states whether the call was already
    /// sent once.
    pub(super) fn count_sends(&mut self, is_hedged: bool, sent: bool) -> Option<Arc<Sends>> {
        let metrics = self.metrics.as_mut()?;
        Some(metrics.count_sends(is_hedged, sent))
    }

    /// Records the end of the call. Later ends have no effect.
    pub(super) fn end(&mut self, code: Code, now: Instant) {
        if let Some(metrics) = &mut self.metrics {
            metrics.end(code, now);
        }
        if let Some(span) = &mut self.span {
            span.end(code);
        }
    }
}
