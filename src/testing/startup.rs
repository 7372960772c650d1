//! The start of the members, and the wait until they are healthy.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{Etcd, ProcessError, member::Member, probe};

/// Time between two health checks of a starting member.
const HEALTH_INTERVAL: Duration = Duration::from_millis(20);

impl Etcd {
    /// Starts every member and waits until all are healthy. All members must be stopped.
    pub(super) async fn start_all(&mut self) -> Result<(), ProcessError> {
        for member in &mut self.members {
            member.start()?;
        }
        self.await_health((0..self.members.len()).collect()).await
    }

    /// Waits until the members with these indexes are healthy, at most for the start timeout.
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

    /// Polls the health of the pending members, the last one first, until none is pending.
    async fn poll_health(&mut self, pending: &mut Vec<usize>) -> Result<(), ProcessError> {
        let started = pending.clone();
        while let Some(&member) = pending.last() {
            // A member that has exited may be the reason why another member is not healthy.
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
