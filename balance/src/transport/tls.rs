//! TLS to endpoints and to etcd, with rustls.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// TLS to endpoints or to etcd: the trusted certificates, and the client's own identity.
///
/// One name is set here for the whole channel, and the certificate of every server must be valid for it. The name is never taken from the
/// registry. Otherwise a process that can write to the registry could direct clients to its own server with its own certificate. If the
/// program itself contains the addresses, as it does for etcd, [`verify_dialled_host`](Self::verify_dialled_host) verifies each server by
/// the host of its own address.
///
/// Servers are verified with the system's root certificates unless other certificates are set. Certificate files are read again at each
/// handshake, so certificates can be renewed without a restart.
///
/// ```no_run
/// use tonic_balance::{BalancedChannel, TlsConfig};
///
/// # fn run() {
/// let tls = TlsConfig::new("greeter.internal")
///     .ca_certificate_file("/etc/greeter/ca.pem")
///     .identity_files("/etc/greeter/client.pem", "/etc/greeter/client.key");
/// let channel = BalancedChannel::builder().tls_config(tls).addresses(["10.0.0.5:50051"]).connect_lazy();
/// # }
/// ```
#[derive(Clone)]
#[must_use = "a `TlsConfig` does nothing until it is given to a builder"]
pub struct TlsConfig {
    /// The name that certificates must be valid for. If it is `None`, a certificate must be valid for the host that was dialled.
    server_name: Option<String>,
    roots: Vec<Pem>,
    system_roots: bool,
    identity: Option<(Pem, Pem)>,
}

impl TlsConfig {
    /// Creates a configuration for servers whose certificate is valid for this name or IP address.
    pub fn new(server_name: impl Into<String>) -> Self {
        Self::of(Some(server_name.into()))
    }

    /// Creates a configuration for servers whose certificate is valid for the host name or IP address by which the client dialled them.
    ///
    /// Use this only for addresses that the program itself contains: those of
    /// [`ChannelBuilder::addresses`](crate::channel::ChannelBuilder::addresses), or of etcd's members. A channel with this configuration
    /// and any other source connects to no endpoint.
    ///
    /// ```no_run
    /// use tonic_balance::{BalancedChannel, TlsConfig};
    ///
    /// # fn run() {
    /// let tls = TlsConfig::verify_dialled_host().ca_certificate_file("/etc/greeter/ca.pem");
    /// let channel = BalancedChannel::builder()
    ///     .tls_config(tls)
    ///     .addresses(["greeter-0.greeter:50051", "greeter-1.greeter:50051"])
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn verify_dialled_host() -> Self {
        Self::of(None)
    }

    fn of(server_name: Option<String>) -> Self {
        Self {
            server_name,
            roots: Vec::new(),
            system_roots: false,
            identity: None,
        }
    }

    /// Trusts the certificates in this PEM text. The system's root certificates are then trusted only with
    /// [`with_native_roots`](Self::with_native_roots).
    pub fn ca_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.roots.push(Pem::Text(pem.into()));
        self
    }

    /// Like [`ca_certificate`](Self::ca_certificate), but from a file that is read at each handshake.
    pub fn ca_certificate_file(mut self, path: impl AsRef<Path>) -> Self {
        self.roots.push(Pem::File(path.as_ref().to_owned()));
        self
    }

    /// Trusts the system's root certificates as well. This is the default if no certificates are set.
    pub fn with_native_roots(mut self) -> Self {
        self.system_roots = true;
        self
    }

    /// Sets the certificate chain and the private key that the client presents to servers, as PEM texts. By default the client presents no
    /// certificate.
    pub fn identity(mut self, certificates: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.identity = Some((Pem::Text(certificates.into()), Pem::Text(key.into())));
        self
    }

    /// Like [`identity`](Self::identity), but from files that are read at each handshake.
    pub fn identity_files(mut self, certificates: impl AsRef<Path>, key: impl AsRef<Path>) -> Self {
        let certificates = Pem::File(certificates.as_ref().to_owned());
        self.identity = Some((certificates, Pem::File(key.as_ref().to_owned())));
        self
    }

    fn has_files(&self) -> bool {
        let identity = self.identity.iter().flat_map(|(chain, key)| [chain, key]);
        let mut sources = self.roots.iter().chain(identity);
        sources.any(|pem| matches!(pem, Pem::File(_)))
    }

    /// Reads the certificates. This function blocks.
    fn load(&self) -> io::Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        for pem in &self.roots {
            for certificate in certificates(&pem.read()?)
                .map_err(|error| pem.invalid("root certificate", error))?
            {
                roots.add(certificate).map_err(invalid)?;
            }
        }
        if self.system_roots || self.roots.is_empty() {
            // A system store often contains a few certificates that cannot be parsed. They are skipped, and the others are used.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        if roots.is_empty() {
            return Err(invalid("no root certificate was found"));
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(invalid)?
            .with_root_certificates(roots);
        let mut config = match &self.identity {
            None => config.with_no_client_auth(),
            Some((chain, key)) => {
                let pem = chain.read()?;
                let chain = certificates(&pem)
                    .map_err(|error| chain.invalid("certificate chain", error))?;
                let pem = key.read()?;
                let key = private_key(&pem).map_err(|error| key.invalid("private key", error))?;
                config.with_client_auth_cert(chain, key).map_err(invalid)?
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

/// Checks the name of the server and the PEM texts. Files are not read: they may be written later.
///
/// # Errors
///
/// Returns the first part that can never work, and the reason.
pub fn check(config: &TlsConfig) -> Result<(), String> {
    if let Some(name) = &config.server_name
        && ServerName::try_from(name.as_str()).is_err()
    {
        return Err(format!(
            "the TLS server name {name:?} is neither a host name nor an IP address"
        ));
    }
    let mut has_roots = config.system_roots || config.roots.is_empty();
    for root in &config.roots {
        let Pem::Text(text) = root else {
            has_roots = true;
            continue;
        };
        for certificate in
            certificates(text).map_err(|reason| format!("`ca_certificate` {reason}"))?
        {
            let added = RootCertStore::empty().add(certificate);
            added
                .map_err(|error| format!("`ca_certificate` has an invalid certificate: {error}"))?;
            has_roots = true;
        }
    }
    if !has_roots {
        return Err("`ca_certificate` contains no PEM certificate".to_owned());
    }
    let Some((chain, key)) = &config.identity else {
        return Ok(());
    };
    if let Pem::Text(text) = chain {
        let chain =
            certificates(text).map_err(|reason| format!("`identity`: the chain {reason}"))?;
        if chain.is_empty() {
            return Err("`identity` contains no PEM certificate".to_owned());
        }
    }
    if let Pem::Text(text) = key {
        private_key(text).map_err(|reason| format!("the key of `identity` {reason}"))?;
    }
    Ok(())
}

/// Parses the certificates in a PEM text. The error has a fixed text, because the error of the parser contains the line that it could not
/// parse. If a private key was given by mistake, that line may be a part of the key.
fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    let certificates = CertificateDer::pem_slice_iter(text);
    certificates
        .collect::<Result<_, _>>()
        .map_err(|_| "is not valid PEM")
}

/// Parses a private key in PEM. The error has a fixed text, because the error of the parser contains the line that it could not parse. If
/// the line breaks of the key were lost, that line is the whole key.
fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, &'static str> {
    PrivateKeyDer::from_pem_slice(text).map_err(|_| "is not a PEM private key")
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConfig")
            .field("server_name", &self.server_name)
            .field("identity", &self.identity.is_some())
            .finish_non_exhaustive()
    }
}

