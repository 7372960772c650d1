//! Proxies in front of servers.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::timeout;

use crate::process::{Program, launcher};
use crate::support::SOON;
use crate::support::tls::Localhost;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Nginx,
    Haproxy,
    Caddy,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Caddy => "caddy",
        }
    }

    fn template(self) -> &'static str {
        match self {
            Self::Nginx => include_str!("../interop_peers/proxies/nginx.conf"),
            Self::Haproxy => include_str!("../interop_peers/proxies/haproxy.cfg"),
            Self::Caddy => include_str!("../interop_peers/proxies/Caddyfile"),
        }
    }
}

/// A kind of proxy, and the differences from its defaults.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub kind: Kind,
    /// Additional directives. `tests/interop_peers/README.md` describes where they are inserted.
    pub extra: &'static str,
    /// haproxy's `timeout client`, which has no default.
    pub timeout_client: &'static str,
}

impl Setup {
    pub const fn of(kind: Kind) -> Self {
        Self {
            kind,
            extra: "",
            timeout_client: "1m",
        }
    }

    pub const fn extra(self, extra: &'static str) -> Self {
        Self { extra, ..self }
    }

    pub const fn timeout_client(self, timeout_client: &'static str) -> Self {
        Self {
            timeout_client,
            ..self
        }
    }
}

/// A proxy with its port and folder. Once started, it runs until it is dropped.
pub struct Front {
    setup: Setup,
    port: u16,
    folder: TempDir,
    launcher: PathBuf,
    program: Option<Program>,
}

impl Front {
    /// Configures a proxy. Returns `None` if the proxy is not installed. With a certificate, clients connect to the proxy over TLS.
    pub fn new(setup: Setup, upstreams: &[SocketAddr], tls: Option<&Localhost>) -> Option<Self> {
        let name = setup.kind.name();
        let launcher = launcher(name, name)?;
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let path = folder.path().display();
        let separator = match setup.kind {
            Kind::Nginx | Kind::Caddy => " ",
            Kind::Haproxy => "\n    ",
        };
        let scheme = if tls.is_some() { "https" } else { "http" };
        let upstream = |(number, address): (usize, &SocketAddr)| match setup.kind {
            Kind::Nginx => format!("server {address};"),
            Kind::Haproxy => format!("server s{number} {address} proto h2"),
            Kind::Caddy => address.to_string(),
        };
        let mut list: Vec<_> = upstreams.iter().enumerate().map(upstream).collect();
        if setup.kind == Kind::Nginx {
            // Without `keepalive`, nginx opens a connection to a server for each call.
            list.push("keepalive 32;".to_owned());
        }
        let config = setup
            .kind
            .template()
            .replace("@LISTEN@", &port.to_string())
            .replace("@DIR@", &path.to_string())
            .replace("@UPSTREAMS@", &list.join(separator))
            .replace("@TLS@", &listening(setup.kind, tls, folder.path()))
            .replace("@SCHEME@", scheme)
            .replace("@ADMIN@", &format!("unix/{path}/admin.sock"))
            .replace("@TIMEOUT_CLIENT@", setup.timeout_client)
            .replace("@EXTRA@", setup.extra)
            .replace("@MAIN@", "");
        fs::write(folder.path().join("config"), config).unwrap();
        Some(Self {
            setup,
            port,
            folder,
            launcher,
            program: None,
        })
    }

    /// Configures and starts a proxy.
    pub async fn start(
        setup: Setup,
        upstreams: &[SocketAddr],
        tls: Option<&Localhost>,
    ) -> Option<Self> {
        let mut front = Self::new(setup, upstreams, tls)?;
        front.run().await;
        Some(front)
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts the proxy and waits until it listens.
    pub async fn run(&mut self) {
        let config = self.folder().join("config");
        let mut command = Command::new(&self.launcher);
        match self.setup.kind {
            Kind::Nginx => {
                command.arg("-p").arg(self.folder());
                command.arg("-e").arg(self.folder().join("error.log"));
                command.arg("-c").arg(config);
            }
            Kind::Haproxy => {
                command.args(["-W", "-db", "-f"]).arg(config);
            }
            Kind::Caddy => {
                command.args(["run", "--adapter", "caddyfile", "--config"]);
                command.arg(config).env("HOME", self.folder());
            }
        }
        let mut program = Program::start(command);
        program.listens(self.port).await;
        self.program = Some(program);
    }

    /// Reloads the configuration of the proxy.
    pub async fn reload(&self) {
        let program = self.program.as_ref().expect("the proxy must run");
        match self.setup.kind {
            Kind::Nginx => program.signal(Signal::SIGHUP),
            Kind::Haproxy => program.signal(Signal::SIGUSR2),
            Kind::Caddy => {
                let mut command = Command::new(&self.launcher);
                // Without `--force`, an unchanged configuration is not reloaded.
                command.args(["reload", "--force", "--adapter", "caddyfile"]);
                command.arg("--config").arg(self.folder().join("config"));
                let admin = format!("unix/{}/admin.sock", self.folder().display());
                command.arg("--address").arg(admin).kill_on_drop(true);
                command.env("HOME", self.folder());
                let output = timeout(SOON, command.output()).await.unwrap().unwrap();
                assert!(output.status.success(), "{output:?}");
            }
        }
    }
}

/// Returns the directives of the listening port, for TLS or for plaintext.
fn listening(kind: Kind, tls: Option<&Localhost>, folder: &Path) -> String {
    let Some(localhost) = tls else {
        let plain = if kind == Kind::Haproxy {
            "proto h2"
        } else {
            ""
        };
        return plain.to_owned();
    };
    let [certificate, key, _] = localhost.files();
    let (chain, secret) = (certificate.display(), key.display());
    match kind {
        Kind::Nginx => format!("ssl; ssl_certificate {chain}; ssl_certificate_key {secret}"),
        Kind::Haproxy => {
            let both = folder.join("both.pem");
            let files = [&certificate, &key].map(|file| fs::read_to_string(file).unwrap());
            fs::write(&both, files.concat()).unwrap();
            format!("ssl crt {} alpn h2", both.display())
        }
        Kind::Caddy => format!("tls {chain} {secret}"),
    }
}

/// Returns a port below the ephemeral range, so that no outgoing connection uses it before the proxy does.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = u16::try_from(std::process::id() % 100).unwrap() * 20;
    loop {
        let port = 30_000 + (base + NEXT.fetch_add(1, Ordering::SeqCst)) % 2_500;
        let address = (Ipv4Addr::LOCALHOST, port);
        // A name server also uses UDP.
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return port;
        }
    }
}
