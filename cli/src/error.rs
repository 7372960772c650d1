//! The failure of a command, and the exit codes.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use tonic_etcd::error::{EtcdError, RegisterError, RegistryError};

use crate::escape::escaped;

/// The exit codes. `docs/command.md` documents them.
pub(crate) mod code {
    /// The command has found a problem, or the answer is negative.
    pub(crate) const NEGATIVE: u8 = 1;
    /// An option or an argument is not valid. clap exits with this code as well.
    pub(crate) const USAGE: u8 = 2;
    /// etcd is unreachable, or has rejected a request.
    pub(crate) const ETCD: u8 = 3;
    /// A server did not respond or did not confirm in time.
    pub(crate) const TIMED_OUT: u8 = 4;
    /// The operating system rejected an operation.
    pub(crate) const LOCAL: u8 = 5;
    /// Another writer has changed the key.
    pub(crate) const CONFLICT: u8 = 6;
    /// The child of `register` cannot be executed, as in a shell.
    pub(crate) const CANNOT_EXECUTE: u8 = 126;
    /// The child of `register` does not exist, as in a shell.
    pub(crate) const NOT_FOUND: u8 = 127;
    /// The child of `register` was ended by a signal: this value plus the number of the signal, as in a shell.
    pub(crate) const SIGNAL: u8 = 128;
}

/// A failure that ends the command: one line, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }

    pub(crate) fn negative(message: impl Into<String>) -> Self {
        Self::new(code::NEGATIVE, message)
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(code::CONFLICT, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(code::USAGE, message)
    }

    pub(crate) fn local(message: impl Into<String>) -> Self {
        Self::new(code::LOCAL, message)
    }

    pub(crate) fn timed_out(message: impl Into<String>) -> Self {
        Self::new(code::TIMED_OUT, message)
    }

    /// Creates the failure of a request to etcd. `what` completes "cannot".
    pub(crate) fn of_etcd(what: &str, error: &etcd_client::Error) -> Self {
        let text = etcd_error(error);
        let advice = advice(&text);
        Self::new(code::ETCD, format!("cannot {what}: {text}{advice}"))
    }

    /// Creates the failure of a resolver of the keys with this prefix.
    pub(crate) fn of_resolver(prefix: &str, error: &EtcdError) -> Self {
        let text = error.to_string();
        let (prefix, advice) = (escaped(prefix), advice(&text));
        Self::new(
            code::ETCD,
            format!("cannot read the keys below {prefix:?}: {text}{advice}"),
        )
    }

    pub(crate) fn is_usage(&self) -> bool {
        self.code == code::USAGE
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }

    pub(crate) fn print(&self) {
        log(&format!("error: {}", self.message));
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        let is_usage = matches!(
            error,
            RegistryError::NoEndpoints
                | RegistryError::InvalidEndpoint { .. }
                | RegistryError::InvalidTls { .. }
        );
        let code = if is_usage { code::USAGE } else { code::ETCD };
        Self::new(code, for_command(&error.to_string()))
    }
}

impl From<RegisterError> for Failure {
    fn from(error: RegisterError) -> Self {
        let is_usage = matches!(
            error,
            RegisterError::Invalid { .. } | RegisterError::Address { .. }
        );
        let code = if is_usage { code::USAGE } else { code::ETCD };
        let text = error.to_string();
        let advice = advice(&text);
        Self::new(code, format!("{text}{advice}"))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::local(format!("cannot write to stdout: {error}"))
    }
}

/// Returns what to do about an error of etcd, if the text of the error does not say it.
pub(crate) fn advice(text: &str) -> &'static str {
    if text.contains("permission denied") {
        "; grant a role of the user this permission, or set another --user"
    } else if text.contains("user name is empty") {
        "; etcd requires a user: set --user"
    } else {
        ""
    }
}

/// Replaces the names of the library's methods in its advice by the options of the command.
fn for_command(text: &str) -> String {
    text.replace(
        "check the name and the password that are passed to `.user(name, password)`",
        "check --user, and the password in ETCDCTL_PASSWORD or --password-file",
    )
    .replace(
        "configure `.tls_config(..)` (feature `tls`)",
        "set --cacert",
    )
    .replace("set them with `.user(name, password)`", "set --user")
}

/// Returns the text of an error of etcd on one line.
pub(crate) fn etcd_error(error: &etcd_client::Error) -> String {
    match error {
        etcd_client::Error::GRpcStatus(status) => escaped(status.message()),
        other => escaped(&other.to_string()),
    }
}

pub(crate) fn is_permission_denied(error: &etcd_client::Error) -> bool {
    etcd_error(error).contains("permission denied")
}

/// Writes one line to stderr. A failed write is ignored, because there is no other place to report it.
pub(crate) fn log(line: &str) {
    let _ = writeln!(io::stderr(), "tonic-etcd: {}", escaped(line));
}
