//! The status of a resolver.

use tokio::time::Instant;

use crate::error::EtcdError;
use crate::format::FormatError;
use crate::keyspace::Revision;

/// The status of a resolver: whether its set of instances is in sync with etcd, the last error, and counters.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ResolverStatus {
    /// Whether the set is known and in sync with etcd.
    pub state: ResolverState,
    /// The time at which the resolver entered this state.
    pub since: Instant,
    /// The store revision at which the set was last known to be correct; `None` while the set is unknown. With several prefixes, the lowest
    /// of their revisions.
    pub revision: Option<Revision>,
    /// The last failure. `None` while the state is [`Fresh`](ResolverState::Fresh).
    pub last_error: Option<EtcdError>,
    /// Number of writes since the start whose value could not be decoded or was too large to receive. Each such write is skipped, and
    /// counted once.
    pub rejected_values: u64,
    /// Number of complete lists since the start. More than one per prefix means that a watch could not be resumed.
    pub lists: u64,
    /// Number of watch streams opened since the start.
    pub watches: u64,
    /// Number of reconciliations since the start. A reconciliation compares the keys with a list of their names.
    pub reconciliations: u64,
    /// Number of individual key reads since the start. A key is read if it differed in a reconciliation, or if
    /// [`ResolverFeedback`](crate::resolver::ResolverFeedback) reported its address.
    pub reads: u64,
    /// Number of individual key reads whose result differed from the state of the key that the watch had delivered.
    pub repaired: u64,
    /// Number of instances from the [cache](crate::resolver::ResolverBuilder::cache_dir) or the seeds, while etcd has not answered since the start.
    pub cached: usize,
    /// Number of instances that vanished together with most others and are [held](crate::resolver::ResolverBuilder::mass_removal_protection) now.
    pub held: usize,
    /// Number of mass removals since the start: episodes in which instances were held.
    pub mass_removals: u64,
}

/// A key whose latest value is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RejectedKey {
    /// The key. Bytes that are not UTF-8 are replaced, and control characters are escaped.
    pub key: String,
    /// The revision of the write.
    pub revision: Revision,
    /// The reason, which completes the sentence "the value ...".
    pub reason: FormatError,
}

/// Whether a set of instances is known and in sync with etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResolverState {
    /// The set is not known yet: at least one prefix has not been listed.
    Unknown,
    /// The set is in sync with etcd.
    Fresh,
    /// The set is the last known one. etcd is currently unreachable, or rejects the resolver's requests.
    Stale,
}

impl ResolverStatus {
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let same_error = match (&self.last_error, &other.last_error) {
            (Some(a), Some(b)) => a.is(b),
            (a, b) => a.is_none() && b.is_none(),
        };
        let visible = |status: &Self| {
            (
                status.state,
                status.revision,
                status.rejected_values,
                status.lists,
                status.watches,
                (status.reconciliations, status.reads, status.repaired),
                (status.cached, status.held),
                status.mass_removals,
            )
        };
        same_error && visible(self) == visible(other)
    }
}
