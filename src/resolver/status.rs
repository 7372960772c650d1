//! The status of a resolver.

use std::fmt;

use tokio::time::Instant;

use crate::error::EtcdError;
use crate::format::FormatError;
use crate::keyspace::Revision;

/// The status of a resolver: whether its set of instances is in sync with etcd, the last error, and counters.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResolverStatus {
    /// Whether the set is known and in sync with etcd.
    pub state: ResolverState,
    /// The time at which the resolver entered this state.
    pub since: Instant,
    /// The store revision at which the set was last known to be correct. `None` until every prefix has been listed. With several prefixes,
    /// this is the lowest of their revisions.
    pub revision: Option<Revision>,
    /// The failure that currently prevents a list or a watch. If several prefixes have one, this is the failure of the first of them.
    /// `None` while the state is [`Fresh`](ResolverState::Fresh).
    pub last_error: Option<EtcdError>,
    /// Number of writes since the start whose value is not used: it cannot be decoded, the address policy rejects its address, it is over a
    /// limit, or it is too large to receive. Each write is counted once. Exception: if the resolver has no room to
    /// [remember](crate::Resolver::rejected) the key, the write is counted again with each complete list.
    pub rejected_values: u64,
    /// Number of complete lists since the start. More than one list per prefix means that a prefix was listed again, for example because
    /// its watch could not be resumed.
    pub lists: u64,
    /// Number of watches opened since the start.
    pub watches: u64,
    /// Number of reconciliations since the start. A reconciliation compares the known keys with the keys in etcd.
    pub reconciliations: u64,
    /// Number of reads of individual keys since the start. A key is read if it differed in a reconciliation, or if
    /// [`ResolverFeedback`](crate::resolver::ResolverFeedback) reported its address.
    pub reads: u64,
    /// Number of reads of individual keys whose result differed from what the list and the watch had delivered.
    pub repaired: u64,
    /// Number of instances from the [cache](crate::resolver::ResolverBuilder::cache_dir) or the seeds that are in use. Zero once every
    /// prefix has been listed.
    pub cached: usize,
    /// Number of instances that vanished together with most others and are currently
    /// [kept as a last resort](crate::resolver::ResolverBuilder::mass_removal_protection).
    pub held: usize,
    /// Number of periods since the start in which instances were kept as a last resort.
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
    /// The reason. Its text completes a sentence that begins with "the value".
    pub reason: FormatError,
}

/// Whether a set of instances is known and in sync with etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResolverState {
    /// The set is not known yet: at least one prefix has not been listed, and neither a cache nor seeds are in use.
    Unknown,
    /// The set is in sync with etcd.
    Fresh,
    /// The set is the last known one, or comes from the cache or the seeds. Possible reasons: etcd has not answered yet, is unreachable, or
    /// rejects the requests; the service name is invalid; the task of the resolver has ended.
    Stale,
}

/// One line for people, for example `fresh at revision 4711 for 12s, 2 rejected values`. Numbers that are zero are left out.
impl fmt::Display for ResolverStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.state)?;
        if let Some(revision) = self.revision {
            write!(f, " at revision {revision}")?;
        }
        let age = Instant::now().saturating_duration_since(self.since);
        write!(f, " for {}s", age.as_secs())?;
        for (number, what) in [
            (self.rejected_values, "rejected values"),
            (self.held as u64, "held instances"),
            (self.cached as u64, "instances from the cache or the seeds"),
        ] {
            if number > 0 {
                write!(f, ", {number} {what}")?;
            }
        }
        match &self.last_error {
            Some(error) => write!(f, ", last error: {error}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ResolverState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unknown => "unknown",
            Self::Fresh => "fresh",
            Self::Stale => "stale",
        })
    }
}

impl fmt::Display for RejectedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            key,
            revision,
            reason,
        } = self;
        write!(f, "{key} at revision {revision}: the value {reason}")
    }
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
