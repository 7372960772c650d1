//! The subchannels that wait to be dialled, and the dials in progress.

use std::collections::{HashMap, VecDeque};

use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use super::subchannel_table::{DialId, SubchannelId};
use crate::transport::connect::DialError;
use crate::transport::connection_task::CloseReason;
use crate::transport::http2::Connection;

/// The queues of subchannels that wait to be dialled, and the tasks that dial.
#[derive(Debug, Default)]
pub(super) struct Dials {
    queue: VecDeque<SubchannelId>,
    /// A separate queue of the subchannels whose last attempt failed.
    failing: VecDeque<SubchannelId>,
    tasks: JoinSet<Result<Connection, DialError>>,
    in_progress: HashMap<Id, Dial>,
    /// Number of dials in progress for subchannels whose previous attempt failed.
    retries: usize,
    /// The close reasons of connections that ended before the outcome of their dial was handled.
    closed_early: HashMap<DialId, CloseReason>,
}

/// A dial in progress.
#[derive(Clone, Copy, Debug)]
struct Dial {
    subchannel: SubchannelId,
    id: DialId,
    /// Whether the previous attempt of the subchannel failed.
    is_retry: bool,
}

/// The result of a task that dials, with the id of the task.
pub(super) type Ended = Result<(Id, Result<Connection, DialError>), JoinError>;

/// The outcome of a dial.
#[derive(Debug)]
pub(super) struct Dialled {
    pub(super) subchannel: SubchannelId,
    pub(super) id: DialId,
    pub(super) outcome: Result<Connection, DialError>,
    /// Why the connection has ended, if it has already ended.
    pub(super) closed: Option<CloseReason>,
}

impl Dials {
    /// Queues a subchannel at a random position, so that the clients of a fleet dial the same servers in different orders.
    pub(super) fn enqueue(&mut self, id: SubchannelId, is_failing: bool, rng: &mut fastrand::Rng) {
        let queue = if is_failing {
            &mut self.failing
        } else {
            &mut self.queue
        };
        queue.push_back(id);
        let index = rng.usize(..queue.len());
        let last = queue.len() - 1;
        queue.swap(index, last);
    }

    /// Removes and returns the next subchannel to dial, unless the limit on concurrent dials is reached. Failing subchannels are dialled
    /// last, and use at most half of the limit. The reason: each dial to an endpoint that does not answer lasts until the timeout. With
    /// this rule, only the first dial to such an endpoint can delay the dials to other endpoints, because each later dial is known to be a
    /// retry.
    pub(super) fn next(&mut self) -> Option<SubchannelId> {
        if self.tasks.len() >= MAX_DIALS {
            return None;
        }
        if let Some(id) = self.queue.pop_front() {
            return Some(id);
        }
        if self.retries < MAX_DIALS / 2 {
            return self.failing.pop_front();
        }
        None
    }

    /// Starts a dial for a subchannel.
    pub(super) fn start(
        &mut self,
        subchannel: SubchannelId,
        id: DialId,
        is_retry: bool,
        dial: impl Future<Output = Result<Connection, DialError>> + Send + 'static,
    ) -> AbortHandle {
        let task = self.tasks.spawn(dial);
        self.retries += usize::from(is_retry);
        let dial = Dial {
            subchannel,
            id,
            is_retry,
        };
        self.in_progress.insert(task.id(), dial);
        task
    }

    /// Drops the record of a subchannel's dial, so that the outcome of the dial is ignored.
    pub(super) fn forget(&mut self, subchannel: SubchannelId) {
        let (retries, closed_early) = (&mut self.retries, &mut self.closed_early);
        self.in_progress.retain(|_, dial| {
            let stays = dial.subchannel != subchannel;
            *retries -= usize::from(!stays && dial.is_retry);
            if !stays {
                closed_early.remove(&dial.id);
            }
            stays
        });
    }

    /// Waits for the end of a dial. Returns `None` if there is no dial.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no outcome.
    pub(super) async fn ended(&mut self) -> Option<Ended> {
        self.tasks.join_next_with_id().await
    }

