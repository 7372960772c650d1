//! The option for load reports.

use std::time::Duration;

use crate::balance::limits::MAX_DURATION;

/// Reads the load reports of the servers (ORCA, gRFC A51), and sets how
/// [`LbPolicy::WeightedRoundRobin`](crate::LbPolicy::WeightedRoundRobin) computes weights from them (gRFC A58). Disabled unless it is passed
/// to [`ChannelBuilder::load_reports`](crate::channel::ChannelBuilder::load_reports), or a service config selects `weighted_round_robin`.
///
/// A report is the trailer `endpoint-load-metrics-bin` of a response. Servers of this library send it with the layer `ReportLoadLayer`
/// (feature `orca`), and servers of other gRPC libraries with their ORCA support. A trailer that is not a report is ignored.
///
/// The setters concern only the weights. They have the names and the defaults of gRFC A58.
///
/// ```
/// use std::time::Duration;
/// use tonic_balance::{BalancedChannel, LbPolicy, channel::LoadReports};
///
/// # fn run() {
/// let channel = BalancedChannel::builder()
///     .policy(LbPolicy::WeightedRoundRobin)
///     .load_reports(LoadReports::new().blackout_period(Duration::from_secs(5)))
///     .addresses(["10.0.0.5:50051", "10.0.0.6:50051"]).connect_lazy();
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
#[must_use = "it does nothing before it is given to a channel"]
pub struct LoadReports {
    pub(super) blackout_period: Duration,
    pub(super) weight_expiration_period: Duration,
    pub(super) weight_update_period: Duration,
    pub(super) error_utilization_penalty: f64,
}

impl Default for LoadReports {
    fn default() -> Self {
        Self {
            blackout_period: Duration::from_secs(10),
            weight_expiration_period: Duration::from_secs(180),
            weight_update_period: Duration::from_secs(1),
            error_utilization_penalty: 1.0,
        }
    }
}

impl LoadReports {
    /// Creates the option with the defaults of gRFC A58.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how long an endpoint must have sent reports before its weight is used: after it has become ready, and after its weight has
    /// expired. Default 10 s. Zero uses the first report.
    pub fn blackout_period(mut self, period: Duration) -> Self {
        self.blackout_period = period;
        self
    }

    /// Sets the age at which the last report of an endpoint is not used any more. Default 3 minutes.
    pub fn weight_expiration_period(mut self, period: Duration) -> Self {
        self.weight_expiration_period = period;
        self
    }

    /// Sets the time between two computations of the weights. Default 1 s, minimum 100 ms.
    pub fn weight_update_period(mut self, period: Duration) -> Self {
        self.weight_update_period = period.clamp(MIN_UPDATE_PERIOD, MAX_DURATION);
        self
    }

    /// Sets how much failed calls reduce a weight: the share of the calls that fail is multiplied by this number and added to the
    /// utilization. Default 1. A negative number, and a value that is not a number, count as 0. The
    /// maximum is 1 000 000.
    pub fn error_utilization_penalty(mut self, penalty: f64) -> Self {
        // An infinite penalty times no failed calls would be no number. `NaN > 0.0` is false.
        self.error_utilization_penalty = if penalty > 0.0 {
            penalty.min(MAX_PENALTY)
        } else {
            0.0
        };
        self
    }

    pub(in crate::balance) fn update_period(&self) -> Duration {
        self.weight_update_period
    }
}

/// With this penalty, one failed call in a million counts as full utilization.
const MAX_PENALTY: f64 = 1e6;
/// The minimum of gRFC A58.
const MIN_UPDATE_PERIOD: Duration = Duration::from_millis(100);
