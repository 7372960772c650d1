//! What a resolver tells of itself.

use tokio::time::Instant;

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
    /// How often the keys have been compared with a list of their names, since the start.
    pub reconciliations: u64,
    /// Keys read one by one, since the start: a comparison had them otherwise, or [`ResolverFeedback`](crate::ResolverFeedback) had put them in doubt.
    pub reads: u64,
    /// Those of them that were not as the watch had told.
    pub repaired: u64,
    /// Instances that have vanished together with most others, and are [held](crate::ResolverBuilder::mass_removal_protection) for now.
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
                (status.reconciliations, status.reads, status.repaired),
                status.held,
                status.mass_removals,
            )
        };
        same_error && told(self) == told(other)
    }
}
