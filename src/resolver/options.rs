//! The options of a resolver.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tonic_balance::AddressPolicy;

use super::instances::Limit;
use crate::format::Decoder;
use crate::instance::Instance;
use crate::keyspace::Key;

/// The options that a [`ResolverBuilder`](super::ResolverBuilder) sets.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Options {
    pub(super) decoder: Decoder,
    /// The time for which an instance is held, that is, kept as a last resort after a mass removal.
    pub(super) hold: Option<Duration>,
    /// The maximum time between two reconciliations.
    pub(super) reconcile: Option<Duration>,
    pub(super) filter: Option<Filter>,
    pub(super) limit: Limit,
    /// The directory of the cache file.
    pub(super) cache_dir: Option<PathBuf>,
    /// The instances to use until the first list is complete, if there is no usable cache.
    pub(super) seeds: Vec<Instance>,
    /// The key of the service config, if it is watched.
    pub(super) service_config: Option<Key>,
}

/// A predicate that selects the instances to use.
#[derive(Clone)]
pub(super) struct Filter(Arc<dyn Fn(&Instance) -> bool + Send + Sync>);

impl Filter {
    pub(super) fn new(accepts: impl Fn(&Instance) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(accepts))
    }

    pub(super) fn accepts(&self, instance: &Instance) -> bool {
        (self.0)(instance)
    }
}

/// Two filters are equal if they are clones of each other, because functions cannot be compared.
impl PartialEq for Filter {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filter").finish_non_exhaustive()
    }
}

impl Options {
    pub(super) fn new(policy: AddressPolicy) -> Self {
        Self {
            decoder: Decoder {
                format: None,
                policy,
            },
            hold: Some(HOLD),
            reconcile: Some(RECONCILE),
            filter: None,
            limit: Limit::default(),
            cache_dir: None,
            seeds: Vec::new(),
            service_config: None,
        }
    }
}

/// The default reconciliation interval. The load is negligible: even if every reconciliation listed all names, a thousand clients of a
/// service with a hundred instances would receive about 45 kB per second in total (100 bytes for each instance, every 225 s on average).
const RECONCILE: Duration = Duration::from_secs(300);
/// The default time for which an instance is held, that is, kept as a last resort after a mass removal: twice the default TTL, because a
/// running server that has lost its entry registers again within one TTL.
const HOLD: Duration = Duration::from_secs(30);
