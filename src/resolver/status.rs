//! What a resolver tells of itself.

use tokio::time::Instant;

use super::core::Shared;
use crate::error::EtcdError;
use crate::keyspace::Revision;

/// How a resolver's set of instances stands to etcd.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ResolverStatus {
    /// Whether the set is known and up to date.
    pub state: ResolverState,
    /// Since when it is in this state.
    pub since: Instant,
    /// The revision of the store at which the set was last known to be right; the lowest of them over several prefixes.
    pub revision: Revision,
    /// The last failure, while the state is not [`Fresh`](ResolverState::Fresh).
    pub last_error: Option<EtcdError>,
    /// Writes whose value could not be read, since the start. Each is counted once and skipped.
    pub rejected_values: u64,
    /// Complete lists since the start; more than one per prefix means that a watch could not be resumed.
    pub lists: u64,
    /// Watch streams opened since the start.
    pub watches: u64,
    /// Instances that have vanished together with most others, and are [held](crate::ResolverBuilder::mass_removal_hold) for now.
    pub held: usize,
    /// How often instances began to be held, since the start.
    pub mass_removals: u64,
}

/// Whether a set of instances is known and up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResolverState {
    /// Nothing is known yet: etcd has not answered.
    Unknown,
    /// The set is what etcd lists.
    Fresh,
    /// The set is the last one known; etcd cannot be asked right now.
    Stale,
}

impl ResolverStatus {
    pub(super) fn says_the_same(&self, other: &Self) -> bool {
        let same_error = match (&self.last_error, &other.last_error) {
            (Some(a), Some(b)) => a.is(b),
            (a, b) => a.is_none() && b.is_none(),
        };
        let told = |status: &Self| {
            (
                status.state,
                status.revision,
                status.rejected_values,
                status.lists,
                status.watches,
                status.held,
                status.mass_removals,
            )
        };
        same_error && told(self) == told(other)
    }

    pub(super) fn of(shared: &Shared, before: Option<&Self>) -> Self {
        let reports = &shared.reports;
        let last_error = reports.iter().find_map(|report| report.trouble.clone());
        let state = if !reports.iter().all(|report| report.listed) {
            ResolverState::Unknown
        } else if last_error.is_some() {
            ResolverState::Stale
        } else {
            ResolverState::Fresh
        };
        let since = before
            .filter(|before| before.state == state)
            .map_or_else(Instant::now, |before| before.since);
        Self {
            state,
            since,
            revision: reports
                .iter()
                .map(|report| report.revision)
                .min()
                .unwrap_or_default(),
            last_error,
            rejected_values: shared.rejected
                + reports.iter().map(|report| report.oversized).sum::<u64>(),
            lists: reports.iter().map(|report| report.lists).sum(),
            watches: reports.iter().map(|report| report.watches).sum(),
            held: shared.hold.len(),
            mass_removals: shared.hold.episodes(),
        }
    }
}
