//! Connects to etcd. Converts a failure into an error that describes how to fix the configuration.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::auth::Auth;
use super::cluster::Etcd;
use super::endpoint::MemberEndpoint;
use super::limits::DEADLINE;
use super::members::OpenChannel;
use super::token_cell::Credentials;
use crate::error::{EtcdError, EtcdErrorKind, RegistryError, causes};
use crate::keyspace::Key;
use crate::metrics::Metrics;
use tonic_balance::Address;
#[cfg(feature = "tls")]
use tonic_balance::{__private::check_tls, TlsConfig};
use tonic_balance::{BalancedChannel, channel::ChannelBuilder};

/// The options of a connection.
#[derive(Clone, Default)]
pub(crate) struct Config {
    pub(crate) endpoints: Vec<String>,
    pub(crate) credentials: Option<Credentials>,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<TlsConfig>,
    pub(crate) metrics: Option<Metrics>,
}

impl Config {
    fn members(&self) -> Result<Vec<MemberEndpoint>, RegistryError> {
        #[cfg(feature = "tls")]
        let tls = self.tls.is_some();
        #[cfg(not(feature = "tls"))]
        let tls = false;
        let members: Vec<_> = self
            .endpoints
            .iter()
            .map(|endpoint| MemberEndpoint::parse(endpoint, tls))
            .collect::<Result<_, _>>()?;
        let first = members.first().ok_or(RegistryError::NoEndpoints)?;
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            check_tls(tls).map_err(|reason| RegistryError::InvalidTls { reason })?;
        }
        let differs = |member: &MemberEndpoint| member.is_tls() != first.is_tls();
        if let Some(position) = members.iter().position(differs) {
            return Err(RegistryError::InvalidEndpoint {
                endpoint: self.endpoints[position].clone(),
                reason: "some endpoints use https and others do not".to_owned(),
            });
        }
        Ok(members)
    }

    /// Returns the function that opens a channel over the members.
    #[cfg_attr(
        not(feature = "tls"),
        expect(clippy::unused_self, reason = "the same signature as with the feature")
    )]
    fn open(&self, members: &[MemberEndpoint]) -> OpenChannel {
        let addresses: Vec<_> = members
            .iter()
            .map(|member| member.address().clone())
            .collect();
        #[cfg(feature = "tls")]
        let tls = members.iter().any(MemberEndpoint::is_tls).then(|| {
            let tls = self.tls.clone();
            tls.unwrap_or_else(TlsConfig::verify_dialled_host)
        });
        Arc::new(move || {
            let channel = tuned(BalancedChannel::builder());
            #[cfg(feature = "tls")]
            let channel = match &tls {
                Some(tls) => channel.tls_config(tls.clone()),
                None => channel,
            };
            channel
                .addresses(addresses.iter().map(Address::as_str))
                .connect_lazy()
        })
    }
}

/// Sets the options of a channel to etcd. The HTTP/2 keep-alive detects a dead connection on which only watches are open, and costs no
/// request to etcd. On a connection without open requests, no PING is sent, because etcd closes connections that send PINGs while idle. A
/// unary request also has a deadline; when it expires, a PING checks the connection.
pub(super) fn tuned(channel: ChannelBuilder) -> ChannelBuilder {
    channel
        .service("etcd")
        .connect_timeout(CONNECT_TIMEOUT)
        .max_backoff(MAX_BACKOFF)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_permit_time(KEEP_ALIVE_PERMIT)
}

/// Interval of the keep-alive. It exceeds [`KEEP_ALIVE_PERMIT`] by a second, because etcd measures the interval between the arrivals of
/// PINGs: after a PING that the network has delayed, the next one would otherwise arrive too early.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(6);
/// Timeout of a keep-alive PING.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// The default of etcd's `--grpc-keepalive-min-time`. If etcd permits fewer PINGs, it closes the connection, and the channel doubles the
/// interval.
const KEEP_ALIVE_PERMIT: Duration = Duration::from_secs(5);

/// Limit on the time of a connection attempt. It is not longer than the 2 s deadline of a request, so that the client can tell a member
/// whose packets are dropped from a slow member.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Limit on the backoff between connection attempts. It is short, because a restarted etcd extends all leases by one TTL, and the client
/// must reconnect while most of that TTL is left.
const MAX_BACKOFF: Duration = Duration::from_secs(2);

impl Etcd {
    /// Connects, and reads `key` as a check. `PermissionDenied` counts as success, because most users may read only the keys of their own
    /// services.
    pub(crate) async fn connect(config: &Config, key: &Key) -> Result<Self, RegistryError> {
        let members = config.members()?;
        let etcd = Self::over(config, &members);
        let checked = async {
            if etcd.0.auth.user().is_some() {
                etcd.authenticate().await?;
            }
            match etcd.read(key).await {
                Err(error) if error.kind() == EtcdErrorKind::PermissionDenied => Ok(()),
                outcome => outcome.map(drop),
            }
        };
        match checked.await {
            Ok(()) => Ok(etcd),
            Err(error) => Err(explain(config, &members, error).await),
        }
    }

    /// Returns a handle that connects at its first request.
    pub(crate) fn connect_lazy(config: &Config) -> Result<Self, RegistryError> {
        let members = config.members()?;
        Ok(Self::over(config, &members))
    }

    fn over(config: &Config, members: &[MemberEndpoint]) -> Self {
        let addresses = members.iter().map(|member| member.address().clone());
        let auth = Auth::new(config.credentials.clone());
        let etcd = Self::lazy(addresses.collect(), config.open(members), auth);
        if let Some(metrics) = &config.metrics {
            etcd.set_metrics(metrics.clone());
        }
        etcd
    }

