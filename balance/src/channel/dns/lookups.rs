//! A source of endpoints that looks up a name with the system's resolver.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tower::BoxError;

use super::task::{self, Changes, Found, INTERVAL};
use crate::channel::source::{EndpointSource, Endpoints, ServerName, SourceContext, parse};

/// A source of endpoints that looks up the addresses of a name in the DNS, for example those of a headless service of Kubernetes.
///
/// Each IPv4 and each IPv6 address is an endpoint. So a server that has one of each counts as two endpoints. The name is looked up
///
/// - at the start,
/// - every [`interval`](Self::interval), 30 s by default,
/// - after the end of a connection, and after a failed attempt to connect, because endpoints may have moved, but not within 5 s of the start
///   of the last successful lookup.
///
/// The lookups use the resolver of the operating system (`getaddrinfo`), and so `/etc/hosts` and `/etc/resolv.conf`. If a lookup fails, or
/// its answer contains no address, the endpoints stay as they are. The lookup is then repeated after 1 s, 2 s, 4 s and so on, at most after
/// the interval. The errors of calls that find no endpoint contain the failure.
///
/// The name is the server name for TLS, unless the TLS configuration contains another one, and the authority of calls.
///
/// ```no_run
/// use std::time::Duration;
/// use tonic_balance::BalancedChannel;
/// use tonic_balance::channel::Dns;
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let dns = Dns::new("greeter.default.svc.cluster.local:50051").interval(Duration::from_secs(10));
/// let channel = BalancedChannel::builder().source(dns).connect().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Dns {
    name: String,
    interval: Duration,
    pub(super) lookup: LookupHost,
}

pub(super) type Answer = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// The function that looks up a host and a port.
pub(super) type LookupHost = Arc<dyn Fn(String, u16) -> Answer + Send + Sync>;

impl Dns {
    /// Creates a source for a name in the form `host:port`, `http://host:port`, or, with TLS configured, `https://host:port`. If the name
    /// has another form, the channel is [invalid](crate::error::ChannelError::InvalidOption).
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            interval: INTERVAL,
            lookup: Arc::new(|host, port| {
                Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
            }),
        }
    }

    /// Sets the interval between two lookups. Default 30 s; values below 5 s count as 5 s.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns")
            .field("name", &crate::address::without_password(&self.name))
            .field("interval", &self.interval)
            .finish_non_exhaustive()
    }
}

impl EndpointSource for Dns {
    type Attributes = ();
    type Error = Infallible;
    type Stream = Changes<()>;

    fn start(self, context: &SourceContext) -> Result<Endpoints<Self::Stream>, BoxError> {
        let address = parse(&self.name, context.tls)?;
        let Some((host, port)) = address.host_and_port() else {
            return Err(format!("{address} is a Unix socket, which has no name to look up").into());
        };
        let addresses = Addresses {
            host: host.to_owned(),
            port,
            lookup: self.lookup,
        };
        let policy = context.policy.clone();
        let mut endpoints = task::start(address.to_string(), addresses, self.interval, policy);
        endpoints.name = Some(ServerName {
            host: host.into(),
            authority: address.to_string(),
        });
        Ok(endpoints)
    }
}

/// Looks up the addresses of a host.
struct Addresses {
    host: String,
    port: u16,
    lookup: LookupHost,
}

impl task::Lookup for Addresses {
    type Attributes = ();

    async fn lookup(&mut self) -> Result<Found<()>, String> {
        let answer = (self.lookup)(self.host.clone(), self.port).await;
        let addresses = answer.map_err(|error| error.to_string())?;
        Ok(Found {
            endpoints: addresses.into_iter().map(|address| (address, ())).collect(),
            // The system's resolver does not return it.
            ttl: None,
            trouble: None,
        })
    }
}