    /// Returns the outcome of a dial that has ended. Returns `None` if the dial was forgotten.
    pub(super) fn finish(&mut self, ended: Ended) -> Option<Dialled> {
        let (task, outcome) = match ended {
            Ok((task, outcome)) => (task, outcome),
            Err(error) => (error.id(), Err(DialError::Panicked(error))),
        };
        let dial = self.in_progress.remove(&task)?;
        self.retries -= usize::from(dial.is_retry);
        Some(Dialled {
            subchannel: dial.subchannel,
            id: dial.id,
            outcome,
            closed: self.closed_early.remove(&dial.id),
        })
    }

    /// Handles the end of a connection, with its close reason. Returns the reason if the outcome of the connection's dial was already
    /// handled, or if the dial was forgotten. Otherwise keeps the reason for [`finish`](Self::finish), which returns it together with the
    /// outcome.
    pub(super) fn on_closed(&mut self, id: DialId, reason: CloseReason) -> Option<CloseReason> {
        let mut in_progress = self.in_progress.values();
        if in_progress.any(|dial| dial.id == id) {
            self.closed_early.insert(id, reason);
            return None;
        }
        Some(reason)
    }
}

/// Limit on concurrent dials. It is high enough to connect thousands of endpoints within a second if a dial takes less than 100 ms, and low
/// enough that dials do not exhaust the process's limit on open files.
const MAX_DIALS: usize = 256;

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::time::Duration;

    use super::*;

    fn fails() -> impl Future<Output = Result<Connection, DialError>> {
        ready(Err(DialError::TimedOut(Duration::ZERO)))
    }

    fn enqueue(dials: &mut Dials, ids: std::ops::Range<u64>, is_failing: bool) {
        let mut rng = fastrand::Rng::with_seed(7);
        for id in ids {
            dials.enqueue(id, is_failing, &mut rng);
        }
    }

    /// Starts every dial that the limits allow. Returns the number of dials.
    fn start_all(dials: &mut Dials, is_retry: bool) -> usize {
        let mut started = 0;
        while let Some(id) = dials.next() {
            dials.start(id, id, is_retry, pending());
            started += 1;
        }
        started
    }

    #[tokio::test]
    async fn failing_subchannels_use_at_most_half_of_the_dials() {
        let mut dials = Dials::default();
        enqueue(&mut dials, 0..1_000, true);
        assert_eq!(start_all(&mut dials, true), MAX_DIALS / 2);
        enqueue(&mut dials, 1_000..2_000, false);
        assert_eq!(start_all(&mut dials, false), MAX_DIALS / 2);
    }

    #[tokio::test]
    async fn failing_subchannels_are_dialled_after_the_others() {
        let mut dials = Dials::default();
        enqueue(&mut dials, 0..10, true);
        enqueue(&mut dials, 10..20, false);
        let order: Vec<_> = std::iter::from_fn(|| dials.next()).collect();
        assert_eq!(order.len(), 20);
        assert!(order[..10].iter().all(|id| *id >= 10), "{order:?}");
    }

    #[tokio::test]
    async fn the_outcome_of_a_forgotten_dial_is_ignored() {
        let mut dials = Dials::default();
        dials.start(1, 11, true, fails());
        dials.start(2, 12, true, fails());
        dials.forget(1);
        assert_eq!(dials.retries, 1);
        let mut finished = Vec::new();
        while let Some(ended) = dials.ended().await {
            finished.extend(dials.finish(ended).map(|dialled| dialled.subchannel));
        }
        assert_eq!(finished, [2]);
        assert_eq!(dials.retries, 0);
    }

    #[tokio::test]
    async fn the_close_reason_of_a_connection_is_returned_with_the_outcome_of_its_dial() {
        let mut dials = Dials::default();
        dials.start(1, 11, false, fails());
        assert!(dials.on_closed(11, CloseReason::Closed).is_none());
        let ended = dials.ended().await.expect("a dial should end");
        let dialled = dials.finish(ended).expect("the dial should be known");
        assert!(dialled.closed.is_some());
        assert!(dials.on_closed(11, CloseReason::Closed).is_some());
    }
}
