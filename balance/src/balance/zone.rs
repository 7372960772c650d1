//! Zone preference: computes a factor for each zone, for the callers in one zone. The factor of a zone multiplies the weights of its
//! endpoints. This module performs no I/O.
//!
//! The computation assumes that callers are spread evenly over the zones. With `n` zones, the callers of each zone then make `1 / n` of all
//! calls. This fraction is the *demand* of a zone. The *part* of a zone is its share of all weights, and so the share of all calls that its
//! endpoints can take. If the part of a zone is at least its demand, the zone serves all calls of its own callers. If the part is smaller,
//! the zone serves as many calls of its own callers as its part allows. The remaining calls are sent to zones with spare capacity, in
//! proportion to that capacity. So as few calls as possible leave their zone, and no endpoint gets more calls than its share by weight,
//! even in a small zone. The exception is the few calls that the smallest factor sends to other zones (see [`MAX_FACTOR`]).

use std::collections::BTreeMap;

/// A value for each zone, such as the sum of the weights of its endpoints that can take calls. Endpoints without a zone share a zone with
/// an empty name.
pub(super) type Zones<T> = BTreeMap<Box<str>, T>;

/// Returns the factor of each zone, from 1 to [`MAX_FACTOR`], for callers in the zone `own`. `weights` contains the sum of the weights of
/// each zone.
pub(super) fn factors(own: &str, weights: &Zones<u64>) -> Zones<u32> {
    #[expect(clippy::cast_precision_loss, reason = "53 bits are enough for a part")]
    let float = |weight: u64| weight as f64;
    let total = float(weights.values().sum()).max(1.0);
    #[expect(clippy::cast_precision_loss, reason = "there are few zones")]
    let demand = 1.0 / weights.len().max(1) as f64;
    let part = |weight: &u64| float(*weight) / total;
    let own_part = weights.get(own).map_or(0.0, part);
    if own_part <= 0.0 {
        // No endpoint in the zone of the caller can take calls, so all zones get the same factor.
        return weights
            .keys()
            .map(|zone| (zone.clone(), MAX_FACTOR))
            .collect();
    }
    let kept = (own_part / demand).min(1.0);
    let spare = |weight: &u64| (part(weight) - demand).max(0.0);
    let all_spare: f64 = weights.values().map(spare).sum();
    // The share of the caller's calls that each unit of weight in a zone gets.
    let density = |zone: &str, weight: &u64| {
        if zone == own {
            kept / own_part
        } else if *weight == 0 {
            0.0
        } else {
            (1.0 - kept) * spare(weight) / all_spare.max(f64::MIN_POSITIVE) / part(weight)
        }
    };
    let own_density = kept / own_part;
    let factor = |zone: &str, weight: &u64| {
        let factor = (density(zone, weight) / own_density * f64::from(MAX_FACTOR)).round();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a cast to an integer saturates, and nothing here is negative"
        )]
        let factor = (factor as u32).clamp(1, MAX_FACTOR);
        factor
    };
    let zones = weights.iter();
    zones
        .map(|(zone, weight)| (zone.clone(), factor(zone, weight)))
        .collect()
}

/// The factor of the zone that is used most. The smallest factor is 1, a thousandth of this one. So endpoints in other zones still get a
/// few calls, and their latency is known.
pub(super) const MAX_FACTOR: u32 = 1_000;

#[cfg(test)]
#[expect(
    clippy::cast_precision_loss,
    reason = "the weights of the tests are small"
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn zones(weights: &[u64]) -> Zones<u64> {
        let zone = |(index, weight): (usize, &u64)| (index.to_string().into(), *weight);
        weights.iter().enumerate().map(zone).collect()
    }

    fn of(own: &str, weights: &[u64]) -> Vec<u32> {
        factors(own, &zones(weights)).into_values().collect()
    }

    #[test]
    fn a_zone_with_enough_capacity_keeps_its_calls() {
        assert_eq!(of("0", &[10, 10, 10]), [MAX_FACTOR, 1, 1]);
        assert_eq!(of("1", &[2, 10, 10]), [1, MAX_FACTOR, 1]);
        assert_eq!(of("0", &[7]), [MAX_FACTOR]);
    }

    #[test]
    fn a_small_zone_spills_over_to_zones_with_spare_capacity() {
        // The demand of the small zone is a third of all calls, and its part is an eleventh of all weights. So 3 of 11 calls of its callers
        // stay in the zone, and the two large zones share the others.
        assert_eq!(of("0", &[2, 10, 10]), [MAX_FACTOR, 267, 267]);
        // The other small zone has no spare capacity.
        assert_eq!(of("0", &[2, 2, 18]), [MAX_FACTOR, 1, 296]);
    }

    #[test]
    fn without_local_endpoints_all_zones_have_the_same_factor() {
        assert_eq!(of("0", &[0, 5, 50]), [MAX_FACTOR; 3]);
        assert_eq!(of("unheard of", &[3, 5]), [MAX_FACTOR; 2]);
        assert!(of("0", &[]).is_empty());
    }

    proptest! {
        /// If callers are spread evenly, no zone gets more than its share by weight, however small the zone is.
        #[test]
        fn no_zone_is_overloaded(weights in proptest::collection::vec(1..100_u32, 2..6)) {
            let weights: Vec<_> = weights.into_iter().map(u64::from).collect();
            let total: f64 = weights.iter().sum::<u64>() as f64;
            let mut load = vec![0.0; weights.len()];
            for own in 0..weights.len() {
                let factors = of(&own.to_string(), &weights);
                let drawn = |zone: usize| weights[zone] as f64 * f64::from(factors[zone]);
                let all: f64 = (0..weights.len()).map(drawn).sum();
                for (zone, load) in load.iter_mut().enumerate() {
                    *load += drawn(zone) / all / weights.len() as f64;
                }
            }
            for (zone, load) in load.iter().enumerate() {
                let fair = weights[zone] as f64 / total;
                // The tolerance of 20 % is for the calls that even the smallest factor sends to other zones. These calls add up if one zone
                // is a hundred times as large as another.
                prop_assert!(*load <= fair * 1.2 + 0.001, "{weights:?}: {load} instead of {fair}");
            }
        }
    }
}
