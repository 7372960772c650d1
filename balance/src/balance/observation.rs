//! The metrics and the span of an attempt.

use tokio::time::Instant;
use tonic::Code;

use super::endpoint::Endpoint;
use crate::metrics::AttemptRecord;
use crate::traces::AttemptSpan;

/// The metrics and the span of an attempt that was sent, as far as they are enabled.
#[derive(Debug)]
pub(crate) struct AttemptObservation {
    pub(crate) metrics: Option<AttemptRecord>,
    pub(crate) span: Option<AttemptSpan>,
}

impl AttemptObservation {
    /// Adds a data frame of the response.
    pub(super) fn on_data(&mut self, frame: &[u8]) {
        if let Some(metrics) = &mut self.metrics {
            metrics.on_data(frame);
        }
    }

    /// Ends the attempt.
    // Not inlined, so that the drop of a permit without an observation stays short.
    #[inline(never)]
    pub(super) fn end(self, code: Code, endpoint: &Endpoint, now: Instant) {
        if let Some(metrics) = self.metrics {
            let zone = metrics.has_zones().then(|| endpoint.zone()).flatten();
            let zone = zone.as_deref().map_or("", |zone| zone);
            metrics.end(code, zone, now);
        }
        if let Some(span) = self.span {
            span.end(code);
        }
    }
}
