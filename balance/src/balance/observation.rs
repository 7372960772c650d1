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
            let attributes = metrics.has_zones().then(|| endpoint.attributes());
            let zone = attributes.as_ref().and_then(|attributes| attributes.zone());
            metrics.end(code, zone.unwrap_or_default(), now);
        }
        if let Some(span) = self.span {
            span.end(code);
        }
    }
}
