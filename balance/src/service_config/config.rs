//! A service config that was parsed.

use std::fmt;
use std::sync::Arc;

use http::HeaderName;

use crate::balance::{LbPolicy, LoadReports, OutlierDetection, TrafficSplit};
use crate::call::method_config::MethodTable;
use crate::call::retry::RetryBudget;

/// A service config of gRPC: timeouts, retries, hedging, limits on messages, the load-balancing policy and the health check, as the owner of
/// a service sets them for its clients.
///
/// With the feature `service-config`, it is parsed from JSON in [gRPC's format][format]. Unknown fields are ignored, as in other
/// implementations of gRPC. A config with an invalid value is rejected as a whole, and the error names the field. A clone only increments a
/// reference count. The default is an empty config, which sets nothing.
///
/// A channel takes a config from its program (`ChannelBuilder::service_config`) or from its
/// [source](crate::channel::Endpoints::service_configs).
#[cfg_attr(
    feature = "service-config",
    doc = r##"
```
use tonic_balance::channel::ServiceConfig;

let config: ServiceConfig = r#"{
    "methodConfig": [{"name": [{"service": "shop.Orders"}], "timeout": "1.5s"}],
    "loadBalancingConfig": [{"round_robin": {}}]
}"#.parse()?;
let error = r#"{"methodConfig": [{"name": [{}], "timeout": 5}]}"#.parse::<ServiceConfig>();
assert_eq!(
    error.unwrap_err().to_string(),
    r#"methodConfig[0].timeout: expected a duration such as "1.5s", found 5"#,
);
# Ok::<(), tonic_balance::error::ServiceConfigError>(())
```
"##
)]
///
/// [format]: https://github.com/grpc/grpc/blob/master/doc/service_config.md
#[derive(Clone, Default, PartialEq)]
pub struct ServiceConfig(Arc<Parsed>);

/// The fields of a service config.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Parsed {
    pub(crate) methods: MethodTable,
    pub(crate) retry_throttling: Option<RetryBudget>,
    /// The name of the service whose health is watched.
    pub(crate) health_check: Option<String>,
    pub(crate) balancing: LoadBalancing,
    /// The text from which the config was parsed.
    pub(super) json: String,
}

/// The load-balancing policy of a service config, with the policies around it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LoadBalancing {
    pub(crate) policy: Option<LbPolicy>,
    /// The header whose value is the key of a call for the consistent hash.
    pub(crate) hash_header: Option<HeaderName>,
    pub(crate) split: Option<TrafficSplit>,
    /// How the policy computes weights from load reports; `None` if it does not.
    pub(crate) load_weights: Option<LoadReports>,
    pub(crate) outlier_detection: Option<OutlierDetection>,
    /// The number of endpoints to which a channel connects; `None` stands for all.
    pub(crate) subset_size: Option<usize>,
}

impl ServiceConfig {
    #[cfg(feature = "service-config")]
    pub(super) fn new(parsed: Parsed) -> Self {
        Self(Arc::new(parsed))
    }

    /// Returns the text from which the config was parsed. Empty for the default config.
    #[must_use]
    pub fn as_json(&self) -> &str {
        &self.0.json
    }

    pub(crate) fn parsed(&self) -> &Parsed {
        &self.0
    }
}

impl fmt::Debug for ServiceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServiceConfig").field(&self.0.json).finish()
    }
}
