//! What those who connect to instances can tell the resolver.

use std::sync::Arc;

use tokio::sync::mpsc;

use tonic_balance::Address;

/// Tells a [`Resolver`](crate::Resolver) that an address it announces refuses connections; made by
/// [`Resolver::feedback`](crate::Resolver::feedback).
///
/// An instance whose key is gone is removed as soon as the watch says so. This is for the case that the watch has lost it: each report has
/// the keys of the address read once, at a random moment within 2 s, and what is found is the truth: the instance goes, or changes, or
/// stays as it is. A key is read every 10 s at most, and a resolver reads ten keys a second at most, so that a fleet that goes down
/// together costs etcd no more than a server that does.
///
/// A handle does not keep the resolver's watch open. Cloning is a reference count.
#[derive(Clone, Debug)]
pub struct ResolverFeedback(Arc<[mpsc::Sender<Address>]>);

impl ResolverFeedback {
    pub(super) fn new(prefixes: Vec<mpsc::Sender<Address>>) -> Self {
        Self(prefixes.into())
    }

    /// Reports that a connection to the address was refused, or lost at once. To be called once for each attempt, of which a backoff
    /// makes few. It never waits; when too much is reported at once some of it is dropped.
    pub fn refused(&self, address: &Address) {
        for prefix in &*self.0 {
            // Full, or the resolver is gone. What goes on refusing connections is reported again.
            let _ = prefix.try_send(address.clone());
        }
    }
}

/// The way to one prefix's task.
pub(super) fn channel() -> (mpsc::Sender<Address>, mpsc::Receiver<Address>) {
    mpsc::channel(REPORTS)
}

/// More than the task would act on at once.
const REPORTS: usize = 256;
