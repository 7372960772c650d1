//! A certificate authority and the certificates that it has signed, created with openssl.

use std::path::PathBuf;
use std::process::Command;

pub struct Authority(tempfile::TempDir);

impl Authority {
    pub fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca -addext basicConstraints=critical,CA:TRUE");
        this
    }

    /// Creates a signed certificate for 127.0.0.1 and a name, in `<file>.pem`, and its key, in `<file>.key`.
    pub fn sign(&self, file: &str, name: &str) {
        self.openssl(&format!(
            "req -newkey rsa:2048 -nodes -keyout new.key -out new.csr -subj /CN={name}"
        ));
        let extensions = format!(
            "subjectAltName=IP:127.0.0.1,DNS:{name}\nextendedKeyUsage=serverAuth,clientAuth\n"
        );
        std::fs::write(self.path("extensions"), extensions).unwrap();
        self.openssl("x509 -req -in new.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out new.pem -days 2 -extfile extensions");
        // The files are renamed into place, so that a concurrent reader never sees a partial file.
        std::fs::rename(self.path("new.key"), self.path(&format!("{file}.key"))).unwrap();
        std::fs::rename(self.path("new.pem"), self.path(&format!("{file}.pem"))).unwrap();
    }

    /// Creates a key pair for tokens, in `token.key` and `token.pub`.
    pub fn token_keys(&self) {
        self.openssl("genrsa -out token.key 2048");
        self.openssl("rsa -in token.key -pubout -out token.pub");
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    pub fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).unwrap()
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(self.0.path())
            .output()
            .expect("openssl must be installed");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
    }
}
