//! Dials a server as a client would, and finds out what answers: TCP, the protocol, gRPC, and the health service.

use std::io;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tonic::body::Body;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic_etcd::Address;
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
};
use tower::ServiceExt;

use crate::cli::ServerTls;
use crate::error::Failure;
use crate::escape::escaped;

/// How to dial servers.
#[derive(Clone, Debug)]
pub(crate) struct Dial {
    timeout: Duration,
    tls: Option<ClientTlsConfig>,
}

impl Dial {
    /// # Errors
    ///
    /// Fails if the file of the CA certificate cannot be read.
    pub(crate) fn new(server_tls: &ServerTls, timeout: Duration) -> Result<Self, Failure> {
        let tls = match (&server_tls.server_cacert, server_tls.server_tls) {
            (Some(path), _) => {
                let pem = std::fs::read(path).map_err(|error| {
                    Failure::usage(format!("cannot read {}: {error}", path.display()))
                })?;
                Some(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)))
            }
            (None, true) => Some(ClientTlsConfig::new().with_native_roots()),
            (None, false) => None,
        };
        let name = server_tls.server_name.as_ref();
        let tls = tls.map(|config| match name {
            Some(name) => config.domain_name(name),
            None => config,
        });
        Ok(Self { timeout, tls })
    }

    pub(crate) fn plaintext(timeout: Duration) -> Self {
        Self { timeout, tls: None }
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Dials an address. `ready` answers take the time of the health check as their latency.
    pub(crate) async fn probe(&self, address: &Address) -> Probe {
        if address.socket_path().is_some() {
            return Probe::of(Answer::UnixSocket);
        }
        let protocol = match timeout(self.timeout, protocol(address.as_str())).await {
            Err(_) => return Probe::of(Answer::TimedOut),
            Ok(Err(error)) => return Probe::of(Answer::NotConnected(escaped(&error.to_string()))),
            Ok(Ok(protocol)) => protocol,
        };
        match protocol {
            Protocol::Tls if !self.is_tls() => return Probe::of(Answer::RequiresTls),
            Protocol::Http2 if self.is_tls() => return Probe::of(Answer::Plaintext),
            Protocol::Http2 | Protocol::Tls => {}
            Protocol::Http1 => return Probe::of(Answer::Http1),
            Protocol::Closed => return Probe::of(Answer::Closed),
            Protocol::Other => return Probe::of(Answer::OtherProtocol),
        }
        match timeout(self.timeout, self.health(address)).await {
            Ok(probe) => probe,
            Err(_) => Probe::of(Answer::TimedOut),
        }
    }

    /// Sends a health check for the whole server.
    async fn health(&self, address: &Address) -> Probe {
        let scheme = if self.is_tls() { "https" } else { "http" };
        let connected = async {
            let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))?;
            if let Some(tls) = &self.tls {
                endpoint = endpoint.tls_config(tls.clone())?;
            }
            endpoint.connect().await
        };
        let channel = match connected.await {
            Ok(channel) => channel,
            Err(error) => return Probe::of(Answer::NotConnected(causes(&error))),
        };
        let message = HealthCheckRequest::default().encode_to_vec();
        let mut frame = vec![0];
        frame.extend(
            u32::try_from(message.len())
                .unwrap_or_default()
                .to_be_bytes(),
        );
        frame.extend(message);
        let request = http::Request::post("/grpc.health.v1.Health/Check")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Body::new(Full::from(frame)));
        let request = match request {
            Ok(request) => request,
            Err(error) => return Probe::of(Answer::NotConnected(error.to_string())),
        };
        let start = Instant::now();
        let response = match channel.oneshot(request).await {
            Ok(response) => response,
            Err(error) => return Probe::of(Answer::NotConnected(causes(&error))),
        };
        let answer = classify(response).await;
        Probe {
            answer,
            latency: Some(Instant::now().saturating_duration_since(start)),
        }
    }
}

/// The result of a dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Probe {
    pub(crate) answer: Answer,
    /// The time between the health check and its response.
    pub(crate) latency: Option<Duration>,
}

impl Probe {
    pub(crate) fn of(answer: Answer) -> Self {
        Self {
            answer,
            latency: None,
        }
    }

    /// Returns the result for a table.
    pub(crate) fn text(&self) -> String {
        match self.latency {
            Some(latency) => format!("{} ({})", self.answer.text(), millis(latency)),
            None => self.answer.text(),
        }
    }
}

/// What answers at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A gRPC server, with the status of its health service.
    Grpc(Health),
    /// An HTTP/2 server whose response is not gRPC.
    NotGrpc(String),
    Http1,
    /// The server uses TLS, and the client does not.
    RequiresTls,
    /// The client uses TLS, and the server does not.
    Plaintext,
    OtherProtocol,
    /// The server closed the connection without a byte.
    Closed,
    TimedOut,
    NotConnected(String),
    /// The socket exists on another host.
    UnixSocket,
}

/// The answer of a gRPC server to a health check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Serving,
    NotServing,
    /// The server has no health service.
    NoService,
    Failed(String),
}

impl Answer {
    /// Returns whether a client can send calls to the server. A server without a health service counts as one.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(
            self,
            Self::Grpc(Health::Serving | Health::NoService) | Self::UnixSocket
        )
    }

    pub(crate) fn text(&self) -> String {
        match self {
            Self::Grpc(Health::Serving) => "serving".to_owned(),
            Self::Grpc(Health::NotServing) => "not serving".to_owned(),
            Self::Grpc(Health::NoService) => "gRPC without a health service".to_owned(),
            Self::Grpc(Health::Failed(reason)) => format!("health check failed: {reason}"),
            Self::NotGrpc(reason) => format!("HTTP/2, but not gRPC: {reason}"),
            Self::Http1 => "HTTP/1, not gRPC".to_owned(),
            Self::RequiresTls => "requires TLS".to_owned(),
            Self::Plaintext => "plaintext, not TLS".to_owned(),
            Self::OtherProtocol => "neither HTTP/2 nor TLS".to_owned(),
            Self::Closed => "closes the connection".to_owned(),
            Self::TimedOut => "no response in time".to_owned(),
            Self::NotConnected(reason) => format!("no connection: {reason}"),
            Self::UnixSocket => "not dialled: a Unix socket".to_owned(),
        }
    }
}