/// The source of a PEM text.
#[derive(Clone)]
enum Pem {
    Text(Vec<u8>),
    File(PathBuf),
}

impl Pem {
    /// Names the text in an error about its contents.
    fn invalid(&self, what: &str, error: &str) -> io::Error {
        match self {
            Self::Text(_) => invalid(format!("the {what} {error}")),
            Self::File(path) => invalid(format!("the {what} {} {error}", path.display())),
        }
    }

    fn read(&self) -> io::Result<Vec<u8>> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::File(path) => std::fs::read(path).map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            }),
        }
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// A [`TlsConfig`] in use, with the certificates that were loaded last.
#[derive(Clone)]
pub(crate) struct Tls {
    config: Arc<TlsConfig>,
    loaded: Arc<Mutex<Option<Arc<ClientConfig>>>>,
}

impl Tls {
    pub(crate) fn new(config: TlsConfig) -> Self {
        Self {
            config: Arc::new(config),
            loaded: Arc::default(),
        }
    }

    /// Returns an error if the configuration can never work; see [`check`].
    pub(crate) fn check(&self) -> Result<(), String> {
        check(&self.config)
    }

    /// Returns the name that the certificates of all servers must be valid for. This name is also the authority of calls. If it is `None`,
    /// each server is verified by the host of its own address.
    pub(crate) fn server_name(&self) -> Option<&str> {
        self.config.server_name.as_deref()
    }

    /// Performs the handshake, and checks that the peer did not choose a protocol other than HTTP/2. `host` is used only if the
    /// configuration has no server name. In that case it is required.
    pub(crate) async fn handshake<T>(&self, io: T, host: Option<&str>) -> io::Result<TlsStream<T>>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let name = self.server_name().or(host).ok_or_else(|| {
            invalid("no server name is configured, and the address comes from discovery; use TlsConfig::new(name)")
        })?;
        let name = ServerName::try_from(name.to_owned()).map_err(invalid)?;
        let connector = TlsConnector::from(self.current().await?);
        let stream = connector.connect(name, io).await.map_err(|error| {
            // This error of rustls means that the first bytes of the server were not a TLS record.
            if error.to_string().contains("InvalidContentType") {
                return io::Error::new(error.kind(), "the server does not speak TLS");
            }
            error
        })?;
        // gRPC requires that HTTP/2 is negotiated with ALPN, but some servers that support only HTTP/2 omit the negotiation. These servers
        // are accepted. A server that chose HTTP/1 is rejected.
        match stream.get_ref().1.alpn_protocol() {
            None | Some(b"h2") => Ok(stream),
            Some(_) => Err(io::Error::other(
                "the server negotiated a protocol other than HTTP/2",
            )),
        }
    }

    /// Returns the configuration for the next handshake. If the files cannot be loaded now, for example during their renewal, the last good
    /// configuration stays in use.
    async fn current(&self) -> io::Result<Arc<ClientConfig>> {
        let last = self.lock().clone();
        if let Some(last) = &last
            && !self.config.has_files()
        {
            return Ok(Arc::clone(last));
        }
        let config = Arc::clone(&self.config);
        let loading = tokio::task::spawn_blocking(move || config.load()).await;
        match loading.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            Ok(fresh) => {
                *self.lock() = Some(Arc::clone(&fresh));
                Ok(fresh)
            }
            Err(error) => match last {
                Some(last) => {
                    tracing::warn!(%error, "could not reload the certificates; the last ones stay in use");
                    Ok(last)
                }
                None => Err(error),
            },
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<ClientConfig>>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
