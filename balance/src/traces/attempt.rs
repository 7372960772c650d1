//! The span of an attempt.

use tonic::Code;
use tracing::{Level, Span};

use super::open_span::OpenSpan;
use super::target::TARGET;
use crate::address::Address;

/// The span of an attempt that has not ended. An attempt that is dropped is recorded as cancelled.
#[derive(Debug)]
pub(crate) struct AttemptSpan(OpenSpan);

impl AttemptSpan {
    /// Starts the span of an attempt. Returns `None` if no subscriber is interested.
    pub(super) fn start(
        call: &Span,
        path: &str,
        previous: u32,
        is_transparent: bool,
    ) -> Option<Self> {
        OpenSpan::attempt(call, path, previous, is_transparent).map(Self)
    }

    pub(super) fn span(&self) -> &Span {
        self.0.span()
    }

    pub(super) fn on_picked(&self) {
        tracing::event!(
            target: TARGET,
            parent: self.span(),
            Level::INFO,
            "Delayed LB pick complete"
        );
    }

    pub(super) fn set_server(&self, address: &Address) {
        let host = address.host().unwrap_or(address.as_str());
        self.span().record("server.address", host);
        if let Some(port) = address.port() {
            self.span().record("server.port", port);
        }
    }

    /// Records the status and closes the span.
    pub(crate) fn end(mut self, code: Code) {
        self.0.end(code);
    }
}