/// The protocol of a server, from the first bytes that it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http2,
    Http1,
    Tls,
    Closed,
    Other,
}

async fn protocol(address: &str) -> io::Result<Protocol> {
    let protocol = Protocol::of(&first_bytes(address, HTTP2_PREFACE).await?);
    if protocol != Protocol::Closed {
        return Ok(protocol);
    }
    // Some TLS servers close the connection without an alert if the first bytes are not TLS.
    let answer = first_bytes(address, &client_hello()).await;
    Ok(Protocol::of(&answer.unwrap_or_default()))
}

impl Protocol {
    fn of(answer: &[u8]) -> Self {
        match answer {
            [] => Self::Closed,
            // A record of TLS: an alert or a handshake.
            [0x15 | 0x16, 0x03, ..] => Self::Tls,
            // A SETTINGS frame on stream 0. Every HTTP/2 server sends it first.
            [0, _, _, 4, _, 0, 0, 0, 0, ..] => Self::Http2,
            _ if answer.starts_with(b"HTTP/1.") => Self::Http1,
            _ => Self::Other,
        }
    }
}

/// Connects, sends bytes, and returns the first bytes of the answer. Returns an empty answer if the server closes the connection.
async fn first_bytes(address: &str, sent: &[u8]) -> io::Result<Vec<u8>> {
    let mut socket = TcpStream::connect(address).await?;
    let mut answer = Vec::new();
    // A server that closes at once may reset the connection before the bytes are written.
    if socket.write_all(sent).await.is_ok() {
        while answer.len() < 9 {
            match socket.read_buf(&mut answer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
    Ok(answer)
}

/// The connection preface of HTTP/2, and an empty SETTINGS frame.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Returns the smallest valid `ClientHello` of TLS 1.2. A TLS server answers it with a handshake or with an alert. Both identify TLS.
fn client_hello() -> Vec<u8> {
    let mut hello = vec![0x03, 0x03];
    hello.extend([0x5a; 32]);
    // No session id, two cipher suites, no compression.
    hello.extend([0, 0, 4, 0xc0, 0x2f, 0xc0, 0x2b, 1, 0]);
    let mut record = vec![0x16, 0x03, 0x01, 0, 0, 0x01, 0, 0, 0];
    let length = u8::try_from(hello.len()).unwrap_or_default();
    record[4] = length + 4;
    record[8] = length;
    record.extend(hello);
    record
}

async fn classify(response: http::Response<Body>) -> Answer {
    let (head, body) = response.into_parts();
    if head.status != http::StatusCode::OK {
        return Answer::NotGrpc(format!("HTTP status {}", head.status.as_u16()));
    }
    let content_type = head.headers.get("content-type");
    let content_type = content_type.and_then(|value| value.to_str().ok());
    if !content_type.is_some_and(|value| value.starts_with("application/grpc")) {
        let shown = content_type.map_or("missing".to_owned(), escaped);
        return Answer::NotGrpc(format!("the content type is {shown}"));
    }
    let collected = match body.collect().await {
        Ok(collected) => collected,
        Err(status) => return Answer::Grpc(Health::Failed(escaped(status.message()))),
    };
    let trailers = collected.trailers().cloned().unwrap_or_default();
    let field = |name: &str| {
        let value = trailers.get(name).or_else(|| head.headers.get(name))?;
        value.to_str().ok().map(str::to_owned)
    };
    let message = collected.to_bytes();
    Answer::Grpc(match field("grpc-status").as_deref() {
        Some("0") => health_of(message.get(5..).unwrap_or_default()),
        // UNIMPLEMENTED
        Some("12") => Health::NoService,
        Some(code) => {
            let reason = field("grpc-message").unwrap_or_default();
            Health::Failed(escaped(&format!("gRPC status {code} {reason}")))
        }
        None => return Answer::NotGrpc("there is no grpc-status".to_owned()),
    })
}

fn health_of(message: &[u8]) -> Health {
    match HealthCheckResponse::decode(message).map(|response| response.status()) {
        Ok(ServingStatus::Serving) => Health::Serving,
        Ok(_) => Health::NotServing,
        Err(error) => Health::Failed(error.to_string()),
    }
}

/// Returns an error and its causes on one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // tonic and hyper repeat the text of a cause in the text of its parent.
        if !texts.iter().any(|known| known.contains(&text)) {
            texts.push(text);
        }
        cause = error.source();
    }
    escaped(&texts.join(": "))
}

pub(crate) fn millis(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_identify_the_protocol() {
        for (bytes, protocol) in [
            (&b"\0\0\x12\x04\0\0\0\0\0"[..], Protocol::Http2),
            (b"HTTP/1.1 400 Bad Request", Protocol::Http1),
            (b"\x15\x03\x03\0\x02\x02\x32", Protocol::Tls),
            (b"\x16\x03\x03\0\x7a\x02\0\0\x76", Protocol::Tls),
            (b"SSH-2.0-OpenSSH", Protocol::Other),
            (b"", Protocol::Closed),
        ] {
            assert_eq!(Protocol::of(bytes), protocol, "{bytes:?}");
        }
    }
}
