//! A resolver as the source of endpoints for tonic's own balanced channel.

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
    /// Creates tonic's own balanced channel over the instances of this resolver, with plaintext endpoints.
    ///
    /// The resolver feeds the channel until the last clone of the channel is dropped. The resolver is then dropped as well, which ends its
    /// watch, unless another resolver or channel shares this watch. A changed attribute (weight, metadata, a new lease) causes no
    /// reconnect.
    ///
    /// The channel has the limits of tonic's implementation. It picks an endpoint at random, and treats an endpoint that refuses
    /// connections as ready. While there is no endpoint, a call waits, even beyond its deadline. Wrap calls in [`tokio::time::timeout`] if
    /// this matters.
    ///
    /// # Panics
    ///
    /// Panics if it is called outside a tokio runtime.
    #[must_use]
    pub fn into_tonic_channel(self) -> transport::Channel {
        self.into_tonic_channel_with(|endpoint| endpoint)
    }

    /// Creates the channel as [`into_tonic_channel`](Self::into_tonic_channel) does. Each endpoint is passed through `configure`, which can
    /// set its options. The connect timeout of an endpoint is 10 s unless `configure` changes it.
    ///
    /// The URI of the endpoint is `http://host:port`. For TLS, which requires a feature of tonic, `configure` must return an endpoint with
    /// an `https` URI, because tonic ignores the TLS configuration of other endpoints.
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
    /// Panics if it is called outside a tokio runtime.
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

/// Sends the resolver's changes to the channel until the channel is dropped.
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
                        tracing::warn!(%address, %error, "skipped an address that is not a valid endpoint");
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

/// Waits for changes, and returns all changes that are available.
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

/// The endpoints that the channel has received.
#[derive(Debug, Default)]
struct Set {
    registered: HashSet<Address>,
    /// The addresses of held instances: they are gone from etcd, and the resolver keeps them as a last resort. The channel keeps them only
    /// while no instance is registered, because tonic's channel treats a dead endpoint as ready and sends calls to it.
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
                // A last-resort instance that the channel does not have is not added. The channel would dial it, and its address may belong
                // to another server by now.
                Change::Insert(address, instance) if instance.is_last_resort() => {
                    if self.registered.remove(&address) {
                        self.held.insert(address);
                    }
                }
                // An insert for an existing endpoint would make the channel drop the connection and dial again.
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

/// Capacity of the queue of changes. The capacity has no effect on the result, because `feed` waits while the queue is full.
const CHANGES: usize = 64;
/// Timeout of a connection attempt. An attempt fails after this time if all packets to an address are dropped. The value is the same as in
/// tonic-xds, and is half of the 20 s that gRPC's connection backoff document sets for a first attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        Address::try_from(std::net::SocketAddr::from(([127, 0, 0, 1], port))).expect("an address")
    }

    fn insert(port: u16, held: bool) -> Change<Address, Instance> {
        let instance = Instance::new(address(port)).with_last_resort(held);
        Change::Insert(address(port), instance)
    }

    fn remove(port: u16) -> Change<Address, Instance> {
        Change::Remove(address(port))
    }

    #[test]
    fn held_instances_stay_only_while_no_other_is_registered() {
        let mut set = Set::default();
        let all = (1..=4).map(|port| insert(port, false)).collect();
        assert_eq!(set.apply(all).len(), 4);
        let lost = vec![remove(1), insert(2, true), remove(3)];
        let steps = [1, 3, 2].map(|port| Step::Remove(address(port)));
        assert_eq!(
            set.apply(lost),
            steps,
            "held instances must be removed while the fourth instance is registered"
        );
        assert_eq!(
            set.apply(vec![insert(4, true)]),
            [],
            "the last instance must stay"
        );
        let back = vec![insert(1, false)];
        let steps = [Step::Insert(address(1)), Step::Remove(address(4))];
        assert_eq!(set.apply(back), steps);
    }

    #[test]
    fn an_instance_is_dialled_only_when_it_is_registered_and_has_no_connection() {
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
