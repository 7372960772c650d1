//! The instruments of one channel.

use std::sync::Arc;

use super::instrument::{
    DETECTION_METHOD, EJECTIONS_ENFORCED, EJECTIONS_UNENFORCED, LB_DROPPED_CALLS, LOCALITY,
    UNENFORCED_REASON,
};
use super::interned::Interned;
use super::method::MethodMetrics;
use super::recorder::Counter;
use super::scope::Scope;
use super::selection::Metrics;
use super::subchannel::SubchannelMetrics;

/// The handles of one channel.
pub(crate) struct ChannelMetrics {
    scope: Arc<Scope>,
    methods: Interned<Arc<MethodMetrics>>,
    other: Arc<MethodMetrics>,
    /// The handles for endpoints of one zone, or of all zones if the label for the zone is disabled.
    subchannels: Interned<Arc<SubchannelMetrics>>,
    /// The handles for endpoints without a zone, and for those of further zones than the limit.
    without_zone: Arc<SubchannelMetrics>,
    security_level: &'static str,
    success_rate: EjectionCounters,
    failure_percentage: EjectionCounters,
    dropped_calls: Option<Box<dyn Counter>>,
}

/// The ejections of one sweep by one method.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EjectionCounts {
    pub(crate) enforced: u64,
    /// Outliers that were not ejected, because too many endpoints were ejected already.
    pub(crate) overflow: u64,
    /// Outliers that were not ejected, because the rule is enforced only with a probability.
    pub(crate) by_chance: u64,
}

struct EjectionCounters {
    enforced: Option<Box<dyn Counter>>,
    overflow: Option<Box<dyn Counter>>,
    by_chance: Option<Box<dyn Counter>>,
}

impl EjectionCounters {
    fn new(scope: &Scope, method: &'static str) -> Self {
        let unenforced = |reason| {
            let own = [(DETECTION_METHOD, method), (UNENFORCED_REASON, reason)];
            let labels = scope.labels(&own);
            scope.metrics.counter(&EJECTIONS_UNENFORCED, &labels)
        };
        let labels = scope.labels(&[(DETECTION_METHOD, method)]);
        Self {
            enforced: scope.metrics.counter(&EJECTIONS_ENFORCED, &labels),
            overflow: unenforced("max_ejection_overflow"),
            by_chance: unenforced("enforcement_percentage"),
        }
    }

    fn add(&self, counts: EjectionCounts) {
        for (counter, count) in [
            (&self.enforced, counts.enforced),
            (&self.overflow, counts.overflow),
            (&self.by_chance, counts.by_chance),
        ] {
            if let Some(counter) = counter
                && count > 0
            {
                counter.add(count);
            }
        }
    }
}

impl ChannelMetrics {
    pub(crate) fn new(metrics: Metrics, target: String, service: String, is_tls: bool) -> Self {
        let has_zones = metrics.has_label(LOCALITY);
        let scope = Arc::new(Scope {
            metrics,
            target,
            service,
            has_zones,
        });
        let security_level = if is_tls {
            "privacy_and_integrity"
        } else {
            "none"
        };
        let without_zone = SubchannelMetrics::new(Arc::clone(&scope), "", security_level);
        Self {
            methods: Interned::new(MAX_METHODS),
            other: Arc::new(MethodMetrics::new(Arc::clone(&scope), "other")),
            subchannels: Interned::new(MAX_ZONES),
            without_zone: Arc::new(without_zone),
            security_level,
            success_rate: EjectionCounters::new(&scope, "success_rate"),
            failure_percentage: EjectionCounters::new(&scope, "failure_percentage"),
            dropped_calls: scope.metrics.counter(&LB_DROPPED_CALLS, &scope.labels(&[])),
            scope,
        }
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.scope.metrics
    }

    pub(crate) fn target(&self) -> &str {
        &self.scope.target
    }

    /// Returns the handles of a method, `package.Service/Method`. `is_generated`: whether the call is that of a generated client. If no such
    /// call had this name before, and this one is not, the handles are those of all other methods.
    pub(crate) fn method(
        &self,
        name: &str,
        is_generated: impl FnOnce() -> bool,
    ) -> Arc<MethodMetrics> {
        let known = self.methods.find(name);
        Arc::clone(known.unwrap_or_else(|| self.new_method(name, is_generated())))
    }

    #[cold]
    fn new_method(&self, name: &str, is_generated: bool) -> &Arc<MethodMetrics> {
        let create = || Arc::new(MethodMetrics::new(Arc::clone(&self.scope), name));
        let created = is_generated.then(|| self.methods.get(name, create));
        created.flatten().unwrap_or(&self.other)
    }

    /// Returns the handles for the connections to an endpoint of this zone.
    pub(crate) fn subchannel(&self, zone: Option<&str>) -> Arc<SubchannelMetrics> {
        let zone = zone.filter(|zone| self.scope.has_zones && !zone.is_empty());
        let of_zone = zone.and_then(|zone| {
            self.subchannels.get(zone, || {
                let scope = Arc::clone(&self.scope);
                Arc::new(SubchannelMetrics::new(scope, zone, self.security_level))
            })
        });
        Arc::clone(of_zone.unwrap_or(&self.without_zone))
    }

    /// Counts a call that failed because a limit on requests was reached.
    pub(crate) fn on_dropped(&self) {
        if let Some(counter) = &self.dropped_calls {
            counter.add(1);
        }
    }

    /// Records the ejections of a sweep.
    pub(crate) fn on_ejections(
        &self,
        success_rate: EjectionCounts,
        failure_percentage: EjectionCounts,
    ) {
        self.success_rate.add(success_rate);
        self.failure_percentage.add(failure_percentage);
    }
}

impl std::fmt::Debug for ChannelMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChannelMetrics")
            .field("target", &self.scope.target)
            .finish_non_exhaustive()
    }
}

/// Limit on the methods with handles of their own. Calls of further methods count as `other`.
const MAX_METHODS: usize = 1_000;
/// Limit on the zones with handles of their own. Connections to further zones are recorded without a zone.
const MAX_ZONES: usize = 100;
