//! The errors of the public operations, one type each, and what etcd can answer.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use tonic_balance::error::causes;
use tonic_balance::{AddressError, ChannelError};

/// A failed exchange with etcd: what was asked, of which member, and what came back.
///
/// Cloning is a reference count, so that a status can keep the last one.
#[derive(Clone, Debug)]
pub struct EtcdError(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kind: EtcdErrorKind,
    operation: &'static str,
    endpoint: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl EtcdError {
    pub(crate) fn new(
        kind: EtcdErrorKind,
        operation: &'static str,
        endpoint: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self(Arc::new(Inner {
            kind,
            operation,
            endpoint: endpoint.to_owned(),
            source: source.into(),
        }))
    }

    /// What it means.
    #[must_use]
    pub fn kind(&self) -> EtcdErrorKind {
        self.0.kind
    }

    /// Whether it is the same failure, and not only one like it.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The error of a task that ends before its owner does.
    pub(crate) fn task_ended(operation: &'static str) -> Self {
        let source = if std::thread::panicking() {
            "it has panicked"
        } else {
            "the runtime on which it was started has ended"
        };
        Self::new(EtcdErrorKind::TaskEnded, operation, "(none)", source)
    }

    /// Returns the name of the operation that failed, such as `lease grant`.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// Returns the member that was asked.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.0.endpoint
    }
}

impl fmt::Display for EtcdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            kind,
            operation,
            endpoint,
            source,
        } = &*self.0;
        let cause = causes(&**source);
        match kind {
            EtcdErrorKind::InvalidRequest => {
                return write!(f, "nothing was requested of etcd: {cause}");
            }
            EtcdErrorKind::TaskEnded => return write!(f, "{operation}: {kind}: {cause}"),
            _ => {}
        }
        write!(f, "{operation} at etcd {endpoint} failed: {kind}: {cause}")
    }
}

impl std::error::Error for EtcdError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0.source)
    }
}

/// What an [`EtcdError`] means. Told by etcd's texts, not by gRPC codes: `OutOfRange` alone has four meanings there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EtcdErrorKind {
    /// The member could not be reached, or the connection broke. Everything that is not known to mean something else is this, and is
    /// tried again.
    Unavailable,
    /// The member did not answer in time.
    DeadlineExceeded,
    /// The member has lost its cluster.
    NoLeader,
    /// The member answers out of a raft term that is over: it was frozen or cut off, or lags.
    StaleTerm,
    /// The store is full; it may be compacted any moment.
    NoSpace,
    /// The revision asked for is compacted away.
    Compacted,
    /// The revision asked for is not reached: the store was wiped or restored.
    FutureRevision,
    /// The answer is larger than the limit for one message.
    ResponseTooLarge,
    /// The request is larger than etcd accepts (1.5 MiB by default).
    RequestTooLarge,
    /// The lease has expired or was revoked.
    LeaseNotFound,
    /// A lease of this id exists.
    LeaseExists,
    /// The TTL is above etcd's maximum.
    LeaseTtlTooLarge,
    /// The user may not read or write this key. Older servers say it for an expired token as well.
    PermissionDenied,
    /// The token is expired, or the store's users have changed since it was issued.
    InvalidToken,
    /// Name and password are refused.
    BadCredentials,
    /// etcd wants a user, and none is configured.
    CredentialsRequired,
    /// Credentials are configured, but etcd has authentication switched off.
    AuthNotEnabled,
    /// The peer speaks gRPC but is not etcd.
    Unimplemented,
    /// The request cannot be made: a service name or a prefix is not valid. Nothing was sent.
    InvalidRequest,
    /// The task that talks to etcd has ended with its runtime, or has panicked. It is not started again.
    TaskEnded,
}

impl EtcdErrorKind {
    /// Returns whether the same request can succeed at another member, or later.
    #[must_use]
    pub fn is_transient(self) -> bool {
        matches!(
            self,
            Self::Unavailable
                | Self::DeadlineExceeded
                | Self::NoLeader
                | Self::StaleTerm
                | Self::NoSpace
        )
    }

