//! The errors of all public operations, and the kinds of etcd errors.
//!
//! The text of each error is one line: what failed, where, and all causes. If a fix is known, the text also says what to do. The causes are
//! also in the fields of the errors. `Error::source` returns `None`, because reporters that print the chain of sources, such as anyhow's,
//! would otherwise print the causes twice.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use tonic_balance::__private::{causes, without_password};

pub use crate::format::error::FormatError;
use crate::keyspace::LeaseId;
pub use tonic_balance::error::{AddressError, CallError, ChannelError, ServiceConfigError};

/// A failed request to etcd: the operation, the member, and the cause.
///
/// The text contains all causes, so [`source`](std::error::Error::source) returns `None`. [`status`](Self::status) returns the gRPC status.
///
/// A clone is a reference to the same error. So a resolver and a registration can keep their last error and return it repeatedly.
#[derive(Clone, Debug)]
pub struct EtcdError(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kind: EtcdErrorKind,
    operation: &'static str,
    /// The member, or a list of members; `None` if no member was involved.
    endpoint: Option<String>,
    cause: Box<dyn std::error::Error + Send + Sync>,
}

impl EtcdError {
    pub(crate) fn new(
        kind: EtcdErrorKind,
        operation: &'static str,
        endpoint: &str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self(Arc::new(Inner {
            kind,
            operation,
            endpoint: Some(endpoint.to_owned()),
            cause: cause.into(),
        }))
    }

    /// Creates an error in which no member was involved.
    pub(crate) fn without_endpoint(
        kind: EtcdErrorKind,
        operation: &'static str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self(Arc::new(Inner {
            kind,
            operation,
            endpoint: None,
            cause: cause.into(),
        }))
    }

    /// Returns the kind of the error.
    #[must_use]
    pub fn kind(&self) -> EtcdErrorKind {
        self.0.kind
    }

    /// Returns whether both values are clones of the same error. Errors of separate failures are never the same, even if their contents are
    /// equal.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Creates the error of a task that has ended while its owner still exists.
    pub(crate) fn task_ended(operation: &'static str) -> Self {
        let cause = if std::thread::panicking() {
            "it has panicked"
        } else {
            "the runtime on which it was started has ended"
        };
        Self::without_endpoint(EtcdErrorKind::TaskEnded, operation, cause)
    }

    /// Returns the name of the operation that failed, such as `lease grant`.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// Returns the member that received the request, or, if no member received it, the member whose connection failed last. Returns `None`
    /// if there is no such member, if the error concerns several members, and for a client that was passed to
    /// [`Registry::from_client`](crate::Registry::from_client).
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        let endpoint = self.0.endpoint.as_deref();
        // A list of members is not an address.
        endpoint.filter(|endpoint| endpoint.parse::<tonic_balance::Address>().is_ok())
    }

    /// Returns the gRPC status of the request; `None` if nothing was sent, or if the failure has no status.
    #[must_use]
    pub fn status(&self) -> Option<&tonic::Status> {
        let first: &(dyn std::error::Error + 'static) = &*self.0.cause;
        std::iter::successors(Some(first), |error| error.source())
            .find_map(|error| error.downcast_ref())
    }
}

impl fmt::Display for EtcdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            kind,
            operation,
            endpoint,
            cause,
        } = &*self.0;
        let cause = causes(&**cause);
        match kind {
            EtcdErrorKind::InvalidRequest => {
                return write!(f, "no request was sent to etcd: {cause}");
            }
            EtcdErrorKind::TaskEnded => return write!(f, "{operation}: {kind}: {cause}"),
            _ => {}
        }
        match endpoint {
            Some(endpoint) => write!(f, "{operation} at etcd {endpoint} failed: {kind}: {cause}"),
            None => write!(f, "{operation} failed: {kind}: {cause}"),
        }
    }
}

impl std::error::Error for EtcdError {}