    /// Fetches the first token from any member that responds.
    async fn authenticate(&self) -> Result<(), EtcdError> {
        let renew = || self.renew_token(None, DEADLINE);
        self.retry("authenticate", renew).await.map(drop)
    }
}

/// Converts the error of the check in [`Etcd::connect`] into an error that describes how to fix the configuration.
async fn explain(config: &Config, members: &[MemberEndpoint], cause: EtcdError) -> RegistryError {
    let endpoints: Vec<_> = members
        .iter()
        .map(|member| member.address().to_string())
        .collect();
    match cause.kind() {
        EtcdErrorKind::BadCredentials
        | EtcdErrorKind::CredentialsRequired
        | EtcdErrorKind::InvalidToken => {
            let user = config.credentials.as_ref();
            let user = user.map_or_else(
                || "a client without a user name".to_owned(),
                |user| format!("user {:?}", user.user),
            );
            return RegistryError::Credentials {
                endpoints,
                user,
                cause,
            };
        }
        EtcdErrorKind::Unimplemented => {
            let reason = "it supports gRPC but not the services of etcd".to_owned();
            return RegistryError::NotEtcd {
                endpoints,
                reason,
                cause,
            };
        }
        EtcdErrorKind::NoLeader
        | EtcdErrorKind::NoSpace
        | EtcdErrorKind::OtherCluster
        | EtcdErrorKind::StaleTerm => {
            return RegistryError::Refused { endpoints, cause };
        }
        kind if !kind.is_transient() => return RegistryError::Refused { endpoints, cause },
        _ => {}
    }
    // The error does not identify the protocol of the peer: h2 reports a TLS alert as an invalid frame. So this code connects again, and
    // reads the first bytes that the peer sends.
    let failed = members
        .iter()
        .find(|member| Some(member.address().as_str()) == cause.endpoint());
    let Some(member) = failed.or(members.first()) else {
        return RegistryError::Unreachable { endpoints, cause };
    };
    let tls = |reason: String, cause| RegistryError::Tls {
        endpoints: endpoints.clone(),
        reason,
        cause,
    };
    let answer = first_bytes(member).await;
    let bytes = answer.clone().unwrap_or_default();
    let text = causes(&cause);
    if member.is_tls() {
        if is_http2(&bytes) || text.contains("does not speak TLS") {
            return tls(
                "the server does not use TLS; write http://, or remove the TLS configuration"
                    .to_owned(),
                cause,
            );
        }
        // A server that requires a client certificate rejects the connection after the handshake, and may close it before the client reads
        // the alert. So a failed connection to a TLS server counts as a failed handshake, even if the error does not mention TLS.
        let hung_up = cause.kind() == EtcdErrorKind::Unavailable
            && !text.contains("etcdserver:")
            && answer.is_some_and(|bytes| is_tls(&bytes));
        if hung_up || TLS_WORDS.iter().any(|word| text.contains(word)) {
            let advice = "check the CA, the server's name and the client certificate";
            return tls(
                format!("the TLS handshake failed ({text}); {advice}"),
                cause,
            );
        }
        return RegistryError::Unreachable { endpoints, cause };
    }
    let not_etcd = |reason: &str, cause| RegistryError::NotEtcd {
        endpoints: endpoints.clone(),
        reason: reason.to_owned(),
        cause,
    };
    match &bytes[..] {
        [0x15, 0x03, ..] => {
            let reason = "the server uses TLS and the client does not; write https:// and configure `.tls_config(..)` (feature `tls`)";
            tls(reason.to_owned(), cause)
        }
        bytes if bytes.starts_with(b"HTTP/1.") => {
            not_etcd("it uses HTTP/1, so it does not support gRPC", cause)
        }
        bytes if !bytes.is_empty() && !is_http2(bytes) => {
            not_etcd("it does not speak HTTP/2", cause)
        }
        _ => RegistryError::Unreachable { endpoints, cause },
    }
}

/// Words that occur in rustls errors if the TLS configuration is wrong.
const TLS_WORDS: [&str; 5] = [
    "fatal alert",
    "certificate",
    "CertificateRequired",
    "HandshakeFailure",
    "UnknownIssuer",
];

/// Sends an HTTP/2 preface to a member, and returns the first bytes of the answer. Returns `None` if the connection fails or no answer
/// arrives within one second.
async fn first_bytes(member: &MemberEndpoint) -> Option<Vec<u8>> {
    // The preface and an empty SETTINGS frame.
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let exchange = async {
        let mut socket = TcpStream::connect(member.address().as_str()).await.ok()?;
        socket.write_all(HELLO).await.ok()?;
        let mut bytes = vec![0; 16];
        let length = socket.read(&mut bytes).await.ok()?;
        bytes.truncate(length);
        Some(bytes)
    };
    tokio::time::timeout(Duration::from_secs(1), exchange)
        .await
        .ok()
        .flatten()
}

/// Returns whether the bytes begin with a SETTINGS frame (type 4 on stream 0), the first frame of an HTTP/2 server.
fn is_http2(bytes: &[u8]) -> bool {
    matches!(bytes, [_, _, _, 4, _, 0, 0, 0, 0, ..])
}

/// Returns whether a TLS server may have sent these bytes in answer to plaintext. Some TLS servers send an alert, some send a line of
/// HTTP/1, and some, such as etcd, close the connection without a byte.
fn is_tls(bytes: &[u8]) -> bool {
    bytes.is_empty() || bytes.starts_with(&[0x15, 0x03]) || bytes.starts_with(b"HTTP/1.")
}
