//! tonic's own balanced channel, fed by a resolver.

use std::collections::HashSet;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio_stream::Stream;
use tonic::transport;
use tonic::transport::channel::Change as StockChange;
use tower::discover::Change;

use crate::instance::Instance;
use crate::resolver::Resolver;
use tonic_balance::Address;

impl Resolver {
    /// Feeds tonic's own balanced channel, with plaintext endpoints.
    ///
    /// The channel follows the registry for as long as it, or a clone of it, lives; then the watch ends. Attributes that change in place
    /// (weight, metadata, a renewed lease) reconnect nothing.
    ///
    /// The channel is tonic's, with its limits: it chooses at random, takes an endpoint that refuses connections for one that is
    /// ready, and with no endpoint at all a call waits until there is one, past the deadline it may have been given: put calls under
    /// [`tokio::time::timeout`] where that matters.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn into_tonic_channel(self) -> transport::Channel {
        self.into_tonic_channel_with(|endpoint| endpoint)
    }

    /// As [`into_tonic_channel`](Self::into_tonic_channel), with options for each endpoint. Its connect timeout is 10 s unless changed
    /// here.
    ///
    /// The endpoint's URI is `http://host:port`. For TLS, which is a feature of tonic's own, the function has to return one that
    /// says `https`: tonic ignores a TLS configuration otherwise.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # fn run(resolver: tonic_etcd::Resolver) {
    /// let channel = resolver.into_tonic_channel_with(|endpoint| endpoint.timeout(Duration::from_secs(5)));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn into_tonic_channel_with<F>(self, configure: F) -> transport::Channel
    where
        F: Fn(transport::Endpoint) -> transport::Endpoint + Send + 'static,
    {
        let (channel, changes) = transport::Channel::balance_channel(CHANGES);
        tokio::spawn(feed(self, changes, configure));
        channel
    }
}

/// Hands the resolver's changes to the channel until that is gone.
async fn feed(
    mut resolver: Resolver,
    changes: tokio::sync::mpsc::Sender<StockChange<Address, transport::Endpoint>>,
    configure: impl Fn(transport::Endpoint) -> transport::Endpoint,
) {
    let mut set = Set::default();
    loop {
        let batch = tokio::select! {
            biased;
            () = changes.closed() => return,
            batch = batch(&mut resolver) => batch,
        };
        for step in set.apply(batch) {
            let change = match step {
                Step::Insert(address) => match endpoint(&address) {
                    Ok(endpoint) => StockChange::Insert(address, configure(endpoint)),
                    Err(error) => {
                        tracing::warn!(%address, %error, "skipped an address that makes no endpoint");
                        continue;
                    }
                },
                Step::Remove(address) => StockChange::Remove(address),
            };
            if changes.send(change).await.is_err() {
                return;
            }
        }
    }
}

/// Waits for changes, and takes all that are there.
async fn batch(resolver: &mut Resolver) -> Vec<Change<Address, Instance>> {
    let mut batch = Vec::new();
    poll_fn(|cx| {
        while let Poll::Ready(Some(Ok(change))) = Pin::new(&mut *resolver).poll_next(cx) {
            batch.push(change);
        }
        if batch.is_empty() {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
    batch
}

/// What the channel has been given.
#[derive(Debug, Default)]
struct Set {
    registered: HashSet<Address>,
    /// Those that have vanished together with most others. They stay only while there is nothing else: the channel takes an endpoint that
    /// is dead for one that is ready.
    held: HashSet<Address>,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Insert(Address),
    Remove(Address),
}

impl Set {
    fn apply(&mut self, batch: Vec<Change<Address, Instance>>) -> Vec<Step> {
        let mut steps = Vec::new();
        for change in batch {
            match change {
                // One that is not in the channel would be dialled, and its address may be somebody else's by now.
                Change::Insert(address, instance) if instance.is_last_resort() => {
                    if self.registered.remove(&address) {
                        self.held.insert(address);
                    }
                }
                // An insert of what is there already would drop the connection and dial again.
                Change::Insert(address, _) => {
                    let there = self.held.remove(&address);
                    if self.registered.insert(address.clone()) && !there {
                        steps.push(Step::Insert(address));
                    }
                }
                Change::Remove(address) => {
                    if self.registered.remove(&address) || self.held.remove(&address) {
                        steps.push(Step::Remove(address));
                    }
                }
            }
        }
        if !self.registered.is_empty() {
            steps.extend(self.held.drain().map(Step::Remove));
        }
        steps
    }
}

fn endpoint(address: &Address) -> Result<transport::Endpoint, transport::Error> {
    let endpoint = transport::Endpoint::from_shared(format!("http://{address}"))?;
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT))
}

/// Changes on their way to the channel. The resolver keeps what does not fit, so the number decides nothing.
const CHANGES: usize = 64;
/// As tonic-xds has it, half of what gRPC's connection backoff document gives a first try: an address whose packets are dropped is
/// known to be dead after it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        Address::from(std::net::SocketAddr::from(([127, 0, 0, 1], port)))
    }

    fn insert(port: u16, held: bool) -> Change<Address, Instance> {
        let instance = Instance::new(address(port)).with_last_resort(held);
        Change::Insert(address(port), instance)
    }

    fn remove(port: u16) -> Change<Address, Instance> {
        Change::Remove(address(port))
    }

    #[test]
    fn held_instances_stay_only_while_there_is_no_other() {
        let mut set = Set::default();
        let all = (1..=4).map(|port| insert(port, false)).collect();
        assert_eq!(set.apply(all).len(), 4);
        let lost = vec![remove(1), insert(2, true), remove(3)];
        let steps = [1, 3, 2].map(|port| Step::Remove(address(port)));
        assert_eq!(set.apply(lost), steps, "the fourth is registered");
        assert_eq!(set.apply(vec![insert(4, true)]), [], "it is all there is");
        let back = vec![insert(1, false)];
        let steps = [Step::Insert(address(1)), Step::Remove(address(4))];
        assert_eq!(set.apply(back), steps);
    }

    #[test]
    fn one_that_comes_back_is_not_dialled_again_and_one_that_is_not_there_never() {
        let mut set = Set::default();
        assert_eq!(set.apply(vec![insert(1, true)]), []);
        assert_eq!(set.apply(vec![remove(1)]), []);
        assert_eq!(set.apply(vec![insert(2, false)]).len(), 1);
        assert_eq!(set.apply(vec![insert(2, true)]), []);
        assert_eq!(set.apply(vec![insert(2, false)]), []);
        assert_eq!(
            set.apply(vec![insert(2, true), remove(2), insert(2, false)]),
            [Step::Remove(address(2)), Step::Insert(address(2))]
        );
    }
}
