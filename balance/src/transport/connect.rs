//! Makes connections: name resolution, dial, TLS, HTTP/2, and the ready check, which is a first PING that the peer must answer.
//!
//! The built-in dialler supports TCP and Unix sockets. Any other transport needs a custom dialler.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::connection_task::ConnectionEvent;
use super::http2::{Connection, Established, HandshakeError, Settings};
use super::stall_detection::KeepAlive;
#[cfg(feature = "tls")]
use super::tls::Tls;
use crate::address::{Address, AddressPolicy};

/// A byte stream to a peer.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Io for T {}

pub(crate) type BoxIo = Pin<Box<dyn Io>>;
type Dialling = Pin<Box<dyn Future<Output = io::Result<BoxIo>> + Send>>;
type Dial = Arc<dyn Fn(Address) -> Dialling + Send + Sync>;

/// The options and diallers of connections.
#[derive(Clone)]
pub(crate) struct Connector {
    /// A custom dialler, which replaces name resolution, TCP and Unix sockets.
    pub(crate) dial: Option<Dial>,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<Tls>,
    pub(crate) http2: Settings,
    /// Limit on the time of a whole connection attempt: name resolution, dial, TLS, the HTTP/2 handshake, and the ready check.
    pub(crate) timeout: Duration,
    /// The policy for the IP addresses that a host name resolves to. The addresses of the endpoints themselves are not checked here,
    /// because that is the task of the source.
    pub(crate) policy: AddressPolicy,
    /// Whether the program itself contains the addresses. If false, the addresses are discovered, and TLS does not verify a server by the
    /// host of its address.
    pub(crate) static_addresses: bool,
    /// The host that the program contains, if the source has looked up the addresses of the endpoints. TLS verifies the servers by it.
    pub(crate) host: Option<Arc<str>>,
}

impl Default for Connector {
    fn default() -> Self {
        Self {
            dial: None,
            #[cfg(feature = "tls")]
            tls: None,
            http2: Settings::default(),
            timeout: CONNECT_TIMEOUT,
            policy: AddressPolicy::default(),
            static_addresses: false,
            host: None,
        }
    }
}

/// The results of earlier attempts to connect to an endpoint.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DialHistory {
    /// The number of consecutive failed attempts.
    pub(crate) failed: usize,
    /// The keep-alive for this server. Its interval is longer than the configured one if the server has rejected more frequent PINGs.
    pub(crate) keep_alive: Option<KeepAlive>,
}

