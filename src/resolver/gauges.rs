//! The gauges of a resolver.

use super::status::ResolverState;
use super::store::Core;
use crate::keyspace::Revision;
use crate::metrics::{
    CONNECTED, GaugeSource, INSTANCES, Instrument, Label, SERVICE_CONFIG_REVISION, STATE, TARGET,
};

/// The gauges are read from the store, until the last subscription and the last handle are dropped.
impl GaugeSource for Core {
    #[expect(
        clippy::cast_precision_loss,
        reason = "numbers of instances and revisions are below 2^53"
    )]
    fn observe(&self, instrument: &'static Instrument, observe: &mut dyn FnMut(&[Label<'_>], f64)) {
        let target = (TARGET, &*self.target);
        if std::ptr::eq(instrument, &raw const CONNECTED) {
            let is_fresh = self.status.borrow().state == ResolverState::Fresh;
            return observe(&[target], f64::from(u8::from(is_fresh)));
        }
        if std::ptr::eq(instrument, &raw const SERVICE_CONFIG_REVISION) {
            if let Some(config) = self.service_config() {
                let revision = config.revision.map_or(0, Revision::get);
                observe(&[target], revision as f64);
            }
            return;
        }
        let shared = self.lock();
        let announced = shared.instances().count();
        let (held, rejected) = (shared.hold.len(), shared.registered.rejected().count());
        drop(shared);
        for (state, count) in [
            ("announced", announced),
            ("held", held),
            ("rejected", rejected),
        ] {
            observe(&[target, (STATE, state)], count as f64);
        }
    }
}

/// The gauges of a resolver.
pub(super) const GAUGES: [&Instrument; 3] = [&CONNECTED, &INSTANCES, &SERVICE_CONFIG_REVISION];
