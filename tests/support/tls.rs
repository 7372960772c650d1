//! A certificate for `localhost`, and connections that trust it.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};
use tonic_etcd::TlsConfig;

use super::authority::Authority;

pub type TlsStream = tokio_rustls::client::TlsStream<tokio::net::TcpStream>;

/// An authority that has signed a certificate for `localhost`.
pub struct Localhost(Authority);

impl Localhost {
    pub fn new() -> Self {
        let authority = Authority::new();
        authority.sign("server", "localhost");
        Self(authority)
    }

    pub fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().identity(Identity::from_pem(
            self.0.read("server.pem"),
            self.0.read("server.key"),
        ))
    }

    /// Returns the TLS acceptor for a bare HTTP/2 server.
    pub fn acceptor(&self) -> TlsAcceptor {
        let chain = CertificateDer::from_pem_slice(&self.0.read("server.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&self.0.read("server.key")).unwrap();
        let provider = Arc::new(ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![chain], key)
            .unwrap();
        config.alpn_protocols.push(b"h2".to_vec());
        TlsAcceptor::from(Arc::new(config))
    }

    /// Returns the paths of three files: the certificate, its key, and the certificate of the authority.
    pub fn files(&self) -> [PathBuf; 3] {
        ["server.pem", "server.key", "ca.pem"].map(|file| self.0.path(file))
    }

    /// Returns the TLS configuration of a channel that trusts the certificate.
    pub fn trusted(&self) -> TlsConfig {
        TlsConfig::new("localhost").ca_certificate(self.ca())
    }

    /// Returns the authority's certificate.
    pub fn ca(&self) -> Vec<u8> {
        self.0.read("ca.pem")
    }

    pub fn client(&self) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.0.read("ca.pem")))
            .domain_name("localhost")
    }

    /// Connects and performs the TLS handshake, without sending any data.
    pub async fn connect(&self, address: &str) -> TlsStream {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(&self.0.read("ca.pem")).unwrap())
            .unwrap();
        let mut config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols.push(b"h2".to_vec());
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(ServerName::try_from("localhost").unwrap(), stream)
            .await
            .unwrap()
    }
}
