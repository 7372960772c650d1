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

/// A running etcd: one member, or a cluster of them. Dropped, it is killed and its data removed.
///
/// Members are named by their index, from 0. An operation on a member takes `&mut self`, so that
/// two of them never meet; the addresses are owned strings that stay valid across restarts.
///
/// Operations that are dropped midway are safe to repeat: the signal may already have been sent.
#[derive(Debug)]
pub struct Etcd {
    /// Declared before the directory, so that they are gone when it is removed.
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
    /// As for [`EtcdBuilder::start`].
    pub async fn start() -> Result<Self, ProcessError> {
        Self::builder().start().await
    }

    /// Starts a cluster and waits until all of its members are healthy.
    ///
    /// # Errors
    ///
    /// As for [`EtcdBuilder::start`].
    pub async fn start_cluster(members: usize) -> Result<Self, ProcessError> {
        Self::builder().members(members).start().await
    }

    /// The addresses for clients, as `127.0.0.1:port`, in the order of the members.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(Member::endpoint).collect()
    }

    /// The address for clients of one member; empty if there is no such member.
    #[must_use]
    pub fn endpoint(&self, member: usize) -> String {
        let member = self.members.get(member);
        member.map(Member::endpoint).unwrap_or_default()
    }

    /// The addresses for clients that speak TLS, as `127.0.0.1:port`. Nobody listens there without
    /// [`EtcdBuilder::tls`].
    #[must_use]
    pub fn tls_endpoints(&self) -> Vec<String> {
        self.members.iter().map(Member::tls_endpoint).collect()
    }

    /// The number of members, running or not.
    #[must_use]
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// The version of the binary, such as `3.4.23`.
    #[must_use]
    pub fn version(&self) -> String {
        self.version.clone()
    }

    /// The process id of a member, unless it is stopped.
    #[must_use]
    pub fn pid(&self, member: usize) -> Option<u32> {
        let process = self.members.get(member)?.process.as_ref()?;
        Some(process.id())
    }

    /// What a member has logged so far, over all of its starts; empty if there is no such member.
    #[must_use]
    pub fn log(&self, member: usize) -> String {
        let member = self.members.get(member);
        member.map(Member::log).unwrap_or_default()
    }

    /// The member that leads, if one does.
    ///
    /// Every running member is asked, and frozen ones do not answer. Of two that claim to lead, such
    /// as after a leader was thawed, the one in the later raft term is right. Newer servers that
    /// have authentication turned on refuse to tell.
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

    /// Stops a member in order (SIGTERM), and kills it if that takes more than 10 s. A frozen member
    /// is thawed for it. Nothing happens if it is already stopped.
    ///
    /// # Errors
    ///
    /// Fails if there is no such member, or if it cannot be ended.
    pub async fn stop(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.stop().await
    }

    /// Kills a member (SIGKILL), frozen or not, and waits for its end. Nothing happens if it is
    /// already stopped.
    ///
    /// # Errors
    ///
    /// Fails if there is no such member, or if it cannot be ended.
    pub async fn kill(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.kill().await
    }

    /// Freezes a member (SIGSTOP): its connections stay open, and new ones are still accepted by the
    /// system, but nothing is answered.
    ///
    /// # Errors
    ///
    /// Fails if there is no such member, or if it does not run.
    pub async fn freeze(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.set_frozen(true).await
    }

    /// Lets a frozen member go on (SIGCONT). Nothing happens if it was not frozen.
    ///
    /// # Errors
    ///
    /// Fails if there is no such member, or if it does not run.
    pub async fn thaw(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.set_frozen(false).await
    }

    /// Cuts a running member off from the others, in both directions; clients still reach it.
    ///
    /// # Errors
    ///
    /// Fails if there is no such member, if the cluster was not started as
    /// [partitionable](EtcdBuilder::partitionable), or if the member does not answer for its id.
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

    /// Lets a member that was [isolated](Self::isolate) reach the others again. Nothing happens if it
    /// was not.
    ///
    /// # Errors
    ///
    /// Fails if there is no such member.
    pub fn rejoin(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?;
        if let Some(peers) = &self.peers {
            peers.rejoin(member);
        }
        Ok(())
    }

    /// Starts a member again, on the same ports and with the data it has, and waits until it is
    /// healthy. If it runs, it is stopped first.
    ///
    /// A member is healthy only while most of the cluster runs: to start several, use
    /// [`Etcd::restart_all`].
    ///
    /// # Errors
    ///
    /// Fails if there is no such member, or if it cannot be stopped or started, exits early, or is
    /// not healthy within the bound of [`EtcdBuilder::start_timeout`]; in this last case it is left
    /// running.
    pub async fn restart(&mut self, member: usize) -> Result<(), ProcessError> {
        let found = self.member(member)?;
        found.stop().await?;
        found.start()?;
        self.await_health(vec![member]).await
    }

    /// Deletes the data of a stopped member; started again, it is empty and has the same flags.
    ///
    /// For a single member or, with [`Etcd::wipe_all`], for all of them this is the loss of all
    /// data. A lone wiped member of a cluster that still knows it refuses to start again, as etcd
    /// does: it would have to be removed from the cluster and added anew.
    ///
    /// # Errors
    ///
    /// Fails if there is no such member, if it runs, or if its data cannot be deleted.
    pub async fn wipe(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.wipe().await
    }

    /// Copies the data of a stopped member, in place of an earlier copy, for [`Etcd::restore`].
    ///
    /// # Errors
    ///
    /// Fails if there is no such member, if it runs, or if its data cannot be copied.
    pub async fn back_up(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.back_up().await
    }

    /// Puts the data of a stopped member back to what it was at its last [`Etcd::back_up`], as an
    /// operator does after a loss: what was written since is gone, leases that have ended since
    /// live again for a whole TTL, and raft terms go on from where they were.
    ///
    /// # Errors
    ///
    /// Fails if there is no such member, if it runs, if it was never backed up, or if its data
    /// cannot be replaced.
    pub async fn restore(&mut self, member: usize) -> Result<(), ProcessError> {
        self.member(member)?.restore().await
    }

    /// Stops every member in order, see [`Etcd::stop`].
    ///
    /// # Errors
    ///
    /// Fails if a member cannot be ended.
    pub async fn stop_all(&mut self) -> Result<(), ProcessError> {
        // The leader comes last. An etcd that ends hands its leadership over first, and when the
        // heir is ending as well, that takes 7 s instead of a few milliseconds.
        let leader = self.leader().await;
        let mut order: Vec<_> = self.members.iter_mut().collect();
        order.sort_by_key(|member| Some(member.index) == leader);
        for member in order {
            member.stop().await?;
        }
        Ok(())
    }

    /// Kills every member at once, see [`Etcd::kill`].
    ///
    /// # Errors
    ///
    /// Fails if a member cannot be ended.
    pub async fn kill_all(&mut self) -> Result<(), ProcessError> {
        self.signal_kill();
        for member in &mut self.members {
            member.kill().await?;
        }
        Ok(())
    }

    /// Starts every member again, all before any of them is waited for, see [`Etcd::restart`].
    ///
    /// # Errors
    ///
    /// Fails if a member cannot be stopped or started, exits early, or is not healthy in time.
    pub async fn restart_all(&mut self) -> Result<(), ProcessError> {
        self.stop_all().await?;
        self.start_all().await
    }

    /// Deletes the data of every member, see [`Etcd::wipe`].
    ///
    /// # Errors
    ///
    /// Fails if a member runs, and then deletes nothing, or if some data cannot be deleted.
    pub async fn wipe_all(&mut self) -> Result<(), ProcessError> {
        for member in &mut self.members {
            member.check_stopped()?;
        }
        for member in &mut self.members {
            member.wipe().await?;
        }
        Ok(())
    }

    /// The member with this index.
    pub(super) fn member(&mut self, member: usize) -> Result<&mut Member, ProcessError> {
        let members = self.members.len();
        let found = self.members.get_mut(member);
        found.ok_or(ProcessError::NoSuchMember { member, members })
    }

    /// Sends SIGKILL to every process, so that they die side by side. Whether it worked is seen when
    /// each is waited for.
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
