//! The state of a registration as reported to its owner.

use std::fmt;

use tokio::time::Instant;

use super::lease::{Machine, Phase};
use crate::error::EtcdError;
use crate::keyspace::LeaseId;

/// The state of a registration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistrationState {
    /// The key is not known to be in etcd, and the registration tries to write it. This is the state at the start, after the loss of the
    /// key, and while etcd has not responded for longer than the TTL of the lease.
    #[non_exhaustive]
    Registering {
        /// The last failure, if any.
        last_error: Option<EtcdError>,
    },
    /// The key is in etcd under the registration's lease. Each renewal of the lease changes this state. A value of this server that was
    /// written by hand, without a lease, counts as well: it is overwritten under the lease at once.
    #[non_exhaustive]
    Registered {
        /// The lease that the key is attached to.
        lease: LeaseId,
        /// The time at which the lease expires if no further renewal succeeds.
        expires: Instant,
        /// The last failure, if no request has succeeded since.
        last_error: Option<EtcdError>,
    },
    /// Another server has written the key. The registration does not overwrite the other server's entry, and registers the server again
    /// once that entry is deleted.
    #[non_exhaustive]
    Superseded {
        /// The lease that the key is now attached to; `None` for a key without a lease.
        lease: Option<LeaseId>,
    },
    /// The key is being removed, because the registration is paused or ends.
    #[non_exhaustive]
    Leaving {
        /// The last failure, if any.
        last_error: Option<EtcdError>,
    },
    /// The registration is paused: the key stays removed until the registration is resumed.
    Paused,
    /// The registration has ended.
    Deregistered,
    /// The task of the registration has ended together with its runtime, or has panicked. The key remains until its lease expires.
    Aborted,
}

/// One line for people, for example `registered under lease 694d9a3f, which expires in 14s`.
impl fmt::Display for RegistrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last_error = match self {
            Self::Registering { last_error } => {
                f.write_str("registering")?;
                last_error
            }
            Self::Registered {
                lease,
                expires,
                last_error,
            } => {
                let left = expires.saturating_duration_since(Instant::now());
                let left = left.as_secs_f64().round();
                write!(
                    f,
                    "registered under lease {lease}, which expires in {left}s"
                )?;
                last_error
            }
            Self::Superseded { lease: Some(lease) } => {
                return write!(f, "superseded by a server with lease {lease}");
            }
            Self::Superseded { lease: None } => {
                return f.write_str("superseded by a key without a lease");
            }
            Self::Leaving { last_error } => {
                f.write_str("leaving")?;
                last_error
            }
            Self::Paused => return f.write_str("paused"),
            Self::Deregistered => return f.write_str("deregistered"),
            Self::Aborted => return f.write_str("aborted"),
        };
        match last_error {
            Some(error) => write!(f, ", last error: {error}"),
            None => Ok(()),
        }
    }
}

impl RegistrationState {
    /// Returns whether clients can find the server.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        matches!(self, Self::Registered { .. })
    }

    pub(super) fn of(machine: &Machine, now: Instant) -> Self {
        let last_error = machine.last_error.clone();
        match machine.phase(now) {
            Phase::Registering => Self::Registering { last_error },
            Phase::Registered { lease, expires } => Self::Registered {
                lease,
                expires,
                last_error,
            },
            Phase::Superseded(lease) => Self::Superseded {
                lease: lease.known(),
            },
            Phase::Leaving => Self::Leaving { last_error },
            Phase::Paused => Self::Paused,
            Phase::Deregistered => Self::Deregistered,
        }
    }
}
