//! Zone preference: factors for the weights of endpoints. They keep calls in the zone of the caller, up to the capacity of that zone.

use crate::balance::zone::{Zones, factors};

/// The factor of each zone, by which the weights of its endpoints are multiplied.
#[derive(Debug)]
pub(super) struct ZonePreference {
    /// The zone of the caller; `None` if no zone is preferred.
    own: Option<Box<str>>,
    factors: Zones<u32>,
}

impl ZonePreference {
    pub(super) fn new(own: Option<Box<str>>) -> Self {
        Self {
            own,
            factors: Zones::new(),
        }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.own.is_some()
    }

    /// Returns the factor for the weight of an endpoint in this zone.
    pub(super) fn factor(&self, zone: Option<&str>) -> u32 {
        if self.own.is_none() {
            return 1;
        }
        let factor = self.factors.get(zone.unwrap_or_default());
        factor.copied().unwrap_or(1)
    }

    /// Computes the factors from the zone and the weight of each endpoint that can take calls. Returns whether a factor has changed.
    pub(super) fn update<'a>(
        &mut self,
        endpoints: impl Iterator<Item = (Option<&'a str>, u64)>,
    ) -> bool {
        let Some(own) = &self.own else {
            return false;
        };
        let mut weights = Zones::<u64>::new();
        for (zone, weight) in endpoints {
            let zone = zone.unwrap_or_default();
            // A lookup comes before the insertion, so that the name of a zone is not copied for each endpoint.
            match weights.get_mut(zone) {
                Some(sum) => *sum = sum.saturating_add(weight),
                None => drop(weights.insert(zone.into(), weight)),
            }
        }
        let factors = factors(own, &weights);
        if factors == self.factors {
            return false;
        }
        tracing::debug!(
            own = &**own,
            ?factors,
            "the factors of the zones have changed"
        );
        self.factors = factors;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::zone::MAX_FACTOR;

    #[test]
    fn the_own_zone_has_the_largest_factor_while_it_has_endpoints() {
        let mut zones = ZonePreference::new(Some("a".into()));
        assert_eq!(zones.factor(Some("a")), 1, "the initial factor must be 1");
        let endpoints = [(Some("a"), 2), (Some("b"), 1), (Some("a"), 1), (None, 1)];
        assert!(zones.update(endpoints.into_iter()));
        assert_eq!(zones.factor(Some("a")), MAX_FACTOR);
        assert_eq!(zones.factor(Some("b")), 1);
        assert!(
            !zones.update(endpoints.into_iter()),
            "equal weights must not change a factor"
        );
        assert!(zones.update([(None, 5)].into_iter()));
        assert_eq!(zones.factor(None), MAX_FACTOR, "all factors must be equal");
    }

    #[test]
    fn without_a_zone_all_factors_are_one() {
        let mut zones = ZonePreference::new(None);
        assert!(!zones.update([(Some("a"), 5)].into_iter()));
        assert_eq!(zones.factor(Some("a")), 1);
    }
}