/// Two values are equal if they are clones of the same error.
impl PartialEq for EtcdError {
    fn eq(&self, other: &Self) -> bool {
        self.is(other)
    }
}

impl Eq for EtcdError {}

/// The kind of an [`EtcdError`]. The kind of an error from etcd is derived from its text. The gRPC code counts only if the text is unknown,
/// because different errors have the same code: four of these kinds have `OutOfRange`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EtcdErrorKind {
    /// The member could not be reached, or the connection broke. An unknown failure is of this kind as well, so that it is retried.
    Unavailable,
    /// The member did not respond within the deadline.
    DeadlineExceeded,
    /// The member has no leader: it is cut off from its cluster, or an election is not over yet.
    NoLeader,
    /// The response is from another cluster than earlier responses: the endpoints belong to two clusters, or the cluster was replaced.
    OtherCluster,
    /// The response is from an old raft term: the member was frozen or cut off, or it lags.
    StaleTerm,
    /// The database of the store is full. The request is retried, because a compaction may free space at any time.
    NoSpace,
    /// The requested revision is compacted.
    Compacted,
    /// The store has not reached the requested revision, because the store was wiped or restored.
    FutureRevision,
    /// The response is larger than the limit for one message.
    ResponseTooLarge,
    /// The request is larger than etcd accepts (1.5 MiB by default).
    RequestTooLarge,
    /// The lease has expired or was revoked.
    LeaseNotFound,
    /// A lease with this id exists already.
    LeaseExists,
    /// The TTL is above etcd's maximum.
    LeaseTtlTooLarge,
    /// The user may not read or write this key. Older etcd servers return this error for an expired token as well.
    PermissionDenied,
    /// The token has expired, or the users of the store have changed since the token was issued.
    InvalidToken,
    /// The user name or the password is wrong.
    BadCredentials,
    /// etcd requires a user, and none is configured.
    CredentialsRequired,
    /// Credentials are configured, but authentication is disabled in etcd.
    AuthNotEnabled,
    /// The peer supports gRPC, but it is not an etcd, or it does not support the operation.
    Unimplemented,
    /// The request is not valid: a service name or a prefix is malformed. Nothing was sent.
    InvalidRequest,
    /// The task that communicates with etcd has ended with its runtime, or has panicked. It is not restarted.
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
                | Self::OtherCluster
                | Self::NoSpace
        )
    }

    /// Returns whether a new token may resolve the error.
    pub(crate) fn is_refusal(self) -> bool {
        matches!(
            self,
            Self::InvalidToken | Self::PermissionDenied | Self::CredentialsRequired
        )
    }

    /// Returns whether only an operator can resolve the error. At the start of a registration, such an error is final. Once the server is
    /// registered, the request is retried after long waits.
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
            Self::OtherCluster => "the response is from another cluster",
            Self::StaleTerm => "the response is from an old raft term",
            Self::NoSpace => "the database space is exceeded",
            Self::Compacted => "the revision is compacted",
            Self::FutureRevision => "the store has not reached the revision",
            Self::ResponseTooLarge => "the answer is too large",
            Self::RequestTooLarge => "the request is too large",
            Self::LeaseNotFound => "the lease does not exist",
            Self::LeaseExists => "the lease exists already",
            Self::LeaseTtlTooLarge => "the lease TTL is too large",
            Self::PermissionDenied => "permission denied",
            Self::InvalidToken => "the token is no longer valid",
            Self::BadCredentials => "user name or password is wrong",
            Self::CredentialsRequired => "a user name and password are required",
            Self::AuthNotEnabled => "authentication is not enabled",
            Self::Unimplemented => "the server is not an etcd, or does not support the operation",
            Self::InvalidRequest => "the request is not valid",
            Self::TaskEnded => "the task that sends requests to etcd has ended",
        })
    }
}

