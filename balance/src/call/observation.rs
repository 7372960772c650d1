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
    /// Starts the metrics of a call. Returns `None` if neither metrics nor traces are enabled.
    pub(super) fn start(
        metrics: Option<&Arc<MethodMetrics>>,
        span: Option<OpenSpan>,
    ) -> Option<Box<Self>> {
        if metrics.is_none() && span.is_none() {
            return None;
        }
        let metrics = metrics.map(|method| CallRecord::start(Arc::clone(method), Instant::now()));
        Some(Box::new(Self { metrics, span }))
    }

    /// Starts to count the sends of a call that leaves the common path, if metrics are enabled. `sent` states whether the call was already
    /// sent once.
    pub(super) fn count_sends(&mut self, is_hedged: bool, sent: bool) -> Option<Arc<Sends>> {
        let metrics = self.metrics.as_mut()?;
        Some(metrics.count_sends(is_hedged, sent))
    }

    /// Records the end of the call. Later ends have no effect.
    pub(super) fn end(&mut self, code: Code) {
        if let Some(metrics) = &mut self.metrics {
            metrics.end(code);
        }
        if let Some(span) = &mut self.span {
            span.end(code);
        }
    }
}
