//! The attributes that a source reports for an endpoint, besides its address.

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
}

impl Attributes {
    /// Returns the default attributes: weight 1, no zone, not a last resort, generation 0.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            weight: 1,
            zone: None,
            last_resort: false,
            generation: 0,
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
