//! What a server's owner sees of its registration.

use tokio::time::Instant;

use super::lease::{Machine, Phase};
use crate::error::EtcdError;
use crate::keyspace::LeaseId;

/// Where a registration stands.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RegistrationState {
    /// The key is not known to be in etcd, and everything is done to put it there: at the start, after a loss, and while etcd has not
    /// answered for longer than the lease lives.
    #[non_exhaustive]
    Registering {
        /// The last failure, if there was one.
        last_error: Option<EtcdError>,
    },
    /// The key is in etcd under our lease. Each renewal of the lease is a change of this state.
    #[non_exhaustive]
    Registered {
        /// The lease the key hangs on.
        lease: LeaseId,
        /// When the lease runs out if no further renewal gets through.
        expires: Instant,
        /// The last failed exchange, if no good one has followed it yet.
        last_error: Option<EtcdError>,
    },
    /// Another server has taken the key. It is left alone, and claimed again when it disappears.
    #[non_exhaustive]
    Superseded {
        /// The lease that the key hangs on now; 0 if on none.
        lease: LeaseId,
    },
    /// The key is being taken away, for a pause or for good.
    #[non_exhaustive]
    Leaving {
        /// The last failure, if there was one.
        last_error: Option<EtcdError>,
    },
    /// The key was taken away until it is resumed.
    Paused,
    /// The registration has ended.
    Deregistered,
    /// The registration's task has ended with its runtime, or has panicked. The key stays until its lease expires.
    Aborted,
}

impl RegistrationState {
    /// Whether clients can find the server.
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
            Phase::Superseded(lease) => Self::Superseded { lease },
            Phase::Leaving => Self::Leaving { last_error },
            Phase::Paused => Self::Paused,
            Phase::Deregistered => Self::Deregistered,
        }
    }
}
