//! Collects changes for the next publication. A publication replaces the ready set, from which calls pick, together with the summary. It
//! also changes the reported state of endpoints that became ready or were removed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::subchannel_table::Class;
use crate::address::Address;
use crate::balance::endpoint::Endpoint;
use crate::balance::summary::{EndpointError, Summary};

/// The changes since the last publication, and the summary for the next one.
#[derive(Debug, Default)]
pub(super) struct PendingPublication {
    summary: Summary,
    /// The time of the next publication, if there are changes.
    publish_at: Option<Instant>,
    /// Endpoints that became ready since the last publication.
    became_ready: Vec<Address>,
    /// Endpoints that were removed since the last publication. The flag is true if calls to the endpoint were in flight when it was
    /// removed. Until the publication, a removed endpoint stays in the list that the channel reports, because a pick can still find it.
    removed: Vec<(Arc<Endpoint>, bool)>,
}

impl PendingPublication {
    pub(super) fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Returns the time of the next publication.
    pub(super) fn next(&self) -> Option<Instant> {
        self.publish_at
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.publish_at.is_some_and(|at| at <= now)
    }

    /// Schedules a publication, or brings a later one forward. If the ready set is large, the publication is delayed by [`BATCH_DELAY`], so that further changes can be
    /// included.
    pub(super) fn soon(&mut self) {
        let delay = if self.summary.ready < SMALL_SET {
            Duration::ZERO
        } else {
            BATCH_DELAY
        };
        self.at(Instant::now() + delay);
    }

    /// Schedules a publication without a delay.
    pub(super) fn now(&mut self) {
        self.publish_at = Some(Instant::now());
    }

    /// Schedules a publication for this time, unless an earlier one is scheduled.
    pub(super) fn at(&mut self, at: Instant) {
        let earliest = self.publish_at.map_or(at, |earlier| earlier.min(at));
        self.publish_at = Some(earliest);
    }

    pub(super) fn clear(&mut self) {
        self.publish_at = None;
    }

    /// Records that the set of endpoints is known. Returns true if the set was not known before.
    pub(super) fn set_known(&mut self) -> bool {
        !std::mem::replace(&mut self.summary.known, true)
    }

    /// Records the number of endpoints.
    pub(super) fn set_endpoints(&mut self, endpoints: usize) {
        self.summary.endpoints = endpoints;
    }

    /// Records the last error of the source of endpoints, which is the stream of changes; `None` if the source works again.
    pub(super) fn set_source_error(&mut self, error: Option<Arc<str>>) {
        self.summary.source_error = error;
    }

    /// Records an error of an endpoint.
    pub(super) fn set_last_error(&mut self, address: Address, reason: Arc<str>) {
        self.summary.last_error = Some(Arc::new(EndpointError { address, reason }));
        self.soon();
    }

    /// Handles a change of the class of an endpoint: ready, pending or failing.
    pub(super) fn on_class(&mut self, address: &Address, before: Class, class: Class) {
        if before == class {
            return;
        }
        if class == Class::Ready {
            self.became_ready.push(address.clone());
        }
        self.summary.pending += usize::from(class == Class::Pending);
        self.summary.pending -= usize::from(before == Class::Pending);
        self.soon();
    }

    /// Handles the removal of an endpoint. `has_calls`: whether calls are in flight to the endpoint.
    pub(super) fn on_removed(&mut self, endpoint: Arc<Endpoint>, class: Class, has_calls: bool) {
        // The last error of a removed endpoint no longer explains why calls fail.
        self.summary
            .last_error
            .take_if(|error| error.address == *endpoint.address());
        self.summary.pending -= usize::from(class == Class::Pending);
        self.removed.push((endpoint, has_calls));
    }

    /// Records the number of ready connections, and returns the summary. Logs a message if the channel has become ready or has lost its
    /// last ready connection.
    pub(super) fn summarize(&mut self, ready: usize, is_last_resort: bool) -> Summary {
        let were_ready = std::mem::replace(&mut self.summary.ready, ready);
        if (were_ready == 0) != (ready == 0) {
            tracing::info!(
                ready,
                endpoints = self.summary.endpoints,
                last_resort = is_last_resort && ready > 0,
                "channel {}",
                if ready > 0 {
                    "ready"
                } else {
                    "has no ready endpoint"
                }
            );
        }
        self.summary.clone()
    }

    /// Takes the endpoints that became ready. Some of them may have stopped being ready in the meantime.
    pub(super) fn take_became_ready(&mut self) -> Vec<Address> {
        std::mem::take(&mut self.became_ready)
    }

    /// Takes the removed endpoints. The flag is true if calls to the endpoint were in flight when it was removed.
    pub(super) fn take_removed(&mut self) -> impl Iterator<Item = (Arc<Endpoint>, bool)> {
        self.removed.drain(..)
    }
}

/// Number of ready connections below which a change is published at once, because the publication of a small set takes only a few
/// microseconds.
const SMALL_SET: usize = 64;
/// Time for which changes to a larger set are collected before they are published.
const BATCH_DELAY: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> Address {
        "10.0.0.5:80".parse().expect("a valid address")
    }

    #[tokio::test(start_paused = true)]
    async fn changes_to_a_large_set_are_collected_unless_they_are_urgent() {
        let now = Instant::now();
        let mut publication = PendingPublication::default();
        publication.soon();
        assert!(publication.is_due(now), "a small set must not wait");
        publication.clear();
        publication.summarize(SMALL_SET, false);
        publication.soon();
        assert_eq!(publication.next(), Some(now + BATCH_DELAY));
        publication.now();
        assert!(publication.is_due(now));
        publication.clear();
        publication.at(now + BATCH_DELAY * 20);
        publication.soon();
        assert_eq!(publication.next(), Some(now + BATCH_DELAY));
    }

    #[tokio::test]
    async fn pending_endpoints_are_counted() {
        let mut publication = PendingPublication::default();
        publication.on_class(&address(), Class::Failing, Class::Pending);
        publication.on_class(&address(), Class::Pending, Class::Pending);
        assert_eq!(publication.summary().pending, 1);
        publication.on_class(&address(), Class::Pending, Class::Ready);
        assert_eq!(publication.summary().pending, 0);
        assert_eq!(publication.take_became_ready(), [address()]);
        publication.on_class(&address(), Class::Ready, Class::Pending);
        let endpoint = Arc::new(Endpoint::new(address()));
        publication.on_removed(endpoint, Class::Pending, true);
        assert_eq!(publication.summary().pending, 0);
    }

    #[tokio::test]
    async fn the_error_of_a_removed_endpoint_is_forgotten() {
        let mut publication = PendingPublication::default();
        publication.set_last_error(address(), "refused".into());
        let other = "10.0.0.6:80".parse().expect("a valid address");
        let other = Arc::new(Endpoint::new(other));
        publication.on_removed(other, Class::Failing, false);
        assert!(publication.summary().last_error.is_some());
        let endpoint = Arc::new(Endpoint::new(address()));
        publication.on_removed(endpoint, Class::Failing, false);
        assert!(publication.summary().last_error.is_none());
        assert_eq!(publication.take_removed().count(), 2);
    }
}
