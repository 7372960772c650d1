//! Connecting to etcd, and saying what is wrong when that fails.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::auth::Auth;
use super::members::Open;
use super::token::Credentials;
use super::{DEADLINE, Etcd, MemberEndpoint};
use crate::error::{EtcdError, EtcdErrorKind, RegistryError, causes};
use crate::keyspace::Key;
use tonic_balance::Address;
#[cfg(feature = "tls")]
use tonic_balance::TlsConfig;
use tonic_balance::{BalancedChannel, ChannelBuilder};

/// How to connect.
#[derive(Clone, Default)]
pub(crate) struct Config {
    pub(crate) endpoints: Vec<String>,
    pub(crate) credentials: Option<Credentials>,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<TlsConfig>,
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
        let differs = |member: &MemberEndpoint| member.is_tls() != first.is_tls();
        if let Some(position) = members.iter().position(differs) {
            return Err(RegistryError::InvalidEndpoint {
                endpoint: self.endpoints[position].clone(),
                reason: "some endpoints say https and others do not".to_owned(),
            });
        }
        Ok(members)
    }

    /// How a channel over the members is opened.
    #[cfg_attr(
        not(feature = "tls"),
        expect(clippy::unused_self, reason = "the same signature as with the feature")
    )]
    fn open(&self, members: &[MemberEndpoint]) -> Open {
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

/// The options of a channel to etcd. HTTP/2 keep-alive is none of them: etcd closes connections that ping while idle, and whatever is open has a
/// deadline or a watchdog of its own, after which a PING asks whether the member is there.
pub(super) fn tuned(channel: ChannelBuilder) -> ChannelBuilder {
    channel
        .service("etcd")
        .connect_timeout(CONNECT_TIMEOUT)
        .max_backoff(MAX_BACKOFF)
}

/// Within a call's deadline of 2 s, so that a member whose packets are dropped is told from one that is slow.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Leases live again for one TTL when etcd is back: most of it must be left when we notice.
const MAX_BACKOFF: Duration = Duration::from_secs(2);

impl Etcd {
    /// Connects, and reads one key to know that it is true. Permission denied counts as connected: users who may read only their own
    /// services are the rule.
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

    /// Connects when there is something to ask.
    pub(crate) fn connect_lazy(config: &Config) -> Result<Self, RegistryError> {
        let members = config.members()?;
        Ok(Self::over(config, &members))
    }

    fn over(config: &Config, members: &[MemberEndpoint]) -> Self {
        let addresses = members.iter().map(|member| member.address().clone());
        let auth = Auth::new(config.credentials.clone());
        Self::lazy(addresses.collect(), config.open(members), auth)
    }

    /// Fetches the first token, from whichever member answers.
    async fn authenticate(&self) -> Result<(), EtcdError> {
        let renew = || self.renew_token(None, DEADLINE);
        self.retry("authenticate", renew).await.map(drop)
    }
}

/// Makes the error that tells the user what to do.
async fn explain(config: &Config, members: &[MemberEndpoint], source: EtcdError) -> RegistryError {
    let endpoints: Vec<_> = members
        .iter()
        .map(|member| member.address().to_string())
        .collect();
    match source.kind() {
        EtcdErrorKind::BadCredentials
        | EtcdErrorKind::CredentialsRequired
        | EtcdErrorKind::InvalidToken => {
            let user = config.credentials.as_ref();
            let user = user.map_or_else(
                || "a client without user".to_owned(),
                |user| format!("user {:?}", user.user),
            );
            return RegistryError::Credentials {
                endpoints,
                user,
                source,
            };
        }
        EtcdErrorKind::Unimplemented => {
            let reason = "it speaks gRPC but does not know etcd's services".to_owned();
            return RegistryError::NotEtcd {
                endpoints,
                reason,
                source,
            };
        }
        kind if !kind.is_transient() => return RegistryError::Refused { endpoints, source },
        _ => {}
    }
    // The failure says little of what is at the other end: hyper reports a TLS alert as a broken frame. Ask the peer itself.
    let failed = members
        .iter()
        .find(|member| member.address().as_str() == source.endpoint());
    let Some(member) = failed.or(members.first()) else {
        return RegistryError::Unreachable { endpoints, source };
    };
    let tls = |reason: String, source| RegistryError::Tls {
        endpoints: endpoints.clone(),
        reason,
        source,
    };
    let answer = first_bytes(member).await;
    let bytes = answer.clone().unwrap_or_default();
    let cause = causes(&source);
    if member.is_tls() {
        if is_http2(&bytes) || cause.contains("does not speak TLS") {
            return tls(
                "the server does not speak TLS; write http:// or leave the TLS configuration out"
                    .to_owned(),
                source,
            );
        }
        // A server that wants a certificate says so after the handshake, and may have hung up before that is read.
        let hung_up = source.kind() == EtcdErrorKind::Unavailable
            && answer.is_some_and(|bytes| is_tls(&bytes));
        if hung_up || TLS_WORDS.iter().any(|word| cause.contains(word)) {
            let advice = "check the CA, the server's name and the client certificate";
            return tls(
                format!("the TLS handshake failed ({cause}); {advice}"),
                source,
            );
        }
        return RegistryError::Unreachable { endpoints, source };
    }
    let not_etcd = |reason: &str, source| RegistryError::NotEtcd {
        endpoints: endpoints.clone(),
        reason: reason.to_owned(),
        source,
    };
    match &bytes[..] {
        [0x15, 0x03, ..] => {
            let reason = "the server speaks TLS and the client does not; write https:// and configure `.tls_config(..)` (feature `tls`)";
            tls(reason.to_owned(), source)
        }
        bytes if bytes.starts_with(b"HTTP/1.") => not_etcd("it speaks HTTP/1 and no gRPC", source),
        bytes if !bytes.is_empty() && !is_http2(bytes) => {
            not_etcd("it does not speak HTTP/2", source)
        }
        _ => RegistryError::Unreachable { endpoints, source },
    }
}

/// What rustls says where a handshake fails for what somebody configured.
const TLS_WORDS: [&str; 5] = [
    "fatal alert",
    "certificate",
    "CertificateRequired",
    "HandshakeFailure",
    "UnknownIssuer",
];

/// The first bytes a peer answers to an HTTP/2 preface with, if it answers within a second.
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

/// A server's HTTP/2 connection begins with a SETTINGS frame: type 4 on stream 0.
fn is_http2(bytes: &[u8]) -> bool {
    matches!(bytes, [_, _, _, 4, _, 0, 0, 0, 0, ..])
}

/// A TLS server answers what is no TLS with an alert, a line of HTTP/1, or by hanging up, as etcd does.
fn is_tls(bytes: &[u8]) -> bool {
    bytes.is_empty() || bytes.starts_with(&[0x15, 0x03]) || bytes.starts_with(b"HTTP/1.")
}