    /// Whether a fresh token may help.
    pub(crate) fn is_refusal(self) -> bool {
        matches!(
            self,
            Self::InvalidToken | Self::PermissionDenied | Self::CredentialsRequired
        )
    }

    /// Whether nothing but an operator can help. Such a failure is final at start and retried slowly later.
    pub(crate) fn needs_operator(self) -> bool {
        self.is_refusal()
            || matches!(
                self,
                Self::BadCredentials
                    | Self::Unimplemented
                    | Self::RequestTooLarge
                    | Self::LeaseTtlTooLarge
            )
    }
}

impl fmt::Display for EtcdErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unavailable => "the member is unavailable",
            Self::DeadlineExceeded => "no answer in time",
            Self::NoLeader => "the member has no leader",
            Self::StaleTerm => "the answer is from a raft term that is over",
            Self::NoSpace => "the database space is exceeded",
            Self::Compacted => "the revision is compacted",
            Self::FutureRevision => "the revision is not reached yet",
            Self::ResponseTooLarge => "the answer is too large",
            Self::RequestTooLarge => "the request is too large",
            Self::LeaseNotFound => "the lease is gone",
            Self::LeaseExists => "the lease exists already",
            Self::LeaseTtlTooLarge => "the lease TTL is too large",
            Self::PermissionDenied => "permission denied",
            Self::InvalidToken => "the token is not valid any more",
            Self::BadCredentials => "user name or password is wrong",
            Self::CredentialsRequired => "a user name and password are required",
            Self::AuthNotEnabled => "authentication is not enabled",
            Self::Unimplemented => "the peer is not an etcd",
            Self::InvalidRequest => "the request is not valid",
            Self::TaskEnded => "the task that talks to etcd has ended",
        })
    }
}

/// Why no connection to etcd could be made.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// A channel's target is not of the form `etcd://host:port[,host:port…]/service`, nor of grpc-go's or go-zero's forms, or it is ambiguous.
    #[error("target {target:?} is not valid: {reason}; write etcd://host:port/service")]
    #[non_exhaustive]
    InvalidTarget {
        /// The target as it was given.
        target: String,
        /// What is wrong with it.
        reason: String,
    },
    /// etcd was reached, and the channel could not be connected.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// No endpoint was given.
    #[error("no etcd endpoint given; pass at least one, such as 127.0.0.1:2379")]
    NoEndpoints,
    /// An endpoint is not of the form `[http[s]://]host:port`.
    #[error(
        "etcd endpoint {endpoint:?} is not valid: {reason}; write host:port, http://host:port or https://host:port"
    )]
    #[non_exhaustive]
    InvalidEndpoint {
        /// The endpoint as it was given.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No member answered.
    #[error(
        "no etcd answered at {}; check that it runs there and that the port (2379 by default) is right and open: {source}", endpoints.join(", ")
    )]
    #[non_exhaustive]
    Unreachable {
        /// All endpoints tried.
        endpoints: Vec<String>,
        /// The last failure.
        source: EtcdError,
    },
    /// One side speaks TLS and the other does not, or the certificates do not fit.
    #[error("no secure connection to etcd at {}: {reason}: {source}", endpoints.join(", "))]
    #[non_exhaustive]
    Tls {
        /// All endpoints tried.
        endpoints: Vec<String>,
        /// What was seen, and what to do.
        reason: String,
        /// The last failure.
        source: EtcdError,
    },
    /// Something answers, but not etcd.
    #[error(
        "the server at {} is not an etcd ({reason}); check host and port, etcd's client port is 2379 by default: {source}", endpoints.join(", ")
    )]
    #[non_exhaustive]
    NotEtcd {
        /// All endpoints tried.
        endpoints: Vec<String>,
        /// What was seen.
        reason: String,
        /// The last failure.
        source: EtcdError,
    },
    /// etcd refused the user.
    #[error(
        "etcd at {} refused {user}; check name and password given to `.user(name, password)`: {source}", endpoints.join(", ")
    )]
    #[non_exhaustive]
    Credentials {
        /// All endpoints tried.
        endpoints: Vec<String>,
        /// The user, in words, never with the password.
        user: String,
        /// etcd's answer.
        source: EtcdError,
    },
    /// etcd answered something else.
    #[error("etcd at {} refused the connection check: {source}", endpoints.join(", "))]
    #[non_exhaustive]
    Refused {
        /// All endpoints tried.
        endpoints: Vec<String>,
        /// etcd's answer.
        source: EtcdError,
    },
}

