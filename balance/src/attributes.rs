//! The attributes that a source reports for an endpoint, besides its address.

use std::collections::BTreeMap;
use std::sync::Arc;

/// The attributes of an endpoint that affect balancing.
///
/// The *address* is the identity of an endpoint. Its attributes may change while its connections stay open.
///
/// ```
/// use tonic_balance::channel::Attributes;
///
/// let attributes = Attributes::new().with_weight(3).with_zone("eu-1a");
/// assert_eq!(attributes.weight(), 3);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    weight: u32,
    zone: Option<Arc<str>>,
    last_resort: bool,
    generation: u64,
    /// `None` if there are no labels, so that endpoints without labels use no memory for them.
    labels: Option<Arc<BTreeMap<Box<str>, Box<str>>>>,
    hash_key: Option<Arc<str>>,
}

impl Attributes {
    /// Returns the default attributes: weight 1, no zone, no labels, not a last resort, generation 0.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            weight: 1,
            zone: None,
            last_resort: false,
            generation: 0,
            labels: None,
            hash_key: None,
        }
    }

    /// Sets the weight: the endpoint's share of the calls relative to other endpoints. Default 1; 0 counts as 1.
    #[must_use]
    pub fn with_weight(mut self, weight: u32) -> Self {
        self.weight = weight.max(1);
        self
    }

    /// Sets the zone. The zone affects only channels that have a [zone](crate::channel::ChannelBuilder::zone). Default: no zone.
    #[must_use]
    pub fn with_zone(mut self, zone: impl Into<Arc<str>>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// Sets a label, by which a [`Select`](crate::channel::Select) or a [`TrafficSplit`](crate::channel::TrafficSplit) selects endpoints. A
    /// second value for the same key replaces the first. Default: no labels.
    #[must_use]
    pub fn with_label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        let labels = Arc::make_mut(self.labels.get_or_insert_default());
        labels.insert(key.into().into_boxed_str(), value.into().into_boxed_str());
        self
    }

    /// Sets the version: the label `version`.
    #[must_use]
    pub fn with_version(self, version: impl Into<String>) -> Self {
        self.with_label(VERSION, version)
    }

    /// Sets the name of the endpoint for [`LbPolicy::RingHash`](crate::LbPolicy::RingHash). An endpoint keeps its keys as long as it keeps
    /// this name, even under another address. Two endpoints with the same name share their keys. Default: the address.
    #[must_use]
    pub fn with_hash_key(mut self, hash_key: impl Into<Arc<str>>) -> Self {
        self.hash_key = Some(hash_key.into());
        self
    }

    /// Sets whether the endpoint is a last resort. A last resort is used only while no other endpoint is ready, and only over a connection
    /// that already exists. Default `false`.
    ///
    /// A source sets this for an endpoint that it may have lost by mistake, for example because the data of the registry was deleted.
    #[must_use]
    pub fn with_last_resort(mut self, last_resort: bool) -> Self {
        self.last_resort = last_resort;
        self
    }

    /// Sets a number that changes each time the server at the address is started again. Default 0.
    ///
    /// When the number changes, the channel discards what it has observed about the endpoint. The backoff between dials ends. An ejection
    /// by outlier detection ends as well, and so does a quarantine after responses that are not gRPC. Slow start applies again. A
    /// connection that does not answer is replaced.
    #[must_use]
    pub fn with_generation(mut self, generation: u64) -> Self {
        self.generation = generation;
        self
    }

    /// Returns the weight, at least 1.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// Returns the zone, if any.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// Returns the value of a label, if any. For the key `zone`, returns the [zone](Self::zone), or else the label with this key.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        let zone = self.zone().filter(|_| key == ZONE);
        let label = || Some(&**self.labels.as_ref()?.get(key)?);
        zone.or_else(label)
    }

    /// Returns the version: the label `version`, if any.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        self.label(VERSION)
    }

    /// Returns the labels, sorted by key.
    pub fn labels(&self) -> impl Iterator<Item = (&str, &str)> {
        let labels = self.labels.iter().flat_map(|labels| labels.iter());
        labels.map(|(key, value)| (&**key, &**value))
    }

    /// Returns the name of the endpoint for [`LbPolicy::RingHash`](crate::LbPolicy::RingHash); `None` stands for the address.
    #[must_use]
    pub fn hash_key(&self) -> Option<&str> {
        self.hash_key.as_deref()
    }

    /// Returns whether the endpoint is used only while no other endpoint is ready.
    #[must_use]
    pub fn is_last_resort(&self) -> bool {
        self.last_resort
    }

    /// Returns the generation.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl Default for Attributes {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns the default attributes, for sources that report only addresses.
impl From<()> for Attributes {
    fn from((): ()) -> Self {
        Self::new()
    }
}

/// The label of the version.
pub(crate) const VERSION: &str = "version";
/// The key under which the zone counts as a label.
const ZONE: &str = "zone";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_and_the_zone_count_as_labels() {
        let attributes = Attributes::new()
            .with_version("1.2")
            .with_zone("a")
            .with_label("rack", "7");
        let label = |key| attributes.label(key);
        assert_eq!(label("version"), Some("1.2"));
        assert_eq!(label("zone"), Some("a"));
        assert_eq!(label("rack"), Some("7"));
        assert_eq!(label("tier"), None);
        let attributes = attributes.with_label("zone", "b");
        assert_eq!(attributes.label("zone"), Some("a"));
        let attributes = Attributes::new().with_label("zone", "b");
        assert_eq!(attributes.label("zone"), Some("b"));
        assert_eq!(attributes.zone(), None);
        let labels: Vec<_> = attributes.labels().collect();
        assert_eq!(labels, [("zone", "b")]);
    }
}
