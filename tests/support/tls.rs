//! A certificate for this machine, and connections that trust it.

use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

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

    pub fn client(&self) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.0.read("ca.pem")))
            .domain_name("localhost")
    }

    /// Connects and shakes hands, and says nothing further.
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
