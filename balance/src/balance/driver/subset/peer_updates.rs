//! The index of the client among its peers, as the program reports it.

use tokio::sync::watch;

use crate::balance::peer_index::PeerIndex;

/// The current index of the client, and its changes. Without an aperture, there is no index and no change.
#[derive(Debug)]
pub(in crate::balance::driver) struct PeerUpdates(Option<watch::Receiver<Option<PeerIndex>>>);

impl PeerUpdates {
    pub(in crate::balance::driver) fn new(
        peers: Option<watch::Receiver<Option<PeerIndex>>>,
    ) -> Self {
        Self(peers)
    }

    /// Returns the current index; `None` if it is unknown.
    pub(in crate::balance::driver) fn current(&mut self) -> Option<PeerIndex> {
        *self.0.as_mut()?.borrow_and_update()
    }

    /// Waits until the index has changed since [`current`](Self::current) was called. After the sender is dropped, the last index stays
    /// valid, and the future never completes.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no change.
    pub(in crate::balance::driver) async fn changed(&mut self) {
        if let Some(peers) = &mut self.0
            && peers.changed().await.is_ok()
        {
            return;
        }
        std::future::pending::<()>().await;
    }
}
