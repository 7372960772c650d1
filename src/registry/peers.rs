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
    /// The index is `None` while the client is not among the instances, and the channel then has a random subset. The first index is reported
    /// at once, and later changes at most every 5 s, so that the restart of many clients moves fewer connections. Instances that are
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
        let is_changed = sender.send_if_modified(|current| {
            let before = std::mem::replace(current, index);
            before != index
        });
        if is_changed {
            tracing::debug!(
                service = resolver.service(),
                ?index,
                "index among the peers"
            );
        }
        if index.is_some() {
            sleep(INTERVAL).await;
        }
        changed(resolver).await;
    }
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
