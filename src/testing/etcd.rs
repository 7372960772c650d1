//! A running etcd.

use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::task::JoinSet;

#[cfg(doc)]
use super::EtcdBuilder;
use super::error::ProcessError;
use super::member::Member;
use super::peers::Peers;
use super::probe;

/// A running etcd: a single member or a cluster. Dropping it kills the members and removes their
/// data.
///
/// Members are identified by their index, which starts at 0. Operations on members take `&mut
/// self`, so that two operations never overlap. The addresses are owned strings that stay valid
/// across restarts.
///
/// An operation whose future was dropped can safely be repeated. The signal of the dropped
/// operation may already have been sent.
#[derive(Debug)]
pub struct Etcd {
    /// Declared before the directory, so that the members are dropped before the directory is
    /// removed.
    pub(super) members: Vec<Member>,
    pub(super) version: String,
    pub(super) start_timeout: Duration,
    pub(super) peers: Option<Peers>,
    pub(super) _directory: TempDir,
}

impl Etcd {
    /// Starts a single member and waits until it is healthy.
    ///
    /// # Errors
    ///
    /// Fails for the same reasons as [`EtcdBuilder::start`].
    pub async fn start() -> Result<Self, ProcessError> {
        Self::builder().start().await
    }

    /// Starts a cluster and waits until all of its members are healthy.
    ///
    /// # Errors
    ///
    /// Fails for the same reasons as [`EtcdBuilder::start`].
    pub async fn start_cluster(members: usize) -> Result<Self, ProcessError> {
        Self::builder().members(members).start().await
    }

