//! TLS: the name is the client's, the roots are checked, certificates are read again.

use std::process::Command;

use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use super::*;
use crate::TlsConfig;

/// A certificate authority and certificates it has signed, made by openssl.
struct Authority(tempfile::TempDir);

impl Authority {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().expect("a directory"));
        this.openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca -addext basicConstraints=critical,CA:TRUE");
        this
    }

    /// Signs a certificate for a name, in `<file>.pem` and `<file>.key`.
    fn sign(&self, file: &str, name: &str) {
        self.openssl(&format!(
            "req -newkey rsa:2048 -nodes -keyout {file}.key -out {file}.csr -subj /CN={name}"
        ));
        let extensions = self.0.path().join("extensions");
        std::fs::write(extensions, format!("subjectAltName=DNS:{name}")).expect("a file");
        self.openssl(&format!(
            "x509 -req -in {file}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {file}.pem -days 2 -extfile extensions"
        ));
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(self.0.path())
            .output()
            .expect("openssl is installed");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.0.path().join(file)).expect("a file")
    }

    fn serve(&self, name: &str) -> Greeter {
        self.serve_with(name, |tls| tls)
    }

    fn serve_with(
        &self,
        name: &str,
        configure: impl FnOnce(ServerTlsConfig) -> ServerTlsConfig,
    ) -> Greeter {
        let identity = Identity::from_pem(
            self.read(&format!("{name}.pem")),
            self.read(&format!("{name}.key")),
        );
        let tls = configure(ServerTlsConfig::new().identity(identity));
        Greeter::start_with("secure", 0, |server| server.tls_config(tls).expect("TLS"))
    }
}

fn secured(server: &Greeter, tls: TlsConfig) -> BalancedChannel {
    BalancedChannel::builder()
        .tls(tls)
        .from_addresses([server.address()])
}

#[tokio::test]
async fn the_fixed_name_is_checked_against_the_given_roots() {
    let authority = Authority::new();
    authority.sign("server", "greeter.internal");
    let server = authority.serve("server");
    let tls = TlsConfig::new("greeter.internal").ca_pem(authority.read("ca.pem"));
    say(&secured(&server, tls)).await.expect("an answer");

    let tls = TlsConfig::new("other.internal").ca_pem(authority.read("ca.pem"));
    let status = say(&secured(&server, tls)).await.expect_err("another name");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("TLS"), "{status}");

    let stranger = Authority::new();
    let tls = TlsConfig::new("greeter.internal").ca_pem(stranger.read("ca.pem"));
    let status = say(&secured(&server, tls))
        .await
        .expect_err("another authority");
    assert!(status.message().contains("TLS"), "{status}");
}

#[tokio::test]
async fn certificates_in_files_are_read_again() {
    let (old, new) = (Authority::new(), Authority::new());
    new.sign("server", "greeter.internal");
    let server = new.serve("server");
    let file = old.0.path().join("ca.pem");
    let channel = secured(&server, TlsConfig::new("greeter.internal").ca_file(&file));
    say(&channel).await.expect_err("not trusted yet");
    std::fs::write(&file, new.read("ca.pem")).expect("a file");
    ready(&channel, 1).await;
    say(&channel).await.expect("trusted without a restart");
}

#[tokio::test]
async fn a_server_that_asks_for_it_is_shown_our_certificate() {
    let (authority, clients) = (Authority::new(), Authority::new());
    authority.sign("server", "greeter.internal");
    clients.sign("client", "caller.internal");
    let roots = Certificate::from_pem(clients.read("ca.pem"));
    let server = authority.serve_with("server", |tls| tls.client_ca_root(roots));
    let tls = || TlsConfig::new("greeter.internal").ca_pem(authority.read("ca.pem"));

    let (certificate, key) = (clients.read("client.pem"), clients.read("client.key"));
    let channel = secured(&server, tls().identity_pem(certificate, key));
    say(&channel).await.expect("an answer");

    let status = say(&secured(&server, tls())).await.expect_err("nobody");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("ertificate"),
        "it says why: {status}"
    );

    authority.sign("client", "caller.internal");
    let (certificate, key) = (authority.read("client.pem"), authority.read("client.key"));
    let stranger = secured(&server, tls().identity_pem(certificate, key));
    let status = say(&stranger).await.expect_err("signed by somebody else");
    assert_eq!(status.code(), Code::Unavailable);
}

/// Calls until there is an answer.
async fn answered(channel: &BalancedChannel) {
    while say(channel).await.is_err() {
        // A call that fails at once lets nobody else run.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn an_identity_in_files_is_read_again_and_half_of_it_leaves_the_last_one_in_force() {
    let (authority, clients) = (Authority::new(), Authority::new());
    authority.sign("server", "greeter.internal");
    let roots = Certificate::from_pem(clients.read("ca.pem"));
    let server = authority.serve_with("server", |tls| tls.client_ca_root(roots));
    let folder = authority.0.path();
    authority.sign("client", "caller.internal");
    let tls = TlsConfig::new("greeter.internal")
        .ca_file(folder.join("ca.pem"))
        .identity_files(folder.join("client.pem"), folder.join("client.key"));
    let channel = BalancedChannel::builder()
        .tls(tls)
        .max_backoff(Duration::from_millis(20))
        .from_addresses([server.address()]);
    say(&channel)
        .await
        .expect_err("not the servers' clients' authority");
    clients.sign("client", "caller.internal");
    for file in ["client.pem", "client.key"] {
        std::fs::write(folder.join(file), clients.read(file)).expect("a file");
    }
    in_time("a call with the new identity", answered(&channel)).await;

    // A renewal in its middle: the key is not there.
    std::fs::remove_file(folder.join("client.key")).expect("a file");
    let port = server.address.port();
    server.shut_down().await;
    let identity = Identity::from_pem(authority.read("server.pem"), authority.read("server.key"));
    let roots = Certificate::from_pem(clients.read("ca.pem"));
    let tls = ServerTlsConfig::new()
        .identity(identity)
        .client_ca_root(roots);
    let _again = Greeter::start_with("secure", port, |server| {
        server.tls_config(tls).expect("TLS")
    });
    in_time("a call with the last identity", answered(&channel)).await;
}
