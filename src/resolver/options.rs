//! The options of a resolver.

use std::sync::Arc;
use std::time::Duration;

use tonic_balance::AddressPolicy;

use crate::format::Decoder;
use crate::instance::Instance;

/// What a resolver does in its own way.
#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) decoder: Decoder,
    pub(super) hold: Option<Duration>,
    pub(super) reconcile: Option<Duration>,
    pub(super) filter: Option<Filter>,
}

/// Which instances are used.
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
        }
    }
}

/// Seldom enough to be no load: a thousand clients of a service with a hundred instances list 0.3 MB a second together.
const RECONCILE: Duration = Duration::from_secs(300);
/// Twice the default TTL: a server whose registration was lost has it back within a TTL.
const HOLD: Duration = Duration::from_secs(30);
