//! The handle that reports refused connections to a resolver.

use std::sync::Arc;

use tokio::sync::mpsc;

use tonic_balance::Address;

/// Handle that reports to a [`Resolver`](crate::Resolver) that an address refuses connections. Returned by
/// [`Resolver::feedback`](crate::Resolver::feedback).
///
/// Normally, an instance is removed when the watch delivers the delete of its key. Feedback covers the case that the watch has lost the
/// delete. After a report, each key whose value contains the address is read once. The resolver applies the result: the instance is
/// removed, updated, or left unchanged. The read becomes due at a random time within 2 s. For each of its prefixes, a resolver reads at
/// most ten keys per second. This limits the load on etcd even if a whole fleet fails at once. For 10 s after a report about a key,
/// further reports about this key are ignored.
///
/// A handle does not keep the resolver's watch open. A clone is cheap: it increments a reference count.
#[derive(Clone, Debug)]
pub struct ResolverFeedback(Arc<[mpsc::Sender<Address>]>);

impl ResolverFeedback {
    pub(super) fn new(prefixes: Vec<mpsc::Sender<Address>>) -> Self {
        Self(prefixes.into())
    }

    /// Reports that a connection to the address was refused, or was lost as soon as it was open. Call this function once per failed
    /// connection attempt. With a backoff between attempts, the reports are rare. This function never waits: a report is dropped if too
    /// many reports are pending.
    pub fn refused(&self, address: &Address) {
        for prefix in &*self.0 {
            // An error means that the queue is full or that the resolver was dropped. An address that keeps refusing connections is
            // reported again.
            let _ = prefix.try_send(address.clone());
        }
    }
}

/// Creates the queue over which the task of one prefix receives reports.
pub(super) fn channel() -> (mpsc::Sender<Address>, mpsc::Receiver<Address>) {
    mpsc::channel(REPORTS)
}

/// Number of reports that the queue can hold. While 100 reads are pending, reports are dropped anyway, so a longer queue would not cause
/// more reads.
const REPORTS: usize = 256;
