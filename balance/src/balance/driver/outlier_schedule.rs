//! The schedule of outlier detection.

use tokio::time::Instant;

use crate::balance::outlier::{self, Counts, Ejection, Ejections, OutlierDetection};

/// Outlier detection, if it is enabled, and the time of its next sweep. A sweep evaluates the calls of all endpoints since the previous
/// sweep.
#[derive(Debug)]
pub(super) struct OutlierSchedule {
    config: Option<OutlierDetection>,
    sweep_at: Option<Instant>,
}

impl OutlierSchedule {
    pub(super) fn new(config: Option<OutlierDetection>, now: Instant) -> Self {
        let sweep_at = config.as_ref().map(|config| now + config.period());
        Self { config, sweep_at }
    }

    /// Returns the time of the next sweep; `None` if outlier detection is disabled.
    pub(super) fn next(&self) -> Option<Instant> {
        self.sweep_at
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.sweep_at.is_some_and(|at| at <= now)
    }

    /// Updates the ejection of each endpoint from its calls since the last sweep.
    pub(super) fn sweep(
        &mut self,
        endpoints: &mut [(Counts, Ejection)],
        now: Instant,
    ) -> Ejections {
        let Some(config) = &self.config else {
            return Ejections::default();
        };
        self.sweep_at = Some(now + config.period());
        outlier::sweep(config, endpoints, now)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_sweep_is_due_one_interval_after_the_last_and_never_without_a_configuration() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut detection = OutlierSchedule::new(Some(OutlierDetection::new()), start);
        assert_eq!(detection.next(), Some(at(10)));
        assert!(!detection.is_due(at(9)) && detection.is_due(at(11)));
        detection.sweep(&mut [], at(11));
        assert!(!detection.is_due(at(20)));
        assert_eq!(detection.next(), Some(at(21)));
        let mut detection = OutlierSchedule::new(None, start);
        detection.sweep(&mut [], at(11));
        assert_eq!(detection.next(), None);
    }
}
