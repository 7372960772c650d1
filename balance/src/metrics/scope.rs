//! The recorder and the labels of a channel.

use super::instrument::{BACKEND_SERVICE, Label, TARGET};
use super::selection::Metrics;

/// What all instruments of a channel have in common: the recorder and the labels of the channel.
pub(super) struct Scope {
    pub(super) metrics: Metrics,
    pub(super) target: String,
    pub(super) service: String,
    pub(super) has_zones: bool,
}

impl Scope {
    /// Returns the labels of the channel and `own`.
    pub(super) fn labels<'a>(&'a self, own: &[Label<'a>]) -> Vec<Label<'a>> {
        let mut labels = vec![(TARGET, &*self.target), (BACKEND_SERVICE, &*self.service)];
        labels.extend_from_slice(own);
        labels
    }
}
