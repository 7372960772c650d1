//! The index of a client among the registered instances of its own service, for the aperture of a channel.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tokio_stream::Stream;
use tonic_balance::Address;
use tonic_balance::channel::PeerIndex;

use crate::instance::Instance;
use crate::resolver::Resolver;

impl Resolver {
    /// Returns the index of a client among the instances of its own service, for
    /// [`ChannelBuilder::aperture`](crate::channel::ChannelBuilder::aperture). `own` is the address under which the client is registered.
    ///
    /// The index is `None` until the client is among the instances, and the channel then has a random subset. The first index is reported at
    /// once, and later changes at most every 5 s, so that the restart of many clients moves fewer connections. A client that is no longer among
    /// the instances, because it shuts down or has lost its registration for a moment, keeps its last index. Instances that are
    /// [held](crate::resolver::ResolverBuilder::mass_removal_protection) count, so a mass removal does not change the index at once.
    ///
    /// All clients must see the same instances, so use a resolver with the same options in each of them. The resolver runs until the last
    /// receiver and the last channel that uses it have been dropped.
    ///
    /// ```no_run
    /// # async fn run(registry: tonic_etcd::Registry) -> Result<(), Box<dyn std::error::Error>> {
    /// use tonic_etcd::Address;
    ///
    /// let own: Address = "10.0.0.5:50051".parse()?;
    /// let peers = registry.resolver("frontend").start().peer_index(async { Some(own) });
    /// let channel = registry.channel("backend").aperture(20, peers).connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A server that registers itself has its address only after it has bound its socket. Its
    /// [handle](crate::registration::RegistrationBuilder::handle) waits for this:
    ///
    /// ```no_run
    /// # async fn run(registry: tonic_etcd::Registry) {
    /// let registration = registry.registration("frontend");
    /// let handle = registration.handle();
    /// let own = async move { handle.address().await };
    /// let peers = registry.resolver("frontend").start().peer_index(own);
    /// let channel = registry.channel("backend").aperture(20, peers).connect_lazy();
    /// // let router = Server::builder().add_service(FrontendServer::new(Frontend::new(channel)));
    /// // router.serve_registered("0.0.0.0:50051".parse()?, registration).await?;
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is called outside a tokio runtime.
    #[must_use]
    pub fn peer_index(
        self,
        own: impl Future<Output = Option<Address>> + Send + 'static,
    ) -> watch::Receiver<Option<PeerIndex>> {
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(follow(self, own, sender));
        receiver
    }
}

/// Reports the index until all receivers are dropped.
async fn follow(
    mut resolver: Resolver,
    own: impl Future<Output = Option<Address>>,
    sender: watch::Sender<Option<PeerIndex>>,
) {
    tokio::select! {
        biased;
        () = sender.closed() => {}
        () = report(&mut resolver, own, &sender) => {}
    }
}

/// Reports the index. Returns only if the address of the client never becomes known.
async fn report(
    resolver: &mut Resolver,
    own: impl Future<Output = Option<Address>>,
    sender: &watch::Sender<Option<PeerIndex>>,
) {
    let Some(own) = own.await else {
        return;
    };
    loop {
        let instances = resolver.instances();
        let index = PeerIndex::among(&own, instances.iter().map(Instance::address));
        if publish(sender, index) {
            tracing::debug!(
                service = resolver.service(),
                ?index,
                "index among the peers"
            );
            sleep(INTERVAL).await;
        }
        changed(resolver).await;
    }
}

/// Publishes an index if it is known and differs from the last one. Returns whether it does.
///
/// A client that shuts down, or whose lease has expired, is no longer among the instances but still makes calls. Without an index, it would dial
/// servers outside its aperture for this short time.
fn publish(sender: &watch::Sender<Option<PeerIndex>>, index: Option<PeerIndex>) -> bool {
    sender.send_if_modified(|current| {
        let is_new = index.is_some() && *current != index;
        if is_new {
            *current = index;
        }
        is_new
    })
}

/// Waits for a change of the instances, and reads all changes that are ready. The stream of a resolver never ends.
async fn changed(resolver: &mut Resolver) {
    let mut has_changed = false;
    poll_fn(|cx| {
        while let Poll::Ready(change) = Pin::new(&mut *resolver).poll_next(cx) {
            if change.is_none() {
                return Poll::Pending;
            }
            has_changed = true;
        }
        if has_changed {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

/// Shortest time between two changes of the index. Each change moves connections of all clients, and a rolling restart of the clients changes
/// the index many times.
const INTERVAL: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_is_no_longer_registered_keeps_its_index() {
        let (sender, receiver) = watch::channel(None);
        assert!(!publish(&sender, None));
        assert!(publish(&sender, PeerIndex::new(1, 3)));
        assert!(!publish(&sender, PeerIndex::new(1, 3)));
        assert!(!publish(&sender, None));
        assert_eq!(*receiver.borrow(), PeerIndex::new(1, 3));
        assert!(publish(&sender, PeerIndex::new(0, 2)));
        assert_eq!(*receiver.borrow(), PeerIndex::new(0, 2));
    }
}
