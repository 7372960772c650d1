//! The measurement of one attempt.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;
use tonic::Code;

use super::message_size::MessageSize;
use super::method::MethodMetrics;

/// The sizes of an attempt that has not ended.
#[derive(Debug)]
pub(super) struct OpenAttempt {
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

impl OpenAttempt {
    /// Counts a new attempt.
    pub(super) fn start(method: &MethodMetrics, sent: SentSize) -> Self {
        if let Some(started) = &method.started {
            started.add(1);
        }
        Self {
            sent,
            received: MessageSize::default(),
        }
    }

    /// Adds a data frame of the response.
    pub(super) fn on_data(&mut self, frame: &[u8]) {
        self.received.add(frame);
    }

    /// Records the end of the attempt after `seconds`. `zone` is empty if the endpoint has no zone.
    #[expect(
        clippy::cast_precision_loss,
        reason = "messages are smaller than 2^53 bytes"
    )]
    pub(super) fn end(&self, method: &MethodMetrics, code: Code, zone: &str, seconds: f64) {
        let sent = match &self.sent {
            SentSize::Known(size) => *size,
            SentSize::Counted(size) => size.load(Ordering::Relaxed),
        };
        let Some(handles) = method.attempts(code, zone) else {
            return;
        };
        if let Some(histogram) = &handles.duration {
            histogram.record(seconds);
        }
        if let Some(histogram) = &handles.sent {
            histogram.record(sent as f64);
        }
        if let Some(histogram) = &handles.received {
            histogram.record(self.received.total() as f64);
        }
    }
}

/// An attempt that has not ended, of a call that has left the common path. It is stored in the permit of the attempt. The first attempt of
/// any other call is part of its [`CallRecord`](super::CallRecord).
#[derive(Debug)]
pub(crate) struct AttemptRecord {
    method: Arc<MethodMetrics>,
    started: Instant,
    attempt: OpenAttempt,
}

impl AttemptRecord {
    pub(crate) fn start(method: Arc<MethodMetrics>, sent: SentSize, now: Instant) -> Self {
        let attempt = OpenAttempt::start(&method, sent);
        Self::adopt(method, attempt, now)
    }

    /// Adopts an attempt that was started before its call has left the common path.
    pub(super) fn adopt(
        method: Arc<MethodMetrics>,
        attempt: OpenAttempt,
        started: Instant,
    ) -> Self {
        Self {
            method,
            started,
            attempt,
        }
    }

    /// Adds a data frame of the response.
    pub(crate) fn on_data(&mut self, frame: &[u8]) {
        self.attempt.on_data(frame);
    }

    /// Returns whether [`end`](Self::end) uses the zone.
    pub(crate) fn has_zones(&self) -> bool {
        self.method.has_zones()
    }

    /// Records the end of the attempt. `zone` is empty if the endpoint has no zone.
    pub(crate) fn end(self, code: Code, zone: &str, now: Instant) {
        let duration = now.saturating_duration_since(self.started);
        self.attempt
            .end(&self.method, code, zone, duration.as_secs_f64());
    }
}
