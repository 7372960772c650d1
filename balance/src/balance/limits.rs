//! The limit on configured durations.

use std::time::Duration;

/// Limit on configured durations, so that the sum of an instant and a duration fits into an `Instant`.
pub(crate) const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 3600);
