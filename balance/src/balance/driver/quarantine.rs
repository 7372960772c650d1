//! The quarantine of an endpoint whose answers are not gRPC responses.

use std::time::Duration;

use tokio::time::Instant;

/// The exclusion of an endpoint from picks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quarantine {
    /// The end of the quarantine, or `None` on probation: the next foreign answer extends the quarantine, and a gRPC answer ends it.
    pub(super) until: Option<Instant>,
    pub(super) length: Duration,
}

impl Quarantine {
    pub(super) fn is_over(self) -> bool {
        self.until.is_none()
    }
}
