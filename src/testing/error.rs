//! Why an etcd could not be started or operated.

use std::{io, path::PathBuf, process::ExitStatus, time::Duration};

/// Why an [`Etcd`](super::Etcd) could not be started, or an operation on one of its members failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// There is no etcd binary: none was given, `ETCD_BIN` is not set, and `PATH` has none.
    #[error(
        "no etcd binary found: set ETCD_BIN, or install etcd \
         (Debian and Ubuntu: `etcd-server`; macOS: `brew install etcd`)"
    )]
    NoBinary,
    /// A program could not be run: etcd, or the `sh` that watches over it.
    #[error("could not run {}", .program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The temporary directory, the log files or the ports could not be had, or not be cleared.
    #[error("could not prepare the files or the ports of etcd")]
    Prepare(#[source] io::Error),
    /// A member exited by itself while it was expected to become healthy.
    #[error("etcd member {member} exited early ({status}), its log ends:\n{log}")]
    ExitedEarly {
        /// The index of the member.
        member: usize,
        /// How it exited.
        status: ExitStatus,
        /// The last lines of its log.
        log: String,
    },
    /// A member did not report itself as healthy in time. It is left running.
    #[error("etcd member {member} was not healthy within {waited:?}, its log ends:\n{log}")]
    NotHealthy {
        /// The index of the member.
        member: usize,
        /// How long it was waited for.
        waited: Duration,
        /// The last lines of its log.
        log: String,
    },
    /// A member could not be signalled or waited for.
    #[error("could not signal etcd member {member}")]
    Signal {
        /// The index of the member.
        member: usize,
        /// What the system answered.
        source: io::Error,
    },
    /// The operation needs a member that runs.
    #[error("etcd member {member} is not running")]
    NotRunning {
        /// The index of the member.
        member: usize,
    },
    /// The operation needs a member that is stopped, or the member did not die when killed.
    #[error("etcd member {member} is still running")]
    StillRunning {
        /// The index of the member.
        member: usize,
    },
    /// The member cannot be cut off: the cluster was not started with
    /// [`EtcdBuilder::partitionable`](super::EtcdBuilder::partitionable), or the member does not tell its id.
    #[error(
        "etcd member {member} cannot be isolated: start the cluster with `partitionable()`, and the member before it is isolated"
    )]
    NotPartitionable {
        /// The index of the member.
        member: usize,
    },
    /// There is no member with this index.
    #[error("no etcd member {member}: there are {members}, counted from 0")]
    NoSuchMember {
        /// The index that was asked for.
        member: usize,
        /// The number of members.
        members: usize,
    },
}