impl Connector {
    /// Sets a custom dialler.
    pub(crate) fn dial_with<F, Fut, T>(&mut self, dial: F)
    where
        F: Fn(Address) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = io::Result<T>> + Send + 'static,
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        self.dial = Some(Arc::new(move |address| {
            let io = dial(address);
            Box::pin(async move { Ok(Box::pin(io.await?) as BoxIo) })
        }));
    }

    /// Returns the name that the certificates of all servers must be valid for, if one is configured.
    #[cfg(feature = "tls")]
    pub(crate) fn server_name(&self) -> Option<&str> {
        self.tls.as_ref().and_then(Tls::server_name)
    }

    /// Returns `None`, because the feature `tls` is disabled.
    #[cfg(not(feature = "tls"))]
    #[expect(clippy::unused_self, reason = "the same signature as with the feature")]
    pub(crate) fn server_name(&self) -> Option<&str> {
        None
    }

    /// Returns the reason why the TLS configuration can never work, if any.
    #[cfg(feature = "tls")]
    pub(crate) fn invalid_tls(&self) -> Option<String> {
        self.tls.as_ref()?.check().err()
    }

    /// Returns `None`, because the feature `tls` is disabled.
    #[cfg(not(feature = "tls"))]
    #[expect(clippy::unused_self, reason = "the same signature as with the feature")]
    pub(crate) fn invalid_tls(&self) -> Option<String> {
        None
    }

    /// Returns whether connections are encrypted.
    #[cfg(feature = "tls")]
    pub(crate) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Returns false, because the feature `tls` is disabled.
    #[cfg(not(feature = "tls"))]
    #[expect(clippy::unused_self, reason = "the same signature as with the feature")]
    pub(crate) fn is_tls(&self) -> bool {
        false
    }

    /// Makes a connection and waits until its peer has answered a first PING. `on_event` is called for each event of the connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the sockets that it has opened.
    pub(crate) async fn connect<F>(
        &self,
        address: &Address,
        history: DialHistory,
        on_event: F,
    ) -> Result<Connection, DialError>
    where
        F: FnMut(ConnectionEvent) + Send + Unpin + 'static,
    {
        let connected = tokio::time::timeout(self.timeout, self.try_connect(address, history));
        match connected.await {
            Ok(outcome) => outcome.map(|established| established.start(on_event)),
            Err(_) => Err(DialError::TimedOut(self.timeout)),
        }
    }

    async fn try_connect(
        &self,
        address: &Address,
        history: DialHistory,
    ) -> Result<Established, DialError> {
        if let Some(dial) = &self.dial {
            let io = dial(address.clone()).await.map_err(DialError::Dial)?;
            return self.handshake(io, address, history).await;
        }
        if let Some(path) = address.socket_path() {
            let io = unix(path).await.map_err(DialError::Dial)?;
            return self.handshake(io, address, history).await;
        }
        if let (Some(ip), Some(port)) = (address.ip(), address.port()) {
            let socket = SocketAddr::new(ip, port);
            return self.tcp(socket, address, history).await;
        }
        let mut resolved = self.resolve(address).await?;
        // The addresses are rotated, because an address whose server accepts connections but is unusable must not be the first in every
        // attempt.
        let first = history.failed % resolved.len().max(1);
        resolved.rotate_left(first);
        if let [only] = resolved[..] {
            return self.tcp(only, address, history).await;
        }
        let (connector, address) = (self.clone(), address.clone());
        happy_eyeballs(resolved, move |socket| {
            let (connector, address) = (connector.clone(), address.clone());
            async move { connector.tcp(socket, &address, history).await }
        })
        .await
    }

    async fn tcp(
        &self,
        socket: SocketAddr,
        address: &Address,
        history: DialHistory,
    ) -> Result<Established, DialError> {
        let stream = TcpStream::connect(socket).await.map_err(DialError::Dial)?;
        set_socket_options(&stream);
        self.handshake(stream, address, history).await
    }

    #[cfg_attr(
        not(feature = "tls"),
        expect(unused_variables, reason = "the same signature as with the feature")
    )]
    async fn handshake<T>(
        &self,
        io: T,
        address: &Address,
        history: DialHistory,
    ) -> Result<Established, DialError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            // The certificate of a server on a Unix socket is verified for `localhost`.
            let host = || address.host().unwrap_or("localhost");
            let host = self.static_addresses.then(host);
            let host = self.host.as_deref().or(host);
            let io = tls.handshake(io, host).await.map_err(DialError::Tls)?;
            return Ok(Connection::establish(io, &self.http2, history.keep_alive).await?);
        }
        Ok(Connection::establish(io, &self.http2, history.keep_alive).await?)
    }

    async fn resolve(&self, address: &Address) -> Result<Vec<SocketAddr>, DialError> {
        let target = address.host_and_port();
        let target =
            target.ok_or_else(|| DialError::Resolve(io::ErrorKind::InvalidInput.into()))?;
        let found = tokio::net::lookup_host(target).await;
        let found: Vec<_> = found.map_err(DialError::Resolve)?.collect();
        // The resolved addresses are checked, because a host name can resolve to an address that the policy would reject if it were
        // registered itself.
        let allowed = |found: &SocketAddr| {
            Address::try_from(*found).is_ok_and(|address| self.policy.check(&address).is_ok())
        };
        let (allowed, refused): (Vec<_>, Vec<_>) = found.into_iter().partition(allowed);
        if allowed.is_empty() {
            let reason = if refused.is_empty() {
                "the name has no address"
            } else {
                "the address policy refuses all addresses of the name"
            };
            return Err(DialError::Resolve(io::Error::other(reason)));
        }
        Ok(alternating(allowed))
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("custom", &self.dial.is_some())
            .field("tls", &self.is_tls())
            .field("server_name", &self.server_name())
            .field("http2", &self.http2)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

#[cfg(unix)]
async fn unix(path: &Path) -> io::Result<tokio::net::UnixStream> {
    tokio::net::UnixStream::connect(path).await
}

#[cfg(not(unix))]
async fn unix(_: &Path) -> io::Result<TcpStream> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Orders the addresses so that IPv4 and IPv6 alternate, beginning with the family of the first address.
fn alternating(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let v6_first = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (v6, v4): (Vec<_>, Vec<_>) = addresses.into_iter().partition(SocketAddr::is_ipv6);
    let (first, second) = if v6_first { (v6, v4) } else { (v4, v6) };
    let mut second = second.into_iter();
    let mut mixed = Vec::new();
    for address in first {
        mixed.push(address);
        mixed.extend(second.next());
    }
    mixed.extend(second);
    mixed
}

/// Dials the addresses one after the other, and returns the first connection that is ready (RFC 8305). The next dial starts when a dial
/// fails, or at the latest [`CONNECTION_ATTEMPT_DELAY`] after the start of the previous dial.
///
/// A connection is ready when its peer has answered a PING. A completed TCP connect is not enough, because the kernel completes it even if
/// the process of the server is stuck.
pub(super) async fn happy_eyeballs<T, F, Fut>(
    addresses: Vec<SocketAddr>,
    connect: F,
) -> Result<T, DialError>
where
    F: Fn(SocketAddr) -> Fut,
    Fut: Future<Output = Result<T, DialError>> + Send + 'static,
    T: Send + 'static,
{
    let mut addresses = addresses.into_iter();
    let mut dials = JoinSet::new();
    let mut failure = DialError::Dial(io::Error::other("there is no address to dial"));
    loop {
        let more = addresses.next().map(|next| dials.spawn(connect(next)));
        let outcome = if more.is_some() {
            let started = tokio::time::timeout(CONNECTION_ATTEMPT_DELAY, dials.join_next());
            let Ok(outcome) = started.await else {
                continue;
            };
            outcome
        } else {
            dials.join_next().await
        };
        match outcome {
            Some(Ok(Ok(connected))) => return Ok(connected),
            Some(Ok(Err(error))) => failure = error,
            Some(Err(panic)) => failure = DialError::Panicked(panic),
            None => return Err(failure),
        }
    }
}

/// Sets the options of a long-lived socket. An error is only logged, because the socket works without the options.
fn set_socket_options(stream: &TcpStream) {
    let socket = socket2::SockRef::from(stream);
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(TCP_KEEPALIVE)
        .with_interval(TCP_KEEPALIVE_INTERVAL);
    let set = stream
        .set_nodelay(true)
        .and_then(|()| socket.set_tcp_keepalive(&keepalive));
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let set = set.and_then(|()| socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT)));
    if let Err(error) = set {
        tracing::debug!(%error, "could not set a socket option");
    }
}

