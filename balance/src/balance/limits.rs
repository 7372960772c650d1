//! The limit on configured durations.

use std::time::Duration;

/// Limit on configured durations: the sum of an instant and a duration must fit into an `Instant`.
pub(crate) const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 3600);
