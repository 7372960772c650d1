//! The traffic split: the shares of the calls that groups of endpoints get.

use std::collections::HashSet;
use std::sync::Arc;

use super::select::Criterion;
use crate::attributes::VERSION;

/// Splits the calls of a channel between groups of endpoints by weight, for example 5 % to a new version (a canary) and 95 % to all others.
///
/// Each part has a weight and the labels of its endpoints. The [rest](Self::rest) has all endpoints that belong to no other part. For each
/// attempt of a call, a part is drawn at random by weight, and the [`LbPolicy`](crate::LbPolicy) picks among its endpoints. A call with a
/// [`Select`](crate::channel::Select) ignores the split.
///
/// If no endpoint of a part is ready, its share is distributed to the other parts in proportion to their weights. gRPC's policy
/// `weighted_target` does the same. So a canary that crashes, or is not deployed yet, costs no calls. The same rule applies to the other
/// side: if only the canary is ready, it gets all calls. An endpoint of a part with the weight 0, or of no part, gets no calls at all. If no
/// part with a weight has a ready endpoint, calls fail or wait as if no endpoint were ready.
///
/// The split can be changed while the channel is in use: by the program, see
/// [`BalancedChannel::set_split`](crate::BalancedChannel::set_split), or by the owner of the service, in its
/// [service config](crate::channel::ServiceConfig).
///
/// ```no_run
/// use tonic_balance::BalancedChannel;
/// use tonic_balance::channel::TrafficSplit;
///
/// # fn run() -> Result<(), tonic_balance::error::ChannelError> {
/// let channel = BalancedChannel::builder()
///     .split(TrafficSplit::new().version("1.2", 5).rest(95))
///     .addresses(["10.0.0.5:50051", "10.0.0.6:50051"])
///     .connect_lazy();
/// // Later, without a restart:
/// channel.set_split(TrafficSplit::new().version("1.2", 50).rest(50))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficSplit {
    parts: Vec<(Part, u32)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Selected(Criterion),
    Rest,
}

impl TrafficSplit {
    /// Creates a split without parts. A split without parts has no effect.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a part: the endpoints that have all of these labels, with a weight relative to the other parts.
    #[must_use]
    pub fn part<K: AsRef<str>, V: AsRef<str>>(
        mut self,
        labels: impl IntoIterator<Item = (K, V)>,
        weight: u32,
    ) -> Self {
        let criterion = Criterion::labels(labels);
        // Without labels, the part is the rest, as in the service config.
        let part = match &criterion {
            Criterion::Labels(labels) if labels.is_empty() => Part::Rest,
            _ => Part::Selected(criterion),
        };
        self.parts.push((part, weight));
        self
    }

    /// Adds a part: the endpoints of a version, with a weight relative to the other parts.
    #[must_use]
    pub fn version(self, version: impl AsRef<str>, weight: u32) -> Self {
        self.part([(VERSION, version)], weight)
    }

    /// Adds the rest: the endpoints that belong to no other part, with a weight relative to the other parts.
    #[must_use]
    pub fn rest(mut self, weight: u32) -> Self {
        self.parts.push((Part::Rest, weight));
        self
    }

    /// Returns whether the split has no parts, and therefore no effect.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Returns why the split cannot be used, if it is invalid.
    pub(crate) fn invalid_reason(&self) -> Option<String> {
        if self.parts.len() > MAX_PARTS {
            let parts = self.parts.len();
            return Some(format!(
                "the traffic split has {parts} parts; the limit is {MAX_PARTS}"
            ));
        }
        let criteria = self.criteria();
        let distinct: HashSet<_> = criteria.iter().map(|(criterion, _)| criterion).collect();
        if distinct.len() < criteria.len() {
            return Some("two parts of the traffic split have the same labels".to_owned());
        }
        let no_weight = self.parts.iter().all(|(_, weight)| *weight == 0);
        (no_weight && !self.is_empty())
            .then(|| "all weights of the traffic split are 0, so no call could be sent".to_owned())
    }

    /// Returns the criteria of the parts that have a weight. An endpoint that matches none of them gets no calls.
    pub(super) fn weighted(&self) -> Arc<[Criterion]> {
        let weighted = self
            .criteria()
            .into_iter()
            .filter(|(_, weight)| *weight > 0);
        weighted.map(|(criterion, _)| criterion).collect()
    }

    /// Returns the criterion and the weight of each part.
    pub(crate) fn criteria(&self) -> Vec<(Criterion, u32)> {
        let selected = self.parts.iter().filter_map(|(part, _)| match part {
            Part::Selected(criterion) => Some(criterion.clone()),
            Part::Rest => None,
        });
        let rest = Criterion::Rest(selected.collect());
        let criterion = |part: &Part| match part {
            Part::Selected(criterion) => criterion.clone(),
            Part::Rest => rest.clone(),
        };
        let parts = self.parts.iter();
        parts
            .map(|(part, weight)| (criterion(part), *weight))
            .collect()
    }
}

/// The traffic splits that the program and the service config set. A split without parts stands for none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TrafficSplits {
    pub(crate) of_program: TrafficSplit,
    pub(crate) of_service_config: TrafficSplit,
    /// Whether the split of the service config takes precedence.
    pub(crate) prefers_service_config: bool,
}

impl TrafficSplits {
    /// Returns the split that applies.
    pub(super) fn current(&self) -> &TrafficSplit {
        let (first, second) = if self.prefers_service_config {
            (&self.of_service_config, &self.of_program)
        } else {
            (&self.of_program, &self.of_service_config)
        };
        if first.is_empty() { second } else { first }
    }
}

/// Limit on the number of parts. A pick searches the parts, and the driver keeps a ready set for each.
const MAX_PARTS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_that_could_not_send_a_call_is_invalid() {
        let invalid = |split: TrafficSplit| split.invalid_reason().is_some();
        assert!(!invalid(TrafficSplit::new()));
        assert!(!invalid(TrafficSplit::new().version("1.2", 5).rest(95)));
        assert!(!invalid(TrafficSplit::new().version("1.2", 0).rest(1)));
        assert!(invalid(TrafficSplit::new().version("1.2", 0).rest(0)));
        assert!(invalid(TrafficSplit::new().rest(1).rest(1)));
        assert!(invalid(
            TrafficSplit::new().version("1", 1).version("1", 2).rest(1)
        ));
        let many = (0..=MAX_PARTS).fold(TrafficSplit::new(), |split, part| {
            split.version(part.to_string(), 1)
        });
        assert!(invalid(many));
    }

    #[test]
    fn the_split_that_takes_precedence_applies_unless_it_is_empty() {
        let (program, config) = (TrafficSplit::new().rest(1), TrafficSplit::new().rest(2));
        let current = |of_program: &TrafficSplit, of_service_config: &TrafficSplit, prefers| {
            let splits = TrafficSplits {
                of_program: of_program.clone(),
                of_service_config: of_service_config.clone(),
                prefers_service_config: prefers,
            };
            splits.current().clone()
        };
        let none = TrafficSplit::new();
        assert_eq!(current(&program, &config, false), program);
        assert_eq!(current(&program, &config, true), config);
        for prefers in [false, true] {
            assert_eq!(current(&program, &none, prefers), program);
            assert_eq!(current(&none, &config, prefers), config);
            assert_eq!(current(&none, &none, prefers), none);
        }
    }

    #[test]
    fn a_part_without_labels_is_the_rest() {
        let labels: [(&str, &str); 0] = [];
        assert_eq!(
            TrafficSplit::new().version("1.2", 5).part(labels, 95),
            TrafficSplit::new().version("1.2", 5).rest(95)
        );
    }
}
