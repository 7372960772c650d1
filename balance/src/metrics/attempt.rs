//! The measurement of one attempt.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;
use tonic::Code;

use super::message_size::MessageSize;
use super::method::MethodMetrics;

/// An attempt that has not ended. It is stored in the permit of the attempt, without an allocation.
#[derive(Debug)]
pub(crate) struct AttemptRecord {
    method: Arc<MethodMetrics>,
    started: Instant,
    sent: SentSize,
    received: MessageSize,
}

/// The size of the request messages of an attempt.
#[derive(Debug)]
pub(crate) enum SentSize {
    /// The whole body was sent with the head.
    Known(u64),
    /// A task sends the body and counts.
    Counted(Arc<AtomicU64>),
}

impl AttemptRecord {
    pub(crate) fn start(method: Arc<MethodMetrics>, sent: SentSize, now: Instant) -> Self {
        if let Some(started) = &method.started {
            started.add(1);
        }
        Self {
            method,
            started: now,
            sent,
            received: MessageSize::default(),
        }
    }

    /// Adds a data frame of the response.
    pub(crate) fn on_data(&mut self, frame: &[u8]) {
        self.received.add(frame);
    }

    /// Returns whether [`end`](Self::end) uses the zone.
    pub(crate) fn has_zones(&self) -> bool {
        self.method.has_zones()
    }

    /// Records the end of the attempt. `zone` is empty if the endpoint has no zone.
    #[expect(
        clippy::cast_precision_loss,
        reason = "messages are smaller than 2^53 bytes"
    )]
    pub(crate) fn end(self, code: Code, zone: &str, now: Instant) {
        let duration = now.saturating_duration_since(self.started);
        let sent = match &self.sent {
            SentSize::Known(size) => *size,
            SentSize::Counted(size) => size.load(Ordering::Relaxed),
        };
        self.method.on_attempt(code, zone, |handles| {
            if let Some(histogram) = &handles.duration {
                histogram.record(duration.as_secs_f64());
            }
            if let Some(histogram) = &handles.sent {
                histogram.record(sent as f64);
            }
            if let Some(histogram) = &handles.received {
                histogram.record(self.received.total() as f64);
            }
        });
    }
}