/// Why a server could not be registered, or its registration not be changed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// A service name, id, weight, TTL or other value is not valid. Nothing was sent to etcd.
    #[error("registration of {service:?} is not valid: {reason}")]
    #[non_exhaustive]
    Invalid {
        /// The service, or the exact key.
        service: String,
        /// Which value, and what is wrong with it.
        reason: String,
    },
    /// The address to advertise is not valid. Nothing was sent to etcd.
    #[error(
        "registration of {service:?} has no address that clients can dial; set one with `.address(\"host:port\")`: {source}"
    )]
    #[non_exhaustive]
    Address {
        /// The service, or the exact key.
        service: String,
        /// What is wrong with it.
        source: AddressError,
    },
    /// etcd refused for good: credentials, permission, size.
    #[error("etcd refused to register {key:?}: {source}")]
    #[non_exhaustive]
    Refused {
        /// The key.
        key: String,
        /// etcd's answer.
        source: EtcdError,
    },
    /// etcd did not take the write within the bound. A registration that is up goes on trying.
    #[error(
        "{key:?} could not be written to etcd at {} within {} s{}", endpoints.join(", "),
        bound.as_secs_f64(),
        cause(source.as_ref())
    )]
    #[non_exhaustive]
    TimedOut {
        /// The key.
        key: String,
        /// All endpoints tried.
        endpoints: Vec<String>,
        /// The bound that has passed.
        bound: Duration,
        /// The last failure, if there was one.
        source: Option<EtcdError>,
    },
    /// Another server has taken the key over.
    #[error("{key:?} is registered by another server, under lease {lease}")]
    #[non_exhaustive]
    Superseded {
        /// The key.
        key: String,
        /// The other's lease.
        lease: crate::keyspace::LeaseId,
    },
    /// The registration was to have a thread of its own, and the system has none. Nothing was sent to etcd.
    #[error("no thread could be started for the registration of {key:?}: {source}")]
    #[non_exhaustive]
    Thread {
        /// The key.
        key: String,
        /// The operating system's answer.
        source: Arc<io::Error>,
    },
    /// The registration has ended.
    #[error("the registration of {key:?} has ended")]
    #[non_exhaustive]
    Ended {
        /// The key.
        key: String,
    },
}

/// Why a registered server ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The listening socket could not be bound. Nothing was registered.
    #[error("could not listen on {address}: {source}")]
    #[non_exhaustive]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The registration was refused. The server was stopped.
    #[error("the server was stopped because it could not be registered: {0}")]
    Register(#[from] RegisterError),
    /// The server failed. It was deregistered.
    #[error("the server failed: {}", causes(.0))]
    Serve(#[from] tonic::transport::Error),
    /// The signal handlers could not be installed. Nothing was registered.
    #[error("could not listen for SIGTERM and SIGINT: {0}")]
    Signal(#[source] io::Error),
}

/// The last failure behind a time limit, if there was one.
fn cause(source: Option<&EtcdError>) -> String {
    source.map_or_else(String::new, |source| format!(": {source}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_an_error_has_every_cause_once() {
        let mut status = tonic::Status::unavailable("greeter: no route");
        status.set_source(Arc::new(io::Error::other("no route")));
        let error = EtcdError::new(EtcdErrorKind::Unavailable, "list", "10.0.0.1:2379", status);
        let line = "list at etcd 10.0.0.1:2379 failed: the member is unavailable: Unavailable: greeter: no route";
        assert_eq!(error.to_string(), line);
        assert_eq!(causes(&error), line);
        let refused = RegistryError::Refused {
            endpoints: vec!["10.0.0.1:2379".to_owned()],
            source: error,
        };
        assert!(refused.to_string().ends_with(line), "{refused}");
    }
}