/// The reason why a registry, or a channel for a target, could not be created.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The target of a channel is ambiguous, or has neither the form `etcd://host:port[,host:port…]/service` nor a form of grpc-go or
    /// go-zero.
    #[error("target {target:?} is not valid: {reason}; write etcd://host:port/service")]
    #[non_exhaustive]
    InvalidTarget {
        /// The configured target.
        target: String,
        /// The reason why the target is not valid.
        reason: String,
    },
    /// etcd was reached, but the channel could not be connected.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// No endpoint is configured.
    #[error("no etcd endpoint given; pass at least one, such as 127.0.0.1:2379")]
    NoEndpoints,
    /// An endpoint is not of the form `[http[s]://]host:port`.
    #[error(
        "etcd endpoint {endpoint:?} is not valid: {reason}; write host:port, http://host:port or https://host:port"
    )]
    #[non_exhaustive]
    InvalidEndpoint {
        /// The configured endpoint.
        endpoint: String,
        /// The reason why the endpoint is not valid.
        reason: String,
    },
    /// The TLS configuration can never work. Nothing was sent.
    #[error("the TLS configuration for etcd is not valid: {reason}")]
    #[non_exhaustive]
    InvalidTls {
        /// The invalid part, and the reason.
        reason: String,
    },
    /// No member gave a usable response: the connections failed, or no response arrived within the deadline.
    #[error(
        "etcd did not respond at {}; check that etcd runs there, and that its client port (2379 by default) is correct and open: {cause}", endpoints.join(", ")
    )]
    #[non_exhaustive]
    Unreachable {
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// The last failure.
        cause: EtcdError,
    },
    /// Only the client or only the server uses TLS, or the TLS handshake failed, for example because a certificate is not trusted.
    #[error("no secure connection to etcd at {}: {reason}: {cause}", endpoints.join(", "))]
    #[non_exhaustive]
    Tls {
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// The observed cause, and how to fix the configuration.
        reason: String,
        /// The last failure.
        cause: EtcdError,
    },
    /// A server responded, but it is not an etcd.
    #[error(
        "the server at {} is not an etcd ({reason}); check the host and the port (etcd's client port is 2379 by default): {cause}", endpoints.join(", ")
    )]
    #[non_exhaustive]
    NotEtcd {
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// The observed behaviour of the server.
        reason: String,
        /// The last failure.
        cause: EtcdError,
    },
    /// etcd rejected the user, or requires a user and none is configured.
    #[error(
        "etcd at {} refused {user}; check the name and the password that are passed to `.user(name, password)`: {cause}", endpoints.join(", ")
    )]
    #[non_exhaustive]
    Credentials {
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// A description of the user, never with the password.
        user: String,
        /// The error from etcd.
        cause: EtcdError,
    },
    /// etcd rejected the read by which `connect` checks the connection, with an error that no other variant covers, for example because the
    /// member has no leader.
    #[error("etcd at {} rejected the read that checks the connection: {cause}", endpoints.join(", "))]
    #[non_exhaustive]
    Refused {
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// The error from etcd.
        cause: EtcdError,
    },
}

