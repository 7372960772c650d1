//! A span of a call or of an attempt that has not ended.

use std::fmt;

use tonic::Code;
use tracing::field::Empty;
use tracing::{Level, Span};

use super::target::TARGET;
use crate::metrics::status_name;

/// A span whose status is recorded once. It is closed when this value is dropped. If no status was recorded until then, the span is recorded
/// as cancelled.
#[derive(Debug)]
pub(crate) struct OpenSpan {
    span: Span,
    has_ended: bool,
}

impl OpenSpan {
    /// Starts the span of a call. Its parent is the current span. Returns `None` if no subscriber is interested.
    pub(super) fn call(path: &str) -> Option<Self> {
        let span = tracing::span!(
            target: TARGET,
            Level::INFO,
            "Sent",
            otel.name = %Name("Sent", path),
            otel.kind = "internal",
            otel.status_code = Empty,
            otel.status_description = Empty,
        );
        Self::new(span)
    }

    /// Starts the span of an attempt.
    pub(super) fn attempt(
        call: &Span,
        path: &str,
        previous: u32,
        is_transparent: bool,
    ) -> Option<Self> {
        let span = tracing::span!(
            target: TARGET,
            parent: call,
            Level::INFO,
            "Attempt",
            otel.name = %Name("Attempt", path),
            otel.kind = "client",
            "previous-rpc-attempts" = previous,
            "transparent-retry" = is_transparent,
            server.address = Empty,
            server.port = Empty,
            otel.status_code = Empty,
            otel.status_description = Empty,
        );
        Self::new(span)
    }

    fn new(span: Span) -> Option<Self> {
        let has_ended = false;
        (!span.is_disabled()).then_some(Self { span, has_ended })
    }

    pub(super) fn span(&self) -> &Span {
        &self.span
    }

    /// Records the status. Later calls have no effect.
    pub(crate) fn end(&mut self, code: Code) {
        if std::mem::replace(&mut self.has_ended, true) {
            return;
        }
        if code == Code::Ok {
            self.span.record("otel.status_code", "OK");
            return;
        }
        // `tracing-opentelemetry` replaces the description if the code is recorded after it.
        self.span.record("otel.status_code", "ERROR");
        self.span
            .record("otel.status_description", status_name(code));
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

/// The name of a span in gRFC A72: a prefix, the service and the method, separated by dots.
struct Name<'a>(&'static str, &'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)?;
        for part in self.1.split('/').filter(|part| !part.is_empty()) {
            write!(f, ".{part}")?;
        }
        Ok(())
    }
}