    /// Returns the client addresses, as `127.0.0.1:port`, in the order of the members.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(Member::endpoint).collect()
    }

    /// Returns the client address of one member; `None` if the member does not exist.
    #[must_use]
    pub fn endpoint(&self, member: usize) -> Option<String> {
        self.members.get(member).map(Member::endpoint)
    }

    /// Returns the addresses for TLS clients, as `127.0.0.1:port`. Members listen there only with
    /// [`EtcdBuilder::tls`].
    #[must_use]
    pub fn tls_endpoints(&self) -> Vec<String> {
        self.members.iter().map(Member::tls_endpoint).collect()
    }

    /// Returns the number of members, running or not.
    #[must_use]
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Returns the version of the binary, such as `3.4.23`.
    #[must_use]
    pub fn version(&self) -> String {
        self.version.clone()
    }

    /// Returns the process id of a member; `None` if the member is stopped or does not exist.
    #[must_use]
    pub fn pid(&self, member: usize) -> Option<u32> {
        let process = self.members.get(member)?.process.as_ref()?;
        Some(process.id())
    }

    /// Returns the log of a member, over all of its starts; `None` if the member does not exist.
    #[must_use]
    pub fn log(&self, member: usize) -> Option<String> {
        self.members.get(member).map(Member::log)
    }

    /// Returns the index of the leader, if the cluster has one.
    ///
    /// This function queries every running member; frozen members do not respond. Two members can
    /// claim to be the leader, for example after a leader was thawed. The one with the higher raft
    /// term is the leader. If authentication is enabled, newer versions of etcd reject the query,
    /// and the result is `None`.
    pub async fn leader(&self) -> Option<usize> {
        let mut asked = JoinSet::new();
        for member in &self.members {
            if member.process.is_none() {
                continue;
            }
            let (index, port) = (member.index, member.client_port());
            asked.spawn(async move { Some((probe::leading_term(port).await?, index)) });
        }
        let leader = asked.join_all().await.into_iter().flatten().max();
        leader.map(|(_term, index)| index)
    }

    /// Stops a member gracefully (SIGTERM), and kills it if it has not exited after 10 s. A frozen
    /// member is thawed, because it would not handle the signal. Has no effect if the member is
    /// already stopped.
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist, or if it cannot be stopped or killed.
    pub async fn stop(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.stop().await
    }

    /// Kills a member (SIGKILL), frozen or not, and waits until it has exited. Has no effect if the
    /// member is already stopped.
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist, or if it cannot be stopped or killed.
    pub async fn kill(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.kill().await
    }

    /// Freezes a member (SIGSTOP). Its connections stay open and the operating system still accepts
    /// new ones, but the member does not respond.
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist or is not running.
    pub async fn freeze(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.set_frozen(true).await
    }

    /// Resumes a frozen member (SIGCONT). Has no effect if the member was not frozen.
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist or is not running.
    pub async fn thaw(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.set_frozen(false).await
    }

    /// Isolates a running member from the other members, in both directions. Clients can still
    /// reach it.
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist, if the cluster was not started as
    /// [partitionable](EtcdBuilder::partitionable), or if the member does not return its id.
    pub async fn isolate(&mut self, member: usize) -> Result<(), ProcessError> {
        let port = self.member(member)?.client_port();
        let id = probe::member_id(port).await;
        match (&self.peers, id) {
            (Some(peers), Some(id)) => {
                peers.isolate(member, id);
                Ok(())
            }
            _ => Err(ProcessError::NotPartitionable { member }),
        }
    }

    /// Reconnects a member that was [isolated](Self::isolate) to the others. Has no effect if the
    /// member was not isolated.
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist.
    pub fn rejoin(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?;
        if let Some(peers) = &self.peers {
            peers.rejoin(member);
        }
        Ok(())
    }

    /// Restarts a member on the same ports and with its data, and waits until it is healthy. A
    /// running member is stopped first.
    ///
    /// A member is healthy only while a majority of the cluster runs. To start several members, use
    /// [`Etcd::restart_all`].
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist, cannot be stopped or started, exits early, or is not
    /// healthy within [`EtcdBuilder::start_timeout`]. In the last case, the member keeps running.
    pub async fn restart(&mut self, member: usize) -> Result<(), ProcessError> {
        let found = self.member(member)?;
        found.stop().await?;
        found.start()?;
        self.await_health(vec![member]).await
    }

    /// Deletes the data of a stopped member. After a restart, the member is empty and has the same
    /// flags.
    ///
    /// In a cluster of one member, or with [`Etcd::wipe_all`], this is the loss of all data. In a
    /// larger cluster, etcd refuses to start a single wiped member again, because the other members
    /// still have it in their configuration. The member must first be removed from the cluster and
    /// added again.
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist, if it is running, or if its data cannot be deleted.
    pub async fn wipe(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.wipe().await
    }

    /// Copies the data of a stopped member for [`Etcd::restore`], and replaces an earlier copy.
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist, if it is running, or if its data cannot be copied.
    pub async fn back_up(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.back_up().await
    }

    /// Restores the data of a stopped member from its last [`Etcd::back_up`], as an operator does
    /// after a loss. Later writes are lost. Leases that have ended since the backup exist again for
    /// a whole TTL, and raft terms continue from the restored state.
    ///
    /// # Errors
    ///
    /// Fails if the member does not exist, if it is running, if it was never backed up, or if its
    /// data cannot be replaced.
    pub async fn restore(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.restore().await
    }

    /// Stops every member gracefully; see [`Etcd::stop`].
    ///
    /// # Errors
    ///
    /// Fails if a member cannot be stopped or killed.
    pub async fn stop_all(&mut self) -> Result<(), ProcessError> {
        // The leader is stopped last. Before a leader exits, it transfers its leadership. If the
        // target of the transfer is exiting as well, this takes 7 s instead of a few milliseconds.
        let leader = self.leader().await;
        let mut order: Vec<_> = self.members.iter_mut().collect();
        order.sort_by_key(|member| Some(member.index) == leader);
        for member in order {
            member.stop().await?;
        }
        Ok(())
    }

    /// Kills every member at once; see [`Etcd::kill`].
    ///
    /// # Errors
    ///
    /// Fails if a member cannot be stopped or killed.
    pub async fn kill_all(&mut self) -> Result<(), ProcessError> {
        self.signal_kill();
        for member in &mut self.members {
            member.kill().await?;
        }
        Ok(())
    }

    /// Restarts every member; see [`Etcd::restart`]. All members are started before the wait for
    /// their health begins.
    ///
    /// # Errors
    ///
    /// Fails if a member cannot be stopped or started, exits early, or is not healthy in time.
    pub async fn restart_all(&mut self) -> Result<(), ProcessError> {
        self.stop_all().await?;
        self.start_all().await
    }

    /// Deletes the data of every member; see [`Etcd::wipe`].
    ///
    /// # Errors
    ///
    /// Fails if a member is running; nothing is deleted then. Also fails if some data cannot be
    /// deleted.
    pub async fn wipe_all(&mut self) -> Result<(), ProcessError> {
        for member in &mut self.members {
            member.check_stopped()?;
        }
        for member in &mut self.members {
            member.wipe().await?;
        }
        Ok(())
    }

    /// Returns the member with this index.
    pub(super) fn member(&mut self, member: usize) -> Result<&mut Member, ProcessError> {
        let members = self.members.len();
        let found = self.members.get_mut(member);
        found.ok_or(ProcessError::NoSuchMember { member, members })
    }

    /// Sends SIGKILL to every process, so that all of them exit in parallel. If a signal fails, the
    /// later wait for the process detects the failure.
    fn signal_kill(&self) {
        for member in &self.members {
            if let Some(process) = &member.process {
                process.signal(Signal::SIGKILL).ok();
            }
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.signal_kill();
    }
}
