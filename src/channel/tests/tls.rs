//! TLS: the name is the client's, the roots are checked, certificates are read again.

use std::process::Command;

use tonic::transport::{Identity, ServerTlsConfig};

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
        let identity = Identity::from_pem(
            self.read(&format!("{name}.pem")),
            self.read(&format!("{name}.key")),
        );
        let tls = ServerTlsConfig::new().identity(identity);
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
