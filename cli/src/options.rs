//! The options of all commands.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tonic_etcd::Format;

use crate::error::Failure;

/// The options of all commands. The variables of the environment are those of `etcdctl`.
#[derive(Args, Debug)]
#[command(next_help_heading = "Options for etcd")]
pub(crate) struct Options {
    /// The members of etcd, separated by commas.
    #[arg(
        long,
        env = "ETCDCTL_ENDPOINTS",
        value_delimiter = ',',
        default_value = "127.0.0.1:2379",
        global = true,
        value_name = "HOST:PORT"
    )]
    pub(crate) endpoints: Vec<String>,
    /// The user. The password is read from --password-file, from `ETCDCTL_PASSWORD`, or from the part of `ETCDCTL_USER` after a colon.
    #[arg(
        long,
        env = "ETCDCTL_USER",
        hide_env_values = true,
        global = true,
        value_name = "NAME"
    )]
    user: Option<String>,
    /// A file that contains the password of the user. A newline at the end is ignored.
    #[arg(long, global = true, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Verify etcd against this CA certificate (PEM file). Enables TLS, as an endpoint with https:// does.
    #[arg(long, env = "ETCDCTL_CACERT", global = true, value_name = "FILE")]
    pub(crate) cacert: Option<PathBuf>,
    /// The client certificate for etcd (PEM file).
    #[arg(
        long,
        env = "ETCDCTL_CERT",
        global = true,
        requires = "key",
        value_name = "FILE"
    )]
    pub(crate) cert: Option<PathBuf>,
    /// The key of the client certificate (PEM file).
    #[arg(
        long,
        env = "ETCDCTL_KEY",
        global = true,
        requires = "cert",
        value_name = "FILE"
    )]
    pub(crate) key: Option<PathBuf>,
    /// The prefix of the keys. Default: the prefix of the format, /gRPC/ for etcd's own.
    #[arg(long, global = true)]
    pub(crate) prefix: Option<String>,
    /// The prefix of the control keys and of the status keys.
    #[arg(long, global = true, default_value = "/gRPC.control/")]
    pub(crate) control_prefix: String,
    /// The only format that is read, such as kratos or go-zero. Default: each value is recognised by its contents.
    #[arg(long, global = true)]
    pub(crate) format: Option<Format>,
    /// Write JSON, one value per line.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// The timeout of one request or one connection attempt.
    #[arg(long, global = true, default_value = "5s", value_parser = duration, value_name = "DURATION")]
    pub(crate) timeout: Duration,
}

impl Options {
    /// Returns the format of new keys, and the format that determines the place of the keys.
    pub(crate) fn key_format(&self) -> Format {
        self.format.clone().unwrap_or_default()
    }

    /// Returns what all keys of a service start with.
    pub(crate) fn service_prefix(&self, service: &str) -> String {
        self.key_format()
            .service_prefix(self.prefix.as_deref(), service)
    }

    /// Returns the user and the password.
    ///
    /// # Errors
    ///
    /// Fails if the file with the password cannot be read, or if a user has no password.
    pub(crate) fn credentials(&self) -> Result<Option<(String, String)>, Failure> {
        let Some(user) = &self.user else {
            return Ok(None);
        };
        let (name, inline) = match user.split_once(':') {
            Some((name, password)) => (name, Some(password.to_owned())),
            None => (user.as_str(), None),
        };
        let password = match &self.password_file {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|error| {
                    Failure::usage(format!(
                        "cannot read the password from {}: {error}",
                        path.display()
                    ))
                })?;
                Some(text.trim_end_matches(['\r', '\n']).to_owned())
            }
            None => std::env::var("ETCDCTL_PASSWORD").ok().or(inline),
        };
        let password = password.ok_or_else(|| {
            Failure::usage(format!(
                "user {name:?} has no password: set ETCDCTL_PASSWORD or --password-file"
            ))
        })?;
        Ok(Some((name.to_owned(), password)))
    }
}

/// Parses a duration such as `500ms` or `1m 30s`. A number without a unit is a number of seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<u64>().map(Duration::from_secs);
    let duration = seconds.or_else(|_| humantime::parse_duration(text));
    match duration {
        Ok(duration) if duration.is_zero() => Err("is zero".to_owned()),
        // Longer times cannot always be added to an `Instant`.
        Ok(duration) if duration > MAX_DURATION => Err("is longer than a year".to_owned()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(format!("{error}; write for example 500ms or 10s")),
    }
}

const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_positive_and_bounded() {
        assert_eq!(duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("1m 30s"), Ok(Duration::from_secs(90)));
        for invalid in ["0", "0s", "x", "1000000 weeks", "-1s"] {
            assert!(duration(invalid).is_err(), "{invalid}");
        }
    }
}
