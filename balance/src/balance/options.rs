//! The options of a balancer.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::outlier::OutlierDetection;
use super::peer_index::PeerIndex;
use super::pick_policy::ProvidedPolicy;
use super::picker::LbPolicy;
use super::traffic_split::TrafficSplit;
use crate::address::Address;
use crate::metrics::ChannelMetrics;
use crate::transport::health_client::HealthCheck;

/// The options of a balancer, which the builder of the channel sets.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) policy: LbPolicy,
    pub(crate) seed: Option<u64>,
    pub(crate) connections_per_endpoint: usize,
    pub(crate) max_backoff: Duration,
    pub(crate) max_waiters: usize,
    pub(crate) outlier_detection: Option<OutlierDetection>,
    /// The health check of the endpoints, if it is enabled.
    pub(crate) health_check: Option<HealthCheck>,
    /// The time in which the weight of an endpoint that has become ready grows to its full value; `None` disables slow start.
    pub(crate) slow_start: Option<Duration>,
    pub(crate) on_refused: Option<OnRefused>,
    /// The zone whose endpoints are preferred.
    pub(crate) zone: Option<Box<str>>,
    /// The policy that the program provides, if it provides one.
    pub(crate) pick_policy: Option<ProvidedPolicy>,
    /// The traffic split; empty if there is none.
    pub(crate) split: TrafficSplit,
    /// The number of endpoints to which the channel connects; `None` stands for all.
    pub(crate) subset_size: Option<usize>,
    /// The index of the client among its peers, if the subset is an aperture.
    pub(crate) peers: Option<watch::Receiver<Option<PeerIndex>>>,
    /// The instruments, if metrics are enabled.
    pub(crate) metrics: Option<Arc<ChannelMetrics>>,
}

impl Options {
    /// Replaces the options that can change while the channel runs.
    pub(crate) fn set(&mut self, settings: Reconfiguration) {
        self.policy = settings.policy;
        self.outlier_detection = settings.outlier_detection;
        self.health_check = settings.health_check;
        self.subset_size = settings.subset_size;
    }
}

/// The options that can change while the channel runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reconfiguration {
    pub(crate) policy: LbPolicy,
    pub(crate) outlier_detection: Option<OutlierDetection>,
    pub(crate) health_check: Option<HealthCheck>,
    pub(crate) subset_size: Option<usize>,
}

/// Callback for an endpoint to which no connection could be made. The driver calls it after each failed dial, so it must not block.
#[derive(Clone)]
pub(crate) struct OnRefused(pub(crate) Arc<dyn Fn(&Address) + Send + Sync>);

impl std::fmt::Debug for OnRefused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnRefused").finish_non_exhaustive()
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            policy: LbPolicy::default(),
            seed: None,
            connections_per_endpoint: 1,
            max_backoff: MAX_BACKOFF,
            max_waiters: MAX_WAITERS,
            outlier_detection: None,
            health_check: None,
            slow_start: None,
            on_refused: None,
            zone: None,
            pick_policy: None,
            split: TrafficSplit::new(),
            subset_size: None,
            peers: None,
            metrics: None,
        }
    }
}

/// Default limit on the connect backoff, from gRPC's connection backoff document.
const MAX_BACKOFF: Duration = Duration::from_secs(120);
/// Default limit on waiting calls. Each waiting call holds its request, which takes at least a few kilobytes. A higher limit would use
/// memory for calls that are unlikely to get a stream before their deadlines.
const MAX_WAITERS: usize = 32_768;
