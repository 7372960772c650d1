//! Zone preference: weights that keep calls in the caller's zone, up to the capacity of that zone.

use super::driver::{Driver, EndpointEntry, SubchannelId};
use crate::balance::zone::{Zones, factors};

impl Driver {
    /// Returns the factor that an endpoint's weight is multiplied with.
    pub(super) fn zone_factor(&self, entry: &EndpointEntry) -> u32 {
        if self.options.zone.is_none() {
            return 1;
        }
        let zone = entry.attributes.zone().unwrap_or_default();
        self.zones.get(zone).copied().unwrap_or(1)
    }

    /// Recomputes the factors from the weights of the ready connections.
    pub(super) fn weigh_zones(&mut self) {
        let Some(own) = &self.options.zone else {
            return;
        };
        let mut weights = Zones::<u64>::new();
        for entry in self.endpoints.values() {
            let ready = |id: &&SubchannelId| self.primary.contains(id);
            let connections = entry.subchannels.iter().filter(ready).count();
            let weight = u64::from(entry.attributes.weight()).saturating_mul(connections as u64);
            let zone = entry.attributes.zone().unwrap_or_default();
            // The lookup before the insertion avoids a copy of the zone's name for each of its endpoints.
            match weights.get_mut(zone) {
                Some(sum) => *sum = sum.saturating_add(weight),
                None => drop(weights.insert(zone.into(), weight)),
            }
        }
        let factors = factors(own, &weights);
        if factors == self.zones {
            return;
        }
        tracing::debug!(
            own = &**own,
            ?factors,
            "the weights of the zones have changed"
        );
        self.zones = factors;
        let all: Vec<_> = self.subchannels.keys().copied().collect();
        for id in all {
            self.update_ready_set(id);
        }
    }
}
