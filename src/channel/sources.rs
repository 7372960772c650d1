//! Channels whose endpoints come from the program: a stream of changes, or a list of addresses.

use tokio_stream::Stream;
use tower::discover::Change;

use super::{BalancedChannel, ChannelBuilder};
use crate::address::{Address, AddressError};
use crate::balance::Feed;
use crate::instance::Instance;

impl ChannelBuilder {
    /// Takes the endpoints from a stream of changes, of a [`Resolver`](crate::Resolver) or of any other source. What it says first makes the set known; an
    /// error changes nothing but the log; at its end the set stays as it is.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn from_discover<D, E>(self, discover: D) -> BalancedChannel
    where
        D: Stream<Item = Result<Change<Address, Instance>, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        self.build(Feed::new(discover), None)
    }

    /// Takes fixed endpoints, each `host:port`, `http://host:port` (`https://` with TLS configured) or `unix:/path`.
    ///
    /// If one address cannot be used (another form, `http://` with TLS configured, `https://` without), the channel is
    /// [invalid](crate::ChannelError::InvalidOption): an error is logged, and every call fails with `UNAVAILABLE` and names the address.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn from_addresses<I>(self, addresses: I) -> BalancedChannel
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let mut this = self;
        let mut inserts = Vec::new();
        for address in addresses {
            match this.address(address.as_ref()) {
                Ok(address) => {
                    let instance = Instance::new(address.clone());
                    inserts.push(Ok::<_, std::convert::Infallible>(Change::Insert(
                        address, instance,
                    )));
                }
                Err(reason) => this.refuse(reason),
            }
        }
        this.connector.own_addresses = true;
        this.build(Feed::new(tokio_stream::iter(inserts)), None)
    }

    /// Reads an address, or the URI that a user of tonic's `Channel` has in its place.
    fn address(&self, given: &str) -> Result<Address, String> {
        let is_tls = self.connector.is_tls();
        let address = match given.split_once("://") {
            Some(("http", _)) if is_tls => {
                return Err(format!(
                    "{given:?} is plaintext, and TLS is configured; write https://"
                ));
            }
            Some(("https", _)) if !is_tls => {
                return Err(format!(
                    "{given:?} wants TLS, and none is configured; call `tls` first"
                ));
            }
            Some(("http" | "https", rest)) => rest.strip_suffix('/').unwrap_or(rest),
            _ => given,
        };
        address
            .parse()
            .map_err(|error: AddressError| error.to_string())
    }
}
