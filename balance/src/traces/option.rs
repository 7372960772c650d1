//! The option that enables traces.

use std::fmt;
use std::sync::Arc;

use http::HeaderMap;
use tracing::Span;

/// Enables the spans of a channel, and writes their context to the headers of requests.
#[derive(Clone, Default)]
pub struct Traces {
    propagator: Option<Arc<Propagator>>,
}

type Propagator = dyn Fn(&Span, &mut HeaderMap) + Send + Sync;

impl Traces {
    /// Creates the option without a propagator.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the function that writes the context of an attempt's span to the headers of the request, so that the spans of the server become
    /// children of the attempt. The function is called for each attempt, just before the attempt is sent. The crate
    /// `tonic-etcd-opentelemetry` has a function for the propagators of OpenTelemetry. By default, no context is written.
    ///
    /// The limits on the size of metadata do not count the headers that the function adds.
    ///
    /// ```
    /// use tonic_balance::traces::Traces;
    ///
    /// let traces = Traces::new().propagator(|span, headers| {
    ///     if let Some(id) = span.id() {
    ///         headers.insert("x-span", id.into_u64().into());
    ///     }
    /// });
    /// ```
    #[must_use]
    pub fn propagator(
        mut self,
        inject: impl Fn(&Span, &mut HeaderMap) + Send + Sync + 'static,
    ) -> Self {
        self.propagator = Some(Arc::new(inject));
        self
    }

    /// Writes the context of a span to the headers.
    pub(super) fn inject(&self, span: &Span, headers: &mut HeaderMap) {
        if let Some(propagator) = &self.propagator {
            propagator(span, headers);
        }
    }
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces")
            .field("has_propagator", &self.propagator.is_some())
            .finish()
    }
}
