//! The part of a call's trace that starts the spans of its attempts.

use http::HeaderMap;
use tonic::Code;
use tracing::{Level, Span};

use super::attempt::AttemptSpan;
use super::open_span::OpenSpan;
use super::option::Traces;
use super::target::TARGET;
use crate::address::Address;

/// Starts the spans of the attempts of one call. It is kept with the request until the call ends.
#[derive(Debug)]
pub(crate) struct CallTrace {
    traces: Traces,
    span: Span,
    /// The largest number of earlier attempts of any attempt, plus one; 0 before the first attempt.
    attempts: u32,
    /// The span of an attempt that was started and not sent yet.
    unsent: Option<AttemptSpan>,
}

impl CallTrace {
    /// Starts the span of a call. Returns `None` if no subscriber of `tracing` is interested in the span.
    pub(crate) fn start(traces: &Traces, path: &str) -> Option<(OpenSpan, Box<Self>)> {
        let span = OpenSpan::call(path)?;
        let trace = Box::new(Self {
            traces: traces.clone(),
            span: span.span().clone(),
            attempts: 0,
            unsent: None,
        });
        Some((span, trace))
    }

    /// Starts an attempt. Does nothing if an attempt was started and not sent yet: for example, its connection did not accept the request.
    /// `previous` is the number of earlier attempts, not counting those that the server certainly did not process. So a transparent retry has
    /// the same number as the attempt that it replaces, or a smaller one.
    pub(crate) fn start_attempt(&mut self, path: &str, previous: u32) {
        if self.unsent.is_some() {
            return;
        }
        let is_transparent = previous < self.attempts;
        self.unsent = AttemptSpan::start(&self.span, path, previous, is_transparent);
        self.attempts = self.attempts.max(previous + 1);
    }

    /// Records that the call has waited for the first list of endpoints.
    pub(crate) fn on_resolved(&self) {
        tracing::event!(
            target: TARGET,
            parent: &self.span,
            Level::INFO,
            "Delayed name resolution complete"
        );
    }

    /// Records that the attempt has waited for a connection.
    pub(crate) fn on_picked(&self) {
        if let Some(attempt) = &self.unsent {
            attempt.on_picked();
        }
    }

    /// Records the endpoint of the attempt, and writes the context of its span to the headers.
    pub(crate) fn prepare(&self, address: &Address, headers: &mut HeaderMap) {
        if let Some(attempt) = &self.unsent {
            attempt.set_server(address);
            self.traces.inject(attempt.span(), headers);
        }
    }

    /// Returns the span of an attempt that was sent.
    pub(crate) fn take_sent(&mut self) -> Option<AttemptSpan> {
        self.unsent.take()
    }

    /// Ends an attempt that was not sent.
    pub(crate) fn end_unsent(&mut self, code: Code) {
        if let Some(attempt) = self.unsent.take() {
            attempt.end(code);
        }
    }
}
