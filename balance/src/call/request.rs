//! The part of a request that is kept until its call ends, so that the request can be sent again.

use std::sync::Arc;

use bytes::Bytes;
use http::{Extensions, Method, Uri};
use tokio::time::Instant;
use tonic::{Code, GrpcMethod};

use super::message_limits::MessageLimits;
use super::method_config::MethodConfig;
use super::observation::{CallObservation, FurtherAttempts};
use super::request_headers::Headers;
use crate::balance::{AttemptObservation, Permit, PickKey};
use crate::metrics::{AttemptRecord, ChannelMetrics, MethodMetrics, SentSize};
use crate::traces::CallTrace;
use crate::transport::deadline::Deadline;
use crate::transport::request_body::Outgoing;

/// The kept part of a request, without its body.
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: Headers,
    pub(super) extensions: Extensions,
    pub(super) wait_for_ready: bool,
    pub(super) limits: MessageLimits,
    /// The settings of methods under the service config of the source that was in force when the call was made, if there was one.
    pub(super) method_config: Option<Arc<MethodConfig>>,
    /// What the picks of the call depend on.
    pub(super) pick_key: PickKey,
    /// The metrics of further attempts, if metrics are enabled and the call has left the common path.
    pub(super) metrics: Option<FurtherAttempts>,
    /// Starts the spans of attempts, if traces are enabled.
    pub(super) trace: Option<Box<CallTrace>>,
}

impl Call {
    /// Returns the path of the method.
    pub(super) fn path(&self) -> &str {
        self.uri.path()
    }

    /// Returns the deadline of a call that is made at `now`.
    pub(super) fn deadline(&self, now: Instant) -> Option<Deadline> {
        Deadline::after(self.headers.timeout()?, now)
    }

    /// Returns the handles of the method.
    pub(super) fn handles(&self, metrics: &ChannelMetrics) -> Arc<MethodMetrics> {
        // Only generated clients set the extension, so the number of methods is limited.
        let is_generated = || self.extensions.get::<GrpcMethod<'static>>().is_some();
        let path = self.path();
        metrics.method(path.strip_prefix('/').unwrap_or(path), is_generated)
    }

    /// Starts to count the sends, when the call leaves the common path. `sent` is the permit of the first attempt, if it was sent.
    pub(super) fn count_sends(
        &mut self,
        observation: Option<&mut CallObservation>,
        hedged: bool,
        sent: Option<&mut Permit>,
    ) {
        self.metrics = observation.and_then(|observation| observation.count_sends(hedged, sent));
    }

    /// Starts the span of an attempt, unless it was started already. `previous` is the number of earlier attempts.
    pub(super) fn start_span(&mut self, previous: u32) {
        if let Some(trace) = &mut self.trace {
            trace.start_attempt(self.uri.path(), previous);
        }
    }

    /// Returns the metrics and the span of an attempt that was sent. `sent` is the size of its request messages, if metrics are enabled and
    /// the call has left the common path.
    pub(super) fn observe(
        &mut self,
        sent: Option<SentSize>,
        previous: u32,
        now: Instant,
    ) -> AttemptObservation {
        let span = self.trace.as_mut().and_then(|trace| trace.take_sent());
        let measured = self.metrics.as_ref().zip(sent);
        let metrics = measured.map(|(FurtherAttempts { method, sends }, sent)| {
            sends.on_sent(previous, now);
            AttemptRecord::start(Arc::clone(method), sent, now)
        });
        AttemptObservation { metrics, span }
    }

    /// Ends the span of an attempt that was not sent.
    pub(super) fn end_unsent_span(&mut self, code: Code) {
        if let Some(trace) = &mut self.trace {
            trace.end_unsent(code);
        }
    }

    /// Records that no attempt of the call is active.
    pub(super) fn on_idle(&self) {
        if let Some(metrics) = &self.metrics {
            metrics.sends.on_idle(Instant::now());
        }
    }

    pub(super) fn extensions_mut(&mut self) -> &mut Extensions {
        &mut self.extensions
    }

    /// Returns the size of the header list in bytes, as peers count it, or 0 for a call without metadata.
    pub(super) fn metadata_size(&self) -> usize {
        match self.headers.size() {
            0 => 0,
            size => size + self.uri.path().len() + AUTHORITY,
        }
    }
}

/// The part of a body that is kept after the body was sent.
pub(super) enum KeptBody {
    Empty,
    Single(Bytes),
    /// The body is owned by its pump, the task that sends it.
    Pumped,
}

impl KeptBody {
    pub(super) fn of(body: &Outgoing) -> Self {
        match body {
            Outgoing::Empty => Self::Empty,
            Outgoing::Single(frame) => Self::Single(frame.clone()),
            Outgoing::Stream { .. } => Self::Pumped,
        }
    }

    /// Returns true if a pump sends the body, as for every request stream.
    pub(super) fn is_pumped(&self) -> bool {
        matches!(self, Self::Pumped)
    }

    /// Returns the body for another send; `None` if its pump owns it.
    pub(super) fn body(&self) -> Option<Outgoing> {
        match self {
            Self::Empty => Some(Outgoing::Empty),
            Self::Single(frame) => Some(Outgoing::Single(frame.clone())),
            Self::Pumped => None,
        }
    }
}

/// Estimated length of the authority in bytes: that of an IPv4 address with its port. The exact length is not known before the pick,
/// because the authority depends on the endpoint.
const AUTHORITY: usize = 21;
