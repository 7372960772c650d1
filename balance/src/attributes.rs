//! What a source of endpoints reports about one of them, besides its address.

use std::sync::Arc;

/// The attributes of an endpoint that affect balancing.
///
/// The *address* is the identity of an endpoint. Attributes may change in place: the connections stay.
///
/// ```
/// use tonic_balance::Attributes;
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
    /// Returns the default attributes: weight 1, no zone, generation 0.
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

    /// Sets the zone, for channels with a [zone](crate::ChannelBuilder::zone) of their own. Default none.
    #[must_use]
    pub fn with_zone(mut self, zone: impl Into<Arc<str>>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// Sets whether the endpoint is used only while no other is ready, and only over a connection that already exists. Default `false`.
    ///
    /// It is for a source that may have lost endpoints by mistake, such as a registry whose data was deleted.
    #[must_use]
    pub fn with_last_resort(mut self, last_resort: bool) -> Self {
        self.last_resort = last_resort;
        self
    }

    /// Sets a number that changes whenever the server behind the address was started anew. Default 0.
    ///
    /// When it changes, the channel forgets what it has learned about the endpoint: backoff, ejection and slow start begin again, and a
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

    /// Returns the zone.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// Returns whether the endpoint is used only while no other is ready.
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

/// For sources that report addresses alone.
impl From<()> for Attributes {
    fn from((): ()) -> Self {
        Self::new()
    }
}
