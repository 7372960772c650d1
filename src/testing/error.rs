//! The error type for the start of an etcd and for operations on its members.

use std::{io, path::PathBuf, process::ExitStatus, time::Duration};

/// An [`Etcd`](super::Etcd) could not be started, or an operation on one of its members failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// No etcd binary was found: no path was given, `ETCD_BIN` is not set, and no folder of `PATH`
    /// contains an `etcd`.
    #[error(
        "no etcd binary found: set ETCD_BIN, or install etcd \
         (Debian and Ubuntu: `etcd-server`; macOS: `brew install etcd`)"
    )]
    NoBinary,
    /// A program could not be run: etcd, or the `sh` process that serves as its watchdog.
    #[error("could not run {}: {cause}", .program.display())]
    #[non_exhaustive]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The error of the operating system.
        cause: io::Error,
    },
    /// The temporary directory, the ports or the log files could not be allocated. Or the data of a
    /// member could not be copied or deleted, for example because no backup exists.
    #[error("could not prepare the files or the ports of etcd: {0}")]
    Prepare(io::Error),
    /// A member exited by itself while it was expected to become healthy.
    #[error("etcd member {member} exited early ({status}); its log ends with:\n{log}")]
    #[non_exhaustive]
    ExitedEarly {
        /// The index of the member.
        member: usize,
        /// The exit status of the member.
        status: ExitStatus,
        /// The last lines of its log.
        log: String,
    },
    /// A member did not become healthy in time. The member keeps running.
    #[error("etcd member {member} was not healthy within {waited:?}; its log ends with:\n{log}")]
    #[non_exhaustive]
    NotHealthy {
        /// The index of the member.
        member: usize,
        /// The timeout that elapsed.
        waited: Duration,
        /// The last lines of its log.
        log: String,
    },
    /// A signal could not be sent to a member or had no effect in time, or the exit status of a
    /// member could not be read.
    #[error("could not stop, freeze or resume etcd member {member}: {cause}")]
    #[non_exhaustive]
    Signal {
        /// The index of the member.
        member: usize,
        /// The error of the operating system.
        cause: io::Error,
    },
    /// The operation needs a running member.
    #[error("etcd member {member} is not running")]
    #[non_exhaustive]
    NotRunning {
        /// The index of the member.
        member: usize,
    },
    /// The operation needs a stopped member, but the member is running. Or a member did not exit
    /// after it was killed.
    #[error("etcd member {member} is still running")]
    #[non_exhaustive]
    StillRunning {
        /// The index of the member.
        member: usize,
    },
    /// The member cannot be isolated: the cluster was not started with
    /// [`EtcdBuilder::partitionable`](super::EtcdBuilder::partitionable), or the member does not
    /// answer the query for its id, for example because it is frozen or because authentication is
    /// enabled.
    #[error(
        "etcd member {member} cannot be isolated: the cluster was not started with `partitionable()`, or the member does not report its id"
    )]
    #[non_exhaustive]
    NotPartitionable {
        /// The index of the member.
        member: usize,
    },
    /// No member has this index.
    #[error(
        "there is no etcd member with index {member}: the cluster has {members} members, and indexes start at 0"
    )]
    #[non_exhaustive]
    NoSuchMember {
        /// The requested index.
        member: usize,
        /// The number of members.
        members: usize,
    },
}