/// The reason why no connection was made. No call was sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("the host name could not be resolved")]
    Resolve(#[source] io::Error),
    #[error("could not connect")]
    Dial(#[source] io::Error),
    #[cfg(feature = "tls")]
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
    #[error(transparent)]
    Http2(#[from] HandshakeError),
    #[error("no answer within {} s", .0.as_secs_f64())]
    TimedOut(Duration),
    /// A dial has panicked, usually in a custom dialler.
    #[error("the dialler panicked")]
    Panicked(#[source] tokio::task::JoinError),
}

/// Default limit on the time of a connection attempt. gRPC's connection backoff document allows 20 s for the first attempt. The default is
/// half of that, so that an unreachable address delays the start of a channel less.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time between the starts of two dials of the same host name. RFC 8305, section 5, recommends 250 ms.
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_millis(250);
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Limit on the time that sent bytes stay unacknowledged. Without this limit, calls to a peer whose packets are dropped hang for a quarter
/// of an hour. gRFC A18 uses 20 s. With 30 s, a connection also survives a peer machine that is paused for 20 s.
#[cfg(any(target_os = "linux", target_os = "android"))]
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The test only reads the options back from the socket. A test of their effect would have to drop packets. This needs privileges that
    /// a test does not have.
    #[tokio::test]
    async fn tcp_user_timeout_and_keep_alive_are_set_on_the_socket() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let address: Address = address.parse().expect("an address");
        let stream = TcpStream::connect(address.as_str()).await;
        let stream = stream.expect("a connection");
        set_socket_options(&stream);
        assert!(stream.nodelay().expect("an option"));
        let socket = socket2::SockRef::from(&stream);
        let user_timeout = socket.tcp_user_timeout().expect("an option");
        assert_eq!(user_timeout, Some(TCP_USER_TIMEOUT), "a wrong user timeout");
        assert!(socket.keepalive().expect("an option"), "no keep-alive");
        assert_eq!(
            socket.tcp_keepalive_time().expect("an option"),
            TCP_KEEPALIVE
        );
        let interval = socket.tcp_keepalive_interval().expect("an option");
        assert_eq!(interval, TCP_KEEPALIVE_INTERVAL);
    }
}
