//! Combines the options of the program with a service config, and applies the service configs of the source.

use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use http::HeaderName;
use tokio_stream::StreamExt;
use tracing::Instrument;

use super::source::ServiceConfigs;
use crate::balance::{
    LbPolicy, LoadReports, OutlierDetection, Reconfiguration, Shared, StopOnDrop,
};
use crate::call::LiveConfig;
use crate::call::method_config::{
    MethodConfig, MethodSettings, Precedence, ProgramMethods, ServiceMethods,
};
use crate::service_config::ServiceConfig;
use crate::transport::health_client::HealthCheck;

/// Decides whether the options of the program or a service config take precedence. The service config is the one that the source of the
/// endpoints reports, such as the one in etcd. While the source reports none, it is the one that the program passes as JSON.
///
/// The mode applies to each setting separately. A setting that only the options or only the service config contains always applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ServiceConfigMode {
    /// The service config takes precedence over the options of the program. As in other implementations of gRPC, its timeout also shortens
    /// a longer timeout that a request sets.
    Prefer,
    /// The options of the program and the timeout of a request take precedence over the service config. This is the default.
    #[default]
    Defaults,
    /// The service configs of the source are not used. A service config that the program passes as JSON is used as with
    /// [`Defaults`](Self::Defaults).
    Ignore,
}

/// The options of a channel that concern service configs.
#[derive(Clone, Debug, Default)]
pub(super) struct ServiceConfigOptions {
    pub(super) mode: ServiceConfigMode,
    /// The service config of the program. It applies while the source has none.
    pub(super) of_program: Option<ServiceConfig>,
}

/// The options of the program that a service config can set as well.
#[derive(Debug)]
pub(super) struct ProgramOptions {
    pub(super) policy: Option<LbPolicy>,
    pub(super) hash_header: Option<HeaderName>,
    pub(super) load_reports: Option<LoadReports>,
    pub(super) outlier_detection: Option<OutlierDetection>,
    pub(super) subset_size: Option<usize>,
    /// The name of the service whose health is watched.
    pub(super) health_check: Option<String>,
    /// The parameters of health checks, without the name of the service.
    pub(super) health_client: HealthCheck,
    pub(super) methods: ProgramMethods,
    pub(super) from_service: ServiceConfigOptions,
}

impl ProgramOptions {
    /// Returns the settings that apply to all methods without a more specific option.
    pub(super) fn channel(&self) -> MethodSettings {
        self.methods.table.all.clone().unwrap_or_default()
    }

    /// Returns whether a service config takes precedence over the options.
    pub(super) fn prefers_service_config(&self) -> bool {
        self.from_service.mode == ServiceConfigMode::Prefer
    }

    /// Combines the options with the service config of the source, or, if the source has none, with that of the program.
    pub(super) fn combined(
        &self,
        of_source: Option<&ServiceConfig>,
    ) -> (Reconfiguration, MethodConfig) {
        let precedence = if self.prefers_service_config() {
            Precedence::ServiceConfig
        } else {
            Precedence::Program
        };
        let config = of_source.or(self.from_service.of_program.as_ref());
        let config = config.cloned().unwrap_or_default();
        let config = config.parsed();
        // The policy and its use of load reports are one setting: in a service config, `round_robin` uses no weights from load reports.
        let of_program = self.policy.map(|one| (one, self.load_reports.as_ref()));
        let of_config = config.balancing.policy;
        let of_config = of_config.map(|one| (one, config.balancing.load_weights.as_ref()));
        let (policy, load_weights) = precedence.choose(of_program, of_config).unwrap_or_default();
        let load_weights = load_weights.filter(|_| policy == LbPolicy::WeightedRoundRobin);
        let load_weights = load_weights.cloned();
        let balancing = Reconfiguration {
            policy,
            load_reports: self.load_reports.is_some() || load_weights.is_some(),
            load_weights,
            hash_header: precedence.choose(
                self.hash_header.clone(),
                config.balancing.hash_header.clone(),
            ),
            // The program can change its split while the channel runs, so the choice between the two is made when one of them changes.
            split: config.balancing.split.clone().unwrap_or_default(),
            outlier_detection: precedence.choose(
                self.outlier_detection.clone(),
                config.balancing.outlier_detection.clone(),
            ),
            health_check: precedence
                .choose(self.health_check.clone(), config.health_check.clone())
                .map(|service| HealthCheck {
                    service,
                    ..self.health_client.clone()
                }),
            subset_size: precedence.choose(self.subset_size, config.balancing.subset_size),
        };
        let methods = ServiceMethods {
            table: &config.methods,
            budget: config.retry_throttling,
            precedence,
        };
        (balancing, MethodConfig::new(&self.methods, Some(methods)))
    }
}

/// Starts the task that applies the service configs of the source. It ends when the returned value is dropped. Open connections stay open,
/// whatever a service config changes.
pub(super) fn follow_source(
    configs: ServiceConfigs,
    program: ProgramOptions,
    shared: Weak<Shared>,
) -> LiveConfig {
    let current = Arc::new(ArcSwapOption::empty());
    let task = follow(configs, program, Arc::clone(&current), shared);
    let task = tokio::spawn(task.in_current_span());
    LiveConfig {
        current,
        _task: StopOnDrop(task.abort_handle()),
    }
}

async fn follow(
    mut configs: ServiceConfigs,
    program: ProgramOptions,
    current: Arc<ArcSwapOption<MethodConfig>>,
    shared: Weak<Shared>,
) {
    let mut last = None;
    while let Some(config) = configs.next().await {
        // A source can also report a change of its status, with the same service config.
        if config == last {
            continue;
        }
        last.clone_from(&config);
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let (balancing, methods) = program.combined(config.as_ref());
        // Without a service config of the source, calls use the settings that the channel was built with.
        current.store(config.map(|_| Arc::new(methods)));
        shared.reconfigure(balancing);
    }
}