/// The reason why a server could not be registered, or why its registration could not be changed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// A service name, id, weight, TTL or other value is not valid. Nothing was sent to etcd.
    #[error("registration of {service:?} is not valid: {reason}")]
    #[non_exhaustive]
    Invalid {
        /// The service, or the exact key.
        service: String,
        /// The invalid value, and the reason why it is not valid.
        reason: String,
    },
    /// The advertised address is not valid. Nothing was sent to etcd.
    #[error(
        "registration of {service:?} has no address that clients can dial; set one with `.address(\"host:port\")`: {cause}"
    )]
    #[non_exhaustive]
    Address {
        /// The service, or the exact key.
        service: String,
        /// The reason why the address is not valid.
        cause: AddressError,
    },
    /// etcd rejected the registration with an error that only an operator can resolve, such as wrong credentials, a missing permission, or
    /// a request that is too large.
    #[error("etcd refused to register {key:?}: {cause}")]
    #[non_exhaustive]
    Refused {
        /// The key.
        key: String,
        /// The error from etcd.
        cause: EtcdError,
    },
    /// etcd did not confirm the registration, or a change of it, within the timeout. A registration that is still active continues to
    /// retry.
    #[error(
        "etcd at {} did not confirm the change of {key:?} within {} s{}", endpoints.join(", "),
        bound.as_secs_f64(),
        last_failure(cause.as_ref())
    )]
    #[non_exhaustive]
    TimedOut {
        /// The key.
        key: String,
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// The timeout that expired.
        bound: Duration,
        /// The last failure, if a request failed.
        cause: Option<EtcdError>,
    },
    /// Another server has registered the key.
    #[error("{key:?} is registered by another server ({})", under(*lease))]
    #[non_exhaustive]
    Superseded {
        /// The key.
        key: String,
        /// The lease of the other server; `None` if its key has no lease.
        lease: Option<LeaseId>,
    },
    /// The operating system could not start the dedicated thread of the registration. Nothing was sent to etcd.
    #[error("no thread could be started for the registration of {key:?}: {cause}")]
    #[non_exhaustive]
    Thread {
        /// The key.
        key: String,
        /// The error from the operating system.
        cause: Arc<io::Error>,
    },
    /// The registration has ended.
    #[error("the registration{} has ended", of(key.as_deref()))]
    #[non_exhaustive]
    Ended {
        /// The key; `None` if the server ended before it was registered.
        key: Option<String>,
    },
}

/// The reason why a registered server ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The listening socket could not be bound. Nothing was registered.
    #[error("could not listen on {address}: {cause}")]
    #[non_exhaustive]
    Bind {
        /// The address to bind.
        address: SocketAddr,
        /// The error from the operating system.
        cause: io::Error,
    },
    /// The server could not be registered, so it was stopped.
    #[error("the server was stopped because it could not be registered: {0}")]
    Register(RegisterError),
    /// The server failed, and was deregistered.
    #[error("the server failed: {}", causes(.0))]
    Serve(tonic::transport::Error),
    /// The signal handlers could not be installed. Nothing was registered.
    #[error("could not listen for SIGTERM and SIGINT: {0}")]
    Signal(io::Error),
}

impl From<RegisterError> for ServeError {
    fn from(error: RegisterError) -> Self {
        Self::Register(error)
    }
}

impl From<tonic::transport::Error> for ServeError {
    fn from(error: tonic::transport::Error) -> Self {
        Self::Serve(error)
    }
}

fn under(lease: Option<LeaseId>) -> String {
    lease.map_or_else(
        || "without a lease".to_owned(),
        |lease| format!("under lease {lease}"),
    )
}

fn of(key: Option<&str>) -> String {
    key.map_or_else(String::new, |key| format!(" of {key:?}"))
}

/// Formats the last failure before a timeout, if a request failed.
fn last_failure(cause: Option<&EtcdError>) -> String {
    cause.map_or_else(String::new, |cause| format!(": {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_line_contains_every_cause_once() {
        let mut status = tonic::Status::unavailable("greeter: no route");
        status.set_source(Arc::new(io::Error::other("no route")));
        let error = EtcdError::new(EtcdErrorKind::Unavailable, "list", "10.0.0.1:2379", status);
        let line = "list at etcd 10.0.0.1:2379 failed: the member is unavailable: Unavailable: greeter: no route";
        assert_eq!(error.to_string(), line);
        assert_eq!(causes(&error), line);
        assert!(std::error::Error::source(&error).is_none());
        let status = error.status().expect("the gRPC status");
        assert_eq!(status.message(), "greeter: no route");
        let refused = RegistryError::Refused {
            endpoints: vec!["10.0.0.1:2379".to_owned()],
            cause: error,
        };
        assert!(refused.to_string().ends_with(line), "{refused}");
        assert!(std::error::Error::source(&refused).is_none());
    }
}
