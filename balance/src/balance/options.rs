//! The options of a balancer.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use tokio::sync::watch;

use super::load_weights::LoadReports;
use super::outlier::OutlierDetection;
use super::peer_index::PeerIndex;
use super::pick_policy::ProvidedPolicy;
use super::picker::LbPolicy;
use super::traffic_split::{TrafficSplit, TrafficSplits};
use crate::address::Address;
use crate::metrics::ChannelMetrics;
use crate::transport::health_client::HealthCheck;

/// The options of a balancer, which the builder of the channel sets.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) policy: LbPolicy,
    /// The header whose value is the key of a call for the consistent hash.
    pub(crate) hash_header: Option<HeaderName>,
    /// Whether calls read the load reports of the servers.
    pub(crate) load_reports: bool,
    /// How weights are computed from load reports; `None` if they are not.
    pub(crate) load_weights: Option<LoadReports>,
    pub(crate) seed: Option<u64>,
    pub(crate) connections_per_endpoint: usize,
    pub(crate) max_backoff: Duration,
    pub(crate) max_waiters: usize,
    /// The limit on the requests of the channel, if there is one.
    pub(crate) max_requests: Option<usize>,
    /// The limit on the requests of each endpoint, if there is one.
    pub(crate) max_requests_per_endpoint: Option<u32>,
    /// The longest time for which the pushback of a server keeps new calls away from it. Zero if pushbacks are ignored.
    pub(crate) max_pushback: Duration,
    pub(crate) outlier_detection: Option<OutlierDetection>,
    /// The health check of the endpoints, if it is enabled.
    pub(crate) health_check: Option<HealthCheck>,
    /// The time in which the weight of an endpoint that has become ready grows to its full value; `None` disables slow start.
    pub(crate) slow_start: Option<Duration>,
    /// Called after each failed dial.
    pub(crate) on_refused: Option<AddressCallback>,
    /// Called after the end of each connection, unless its endpoint was removed or the connection was replaced.
    pub(crate) on_lost: Option<AddressCallback>,
    /// The zone whose endpoints are preferred.
    pub(crate) zone: Option<Box<str>>,
    /// The policy that the program provides, if it provides one.
    pub(crate) pick_policy: Option<ProvidedPolicy>,
    /// The traffic splits of the program and of the service config.
    pub(crate) splits: TrafficSplits,
    /// The number of endpoints to which the channel connects; `None` stands for all.
    pub(crate) subset_size: Option<usize>,
    /// The index of the client among its peers, if the subset is an aperture.
    pub(crate) peers: Option<watch::Receiver<Option<PeerIndex>>>,
    /// The instruments, if metrics are enabled.
    pub(crate) metrics: Option<Arc<ChannelMetrics>>,
}

impl Options {
    /// Sets the options that can change while the channel runs.
    pub(crate) fn set(&mut self, settings: Reconfiguration) {
        let Reconfiguration {
            policy,
            hash_header,
            split,
            load_reports,
            load_weights,
            outlier_detection,
            health_check,
            subset_size,
        } = settings;
        self.policy = policy;
        self.hash_header = hash_header;
        self.splits.of_service_config = split;
        self.load_reports = load_reports;
        self.load_weights = load_weights;
        self.outlier_detection = outlier_detection;
        self.health_check = health_check;
        self.subset_size = subset_size;
    }
}

/// The options that can change while the channel runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reconfiguration {
    pub(crate) policy: LbPolicy,
    pub(crate) hash_header: Option<HeaderName>,
    /// The traffic split of the service config; empty if it has none.
    pub(crate) split: TrafficSplit,
    pub(crate) load_reports: bool,
    pub(crate) load_weights: Option<LoadReports>,
    pub(crate) outlier_detection: Option<OutlierDetection>,
    pub(crate) health_check: Option<HealthCheck>,
    pub(crate) subset_size: Option<usize>,
}

/// Callback for an endpoint. The driver calls it, so it must not block.
#[derive(Clone)]
pub(crate) struct AddressCallback(pub(crate) Arc<dyn Fn(&Address) + Send + Sync>);

impl std::fmt::Debug for AddressCallback {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressCallback").finish_non_exhaustive()
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            policy: LbPolicy::default(),
            hash_header: None,
            load_reports: false,
            load_weights: None,
            seed: None,
            connections_per_endpoint: 1,
            max_backoff: MAX_BACKOFF,
            max_waiters: MAX_WAITERS,
            max_requests: None,
            max_requests_per_endpoint: None,
            max_pushback: Duration::ZERO,
            outlier_detection: None,
            health_check: None,
            slow_start: None,
            on_refused: None,
            on_lost: None,
            zone: None,
            pick_policy: None,
            splits: TrafficSplits::default(),
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
