//! tonic's own balanced channel, fed by a resolver.

use std::collections::HashSet;
use std::time::Duration;

use tokio_stream::StreamExt;
use tonic::transport;
use tonic::transport::channel::Change as StockChange;
use tower::discover::Change;

use crate::address::Address;
use crate::resolver::Resolver;

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
    /// The endpoint's URI is `http://host:port`. For TLS the function has to return one that says `https`: tonic ignores a TLS
    /// configuration otherwise.
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
    let mut inserted = HashSet::new();
    loop {
        let change = tokio::select! {
            biased;
            () = changes.closed() => return,
            change = resolver.next() => change,
        };
        let Some(Ok(change)) = change else {
            return;
        };
        let change = match change {
            // An insert of what is there already would drop the connection and dial again.
            Change::Insert(address, _) if !inserted.insert(address.clone()) => continue,
            Change::Insert(address, _) => match endpoint(&address) {
                Ok(endpoint) => StockChange::Insert(address, configure(endpoint)),
                Err(error) => {
                    tracing::warn!(%address, %error, "skipped an address that makes no endpoint");
                    continue;
                }
            },
            Change::Remove(address) => {
                inserted.remove(&address);
                StockChange::Remove(address)
            }
        };
        if changes.send(change).await.is_err() {
            return;
        }
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
