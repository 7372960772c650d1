//! Compares the cluster ids in the responses, so that one client uses one cluster.
//!
//! An endpoint of another cluster is a mistake in the configuration, or a DNS name that resolves to members of two clusters. A lease of one
//! cluster does not exist in the other, and the keys differ, so a client that used both would have to register and to list again each time
//! it changed to the other cluster. A response from another cluster counts as a failure of its member. If only the other cluster has
//! answered for 10 s, the client assumes that the first cluster was replaced, and uses the other one.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::Header;

/// The id of the cluster that a client uses.
#[derive(Debug, Default)]
pub(super) struct ClusterId(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The id of the cluster in use; 0 until a response has an id.
    id: u64,
    /// The responses from another cluster since the last response from the cluster in use.
    others: Option<Others>,
}

#[derive(Clone, Copy, Debug)]
struct Others {
    first: Instant,
    last: Instant,
    count: u32,
}

impl ClusterId {
    /// Returns an error if the response is from another cluster than the one in use. If the other cluster now counts as the replacement,
    /// uses it from now on, and returns no error. Stores without cluster ids are accepted.
    pub(super) fn check(
        &self,
        header: Header,
        operation: &'static str,
        endpoint: &str,
    ) -> Result<(), EtcdError> {
        let (id, now) = (header.cluster_id, Instant::now());
        // No code panics while it holds this lock.
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if id == 0 || state.id == id || state.id == 0 {
            if id != 0 {
                *state = State { id, others: None };
            }
            return Ok(());
        }
        // Only responses less than `PAUSE` apart are counted together: during a longer pause, the client may have been idle, so the pause
        // does not show that the first cluster is silent.
        let recent = state
            .others
            .filter(|others| now.saturating_duration_since(others.last) < PAUSE);
        let others = Others {
            first: recent.map_or(now, |others| others.first),
            last: now,
            count: recent.map_or(0, |others| others.count) + 1,
        };
        state.others = Some(others);
        let expected = state.id;
        let is_replaced = others.count >= REPLACED_RESPONSES
            && now.saturating_duration_since(others.first) >= REPLACED_AFTER;
        if !is_replaced {
            let kind = EtcdErrorKind::OtherCluster;
            let reason = format!("cluster {id:x} in place of {expected:x}; check the endpoints");
            return Err(EtcdError::new(kind, operation, endpoint, reason));
        }
        *state = State { id, others: None };
        drop(state);
        tracing::warn!(
            endpoint,
            "cluster {expected:x} was replaced by cluster {id:x}: using the new one"
        );
        Ok(())
    }
}

/// The time without a response from the first cluster after which another cluster counts as its replacement. It is shorter than the default
/// TTL (15 s), so that servers are registered in the new cluster within about a TTL. It is longer than the election of a leader, because a
/// cluster does not answer during an election.
const REPLACED_AFTER: Duration = Duration::from_secs(10);
/// Minimum number of responses from the other cluster before it counts as the replacement.
const REPLACED_RESPONSES: u32 = 3;
/// If two responses from the other cluster are further apart than this, the count starts again.
const PAUSE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cluster: &ClusterId, id: u64) -> Result<(), EtcdErrorKind> {
        let header = Header {
            cluster_id: id,
            ..Header::default()
        };
        let checked = cluster.check(header, "read", "10.0.0.1:2379");
        checked.map_err(|error| error.kind())
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_cluster_is_rejected_while_the_first_answers() {
        let cluster = ClusterId::default();
        check(&cluster, 0).expect("a store without ids must be accepted");
        check(&cluster, 7).expect("the first cluster must be accepted");
        for _ in 0..20 {
            tokio::time::advance(Duration::from_secs(3)).await;
            assert_eq!(check(&cluster, 8), Err(EtcdErrorKind::OtherCluster));
            tokio::time::advance(Duration::from_secs(1)).await;
            check(&cluster, 7).expect("the first cluster must be accepted");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cluster_that_replaces_the_first_is_used_after_ten_seconds() {
        let cluster = ClusterId::default();
        check(&cluster, 7).expect("the first cluster must be accepted");
        for _ in 0..3 {
            check(&cluster, 8).expect_err("another cluster must be rejected");
            tokio::time::advance(Duration::from_secs(4)).await;
        }
        check(&cluster, 8).expect("the new cluster must be accepted");
        check(&cluster, 7).expect_err("the old cluster must be rejected");
    }

    /// An idle client sends no requests, so it cannot know whether the first cluster would answer.
    #[tokio::test(start_paused = true)]
    async fn rare_responses_of_another_cluster_do_not_replace_the_first() {
        let cluster = ClusterId::default();
        check(&cluster, 7).expect("the first cluster must be accepted");
        for _ in 0..10 {
            check(&cluster, 8).expect_err("another cluster must be rejected");
            tokio::time::advance(Duration::from_secs(60)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_without_an_id_shows_nothing_about_the_cluster() {
        let cluster = ClusterId::default();
        check(&cluster, 7).expect("the first");
        check(&cluster, 0).expect("a response without an id");
        check(&cluster, 8).expect_err("another");
    }

    #[tokio::test(start_paused = true)]
    async fn responses_less_than_ten_seconds_apart_count_together() {
        for (seconds, replaced) in [(9, true), (10, false)] {
            let cluster = ClusterId::default();
            check(&cluster, 7).expect("the first");
            for _ in 0..2 {
                check(&cluster, 8).expect_err("another");
                tokio::time::advance(Duration::from_secs(seconds)).await;
            }
            assert_eq!(check(&cluster, 8).is_ok(), replaced, "{seconds}");
        }
    }
}
