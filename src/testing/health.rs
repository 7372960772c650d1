//! Starting the members, and waiting until they are healthy.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{Etcd, ProcessError, member::Member, probe};

/// How often a member that is starting is asked for its health.
const HEALTH_INTERVAL: Duration = Duration::from_millis(20);

impl Etcd {
    /// Starts every member, all of which are stopped, and waits until all are healthy.
    pub(super) async fn start_all(&mut self) -> Result<(), ProcessError> {
        for member in &mut self.members {
            member.start()?;
        }
        self.await_health((0..self.members.len()).collect()).await
    }

    /// Waits, within the bound, until the members with these indexes are healthy.
    pub(super) async fn await_health(
        &mut self,
        mut pending: Vec<usize>,
    ) -> Result<(), ProcessError> {
        let waited = self.start_timeout;
        let health = timeout(waited, self.poll_health(&mut pending)).await;
        health.unwrap_or_else(|_elapsed| {
            let member = pending.last().copied().unwrap_or_default();
            let log = self.members.get(member).map(Member::log_tail);
            Err(ProcessError::NotHealthy {
                member,
                waited,
                log: log.unwrap_or_default(),
            })
        })
    }

    /// Asks the pending members for their health, the last one first, until none is pending.
    async fn poll_health(&mut self, pending: &mut Vec<usize>) -> Result<(), ProcessError> {
        let started = pending.clone();
        while let Some(&member) = pending.last() {
            // One that has exited may be the very reason why another one is not healthy.
            for &member in &started {
                self.member(member)?.check_running()?;
            }
            if probe::is_healthy(self.member(member)?.client_port()).await {
                pending.pop();
            } else {
                sleep(HEALTH_INTERVAL).await;
            }
        }
        Ok(())
    }
}
