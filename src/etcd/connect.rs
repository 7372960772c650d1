//! Connecting to etcd, and saying what is wrong when that fails.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport;

use super::auth::{Auth, Credentials};
#[cfg(feature = "tls")]
use super::endpoint::CONNECT_TIMEOUT;
use super::member::Open;
use super::{DEADLINE, Etcd, MemberEndpoint};
use crate::error::{ConnectError, Endpoints, EtcdError, EtcdErrorKind};
use crate::keyspace::Key;

/// How to connect.
#[derive(Clone, Default)]
pub(crate) struct Config {
    pub(crate) endpoints: Vec<String>,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) tls: Option<Tls>,
}

/// TLS to etcd: as tonic has it, or with certificates in files that are read again at each handshake.
#[cfg(feature = "tls")]
#[derive(Clone)]
pub(crate) enum Tls {
    Fixed(transport::ClientTlsConfig),
    Files(crate::transport::tls::Tls),
}
/// Without the feature there is no such thing.
#[cfg(not(feature = "tls"))]
#[derive(Clone)]
pub(crate) enum Tls {}

impl Config {
    fn members(&self) -> Result<Vec<MemberEndpoint>, ConnectError> {
        if self.endpoints.is_empty() {
            return Err(ConnectError::NoEndpoints);
        }
        let tls = self.tls.is_some();
        self.endpoints
            .iter()
            .map(|endpoint| MemberEndpoint::parse(endpoint, tls))
            .collect()
    }

    fn open(&self, member: &MemberEndpoint) -> Result<Open, ConnectError> {
        #[cfg(feature = "tls")]
        if let Some(Tls::Files(tls)) = &self.tls {
            return Ok(secured_from_files(member.clone(), tls.clone()));
        }
        let endpoint = member.transport();
        let endpoint = if member.is_tls() {
            secured(endpoint, self.tls.clone())
        } else {
            Ok(endpoint)
        };
        let endpoint = endpoint.map_err(|error| ConnectError::InvalidEndpoint {
            endpoint: member.authority().to_owned(),
            reason: format!("the TLS configuration is not valid: {}", causes(&error)),
        })?;
        Ok(Arc::new(move || endpoint.connect_lazy()))
    }
}

#[cfg(feature = "tls")]
fn secured(
    endpoint: transport::Endpoint,
    tls: Option<Tls>,
) -> Result<transport::Endpoint, transport::Error> {
    let tls = match tls {
        Some(Tls::Fixed(tls)) => tls,
        _ => transport::ClientTlsConfig::new().with_enabled_roots(),
    };
    // tonic's connect timeout ends with TCP.
    endpoint.tls_config(tls.timeout(CONNECT_TIMEOUT))
}

#[cfg(feature = "tls")]
fn secured_from_files(member: MemberEndpoint, tls: crate::transport::tls::Tls) -> Open {
    let endpoint = member.transport_over_own_tls();
    Arc::new(move || {
        let (authority, tls) = (member.authority().to_owned(), tls.clone());
        let dial = move |_| {
            let (authority, tls) = (authority.clone(), tls.clone());
            async move {
                let tcp = TcpStream::connect(authority).await?;
                tcp.set_nodelay(true)?;
                let secure = tls.handshake(tcp).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(secure))
            }
        };
        endpoint.connect_with_connector_lazy(tower::service_fn(dial))
    })
}

#[cfg(not(feature = "tls"))]
#[expect(
    clippy::unnecessary_wraps,
    reason = "the same signature as with the feature"
)]
fn secured(
    endpoint: transport::Endpoint,
    _: Option<Tls>,
) -> Result<transport::Endpoint, transport::Error> {
    Ok(endpoint)
}

impl Etcd {
    /// Connects, and reads one key to know that it is true. Permission denied counts as connected: users who may read only their own
    /// services are the rule.
    pub(crate) async fn connect(config: &Config, key: &Key) -> Result<Self, ConnectError> {
        let members = config.members()?;
        let mut channels = Vec::with_capacity(members.len());
        for member in &members {
            channels.push((member.authority().to_owned(), config.open(member)?));
        }
        let auth = Auth::new(config.credentials.clone());
        let checked = async {
            let etcd = Self::lazy(channels, auth).await?;
            if etcd.0.auth.user().is_some() {
                etcd.authenticate().await?;
            }
            match etcd.read(key).await {
                Err(error) if error.kind() == EtcdErrorKind::PermissionDenied => Ok(etcd),
                outcome => outcome.map(|_| etcd),
            }
        };
        match checked.await {
            Ok(etcd) => Ok(etcd),
            Err(error) => Err(explain(config, &members, error).await),
        }
    }

    /// Fetches the first token, from whichever member answers.
    async fn authenticate(&self) -> Result<(), EtcdError> {
        self.call("authenticate", |link| async move {
            self.renew_token(&link, self.0.auth.token().as_ref(), DEADLINE)
                .await
                .map(drop)
        })
        .await
    }
}

/// Makes the error that tells the user what to do.
async fn explain(config: &Config, members: &[MemberEndpoint], source: EtcdError) -> ConnectError {
    let endpoints = Endpoints(
        members
            .iter()
            .map(|member| member.authority().to_owned())
            .collect(),
    );
    match source.kind() {
        EtcdErrorKind::BadCredentials
        | EtcdErrorKind::CredentialsRequired
        | EtcdErrorKind::InvalidToken => {
            let user = config.credentials.as_ref();
            let user = user.map_or_else(
                || "a client without user".to_owned(),
                |user| format!("user {:?}", user.user),
            );
            return ConnectError::Credentials {
                endpoints,
                user,
                source,
            };
        }
        EtcdErrorKind::Unimplemented => {
            let reason = "it speaks gRPC but does not know etcd's services".to_owned();
            return ConnectError::NotEtcd {
                endpoints,
                reason,
                source,
            };
        }
        kind if !kind.is_transient() => return ConnectError::Refused { endpoints, source },
        _ => {}
    }
    // The failure says little of what is at the other end: hyper reports a TLS alert as a broken frame. Ask the peer itself.
    let failed = members
        .iter()
        .find(|member| member.authority() == source.endpoint());
    let Some(member) = failed.or(members.first()) else {
        return ConnectError::Unreachable { endpoints, source };
    };
    let tls = |reason: String, source| ConnectError::Tls {
        endpoints: endpoints.clone(),
        reason,
        source,
    };
    let answer = first_bytes(member).await;
    let bytes = answer.clone().unwrap_or_default();
    let cause = causes(&source);
    if member.is_tls() {
        if is_http2(&bytes) || cause.contains("InvalidContentType") {
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
        return ConnectError::Unreachable { endpoints, source };
    }
    let not_etcd = |reason: &str, source| ConnectError::NotEtcd {
        endpoints: endpoints.clone(),
        reason: reason.to_owned(),
        source,
    };
    match &bytes[..] {
        [0x15, 0x03, ..] => {
            let reason = "the server speaks TLS and the client does not; write https:// and configure `.tls(..)` (feature `tls`)";
            tls(reason.to_owned(), source)
        }
        bytes if bytes.starts_with(b"HTTP/1.") => not_etcd("it speaks HTTP/1 and no gRPC", source),
        bytes if !bytes.is_empty() && !is_http2(bytes) => {
            not_etcd("it does not speak HTTP/2", source)
        }
        _ => ConnectError::Unreachable { endpoints, source },
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
        let mut socket = TcpStream::connect(member.authority()).await.ok()?;
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

/// An error with all its causes, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
