//! The part of the balancer that calls use: the published ready set, and the requests to the driver.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::dial_permit::DialPermit;
use super::endpoint::{AnswerFault, Endpoint, EndpointStatus};
use super::load::Loads;
use super::options::Options;
use super::permit::Permit;
use super::picker::{Pick, Picker, SCAN_LIMIT};
use super::ready_connection::{ReadyConnection, ReadyEntry};
use super::ready_set::ReadySet;
use super::summary::Summary;
use super::waiters::Waiters;
use crate::address::Address;
use crate::transport::connect::{Attempt, Connector, DialError};

/// The state that calls share with the driver.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(super) published: ArcSwap<Published>,
    /// Wakes the calls that wait for a connection, after each published set.
    pub(super) changed: Notify,
    /// Wakes the driver: a call waits, has given up a connection, or has reported a fault.
    pub(super) demand: Notify,
    /// Connections that calls have given up and that the driver has not removed from the set yet.
    pub(super) given_up: Mutex<Vec<Arc<ReadyConnection>>>,
    pub(super) waiters: Arc<Waiters>,
    pub(super) picker: Picker,
    pub(super) directory: Mutex<HashMap<Address, Arc<Endpoint>>>,
    /// Dials the connections that carry one call each.
    pub(super) connector: Arc<Connector>,
    /// Whether a call has found a connection dead after a silence. Other connections may be dead as well.
    pub(super) silent: AtomicBool,
    /// Whether a call waits for a connection.
    pub(super) wanting: AtomicBool,
    /// Why no more calls are made.
    pub(super) ended: OnceLock<Arc<str>>,
    /// Endpoints whose responses are not gRPC.
    pub(super) foreign: Mutex<Vec<Arc<Endpoint>>>,
    pub(super) started: Instant,
}

impl Shared {
    pub(super) fn new(options: &Options, connector: Arc<Connector>) -> Self {
        Self {
            connector,
            silent: AtomicBool::new(false),
            wanting: AtomicBool::new(false),
            ended: OnceLock::new(),
            foreign: Mutex::new(Vec::new()),
            published: ArcSwap::from_pointee(Published::default()),
            changed: Notify::new(),
            demand: Notify::new(),
            given_up: Mutex::new(Vec::new()),
            waiters: Arc::new(Waiters::new(options.max_waiters)),
            picker: Picker::new(options.policy, options.seed),
            directory: Mutex::new(HashMap::new()),
            started: Instant::now(),
        }
    }

    /// Picks a `usable` connection and returns a permit on it.
    ///
    /// The permit refers to the connection and not to an index of the set. Whatever the driver removes between the pick and the send, the
    /// call cannot reach a different endpoint.
    pub(crate) fn pick(&self, usable: impl Fn(&Arc<ReadyConnection>) -> bool) -> Pick<Permit> {
        self.snapshot(SCAN_LIMIT).pick(usable)
    }

    /// Returns the published state. If the drawn connections cannot take the call, a pick scans at most `around` slots.
    pub(crate) fn snapshot(&self, around: usize) -> Snapshot<'_> {
        Snapshot {
            picker: &self.picker,
            published: self.published.load(),
            around,
        }
    }

    /// Returns the summary of the published state.
    pub(crate) fn summary(&self) -> Summary {
        self.published.load().summary.clone()
    }

    /// Returns whether no more calls are made.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get().is_some()
    }

    pub(crate) fn changed(&self) -> &Notify {
        &self.changed
    }

    pub(crate) fn waiters(&self) -> &Arc<Waiters> {
        &self.waiters
    }

    /// Wakes the driver because a call waits. The driver adds a connection to endpoints whose streams are all in use, and dials resting
    /// connections.
    pub(crate) fn demand(&self) {
        self.wanting.store(true, Ordering::Relaxed);
        self.demand.notify_one();
    }

    /// Makes the driver check the connections that were silent for long.
    pub(crate) fn check_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
        self.demand.notify_one();
    }

    /// Records a response that was not gRPC. After a few such responses in a row, or after a single one on probation, the endpoint gets no
    /// calls for a while.
    #[cold]
    pub(crate) fn on_foreign(
        &self,
        endpoint: &Arc<Endpoint>,
        noted: AnswerFault,
        describe: impl FnOnce() -> String,
    ) {
        endpoint.note(noted, describe);
        if endpoint.on_foreign() >= FOREIGN {
            self.foreign().push(Arc::clone(endpoint));
            self.demand.notify_one();
        }
    }

    pub(super) fn foreign(&self) -> MutexGuard<'_, Vec<Arc<Endpoint>>> {
        self.foreign.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dials a connection to an endpoint for one call.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection.
    pub(crate) async fn dial_alone(
        &self,
        endpoint: &Arc<Endpoint>,
        metadata: usize,
        trial: DialPermit,
    ) -> Result<Permit, DialError> {
        let connected = self
            .connector
            .connect(endpoint.address(), Attempt::default(), |_| {});
        let load = Loads::new().begin(None, 0.0);
        let connection = ReadyConnection::new(
            connected.await?,
            Arc::clone(endpoint),
            load,
            Arc::<Waiters>::clone(&self.waiters),
            self.started,
        );
        let connection = Arc::new(connection);
        connection.follow_limit();
        connection.load().acquire();
        trial.end_soon();
        Ok(Permit::alone(&connection, metadata, trial))
    }

    /// Makes the driver replace a connection by a new one to the same endpoint. Calls on the old connection finish.
    /// [`given_up`](Self::given_up) contains the connection at once, since the driver removes it from the ready set only later.
    pub(crate) fn give_up(&self, connection: &Arc<ReadyConnection>) {
        self.lock_given_up().push(Arc::clone(connection));
        self.demand.notify_one();
    }

    /// Returns the connections that were given up and may still be in the ready set.
    pub(crate) fn given_up(&self) -> Vec<Arc<ReadyConnection>> {
        self.lock_given_up().clone()
    }

    pub(super) fn lock_given_up(&self) -> MutexGuard<'_, Vec<Arc<ReadyConnection>>> {
        self.given_up.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the channel was created.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Returns the current status of every endpoint, sorted by address.
    pub(crate) fn endpoints(&self) -> Vec<EndpointStatus> {
        let known: Vec<_> = self.directory().values().cloned().collect();
        let mut statuses: Vec<_> = known.iter().map(|endpoint| endpoint.status()).collect();
        statuses.sort_by(|a, b| a.address.cmp(&b.address));
        statuses
    }

    /// Ends the channel: waiting calls and all later calls fail with this reason.
    pub(super) fn end(&self, why: &str, summary: &Summary) {
        // Keeps the first reason. `Balancer::end` sets the reason of an invalid channel and then aborts the driver, which calls this
        // function again when it is dropped.
        if self.ended.set(why.into()).is_err() {
            return;
        }
        let summary = Summary {
            ended: Some(why.into()),
            ready: 0,
            pending: 0,
            ..summary.clone()
        };
        let ready = ReadySet::default();
        self.published.store(Arc::new(Published { ready, summary }));
        self.changed.notify_waiters();
    }

    /// Removes an endpoint from the reported endpoints.
    pub(super) fn forget(&self, endpoint: &Arc<Endpoint>) {
        let mut directory = self.directory();
        // The address may have been registered again, with an endpoint of its own.
        if directory
            .get(endpoint.address())
            .is_some_and(|known| Arc::ptr_eq(known, endpoint))
        {
            directory.remove(endpoint.address());
        }
    }

    pub(super) fn directory(&self) -> MutexGuard<'_, HashMap<Address, Arc<Endpoint>>> {
        // No code panics while it holds this lock, and the data would be consistent even then.
        self.directory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A published state: a ready set and the matching summary.
#[derive(Debug, Default)]
pub(super) struct Published {
    pub(super) ready: ReadySet<ReadyEntry>,
    pub(super) summary: Summary,
}

/// One published state, for both a pick and the decision that follows it. If the state were loaded twice, the first load could have no
/// ready endpoint and the second load no pending endpoint, because the endpoint became ready in between.
#[derive(Debug)]
pub(crate) struct Snapshot<'a> {
    pub(super) picker: &'a Picker,
    pub(super) published: Guard<Arc<Published>>,
    around: usize,
}

impl Snapshot<'_> {
    /// Picks as [`Shared::pick`] does.
    pub(crate) fn pick(&self, usable: impl Fn(&Arc<ReadyConnection>) -> bool) -> Pick<Permit> {
        let usable = |entry: &ReadyEntry| usable(entry.connection());
        match self.picker.pick(&self.published.ready, usable, self.around) {
            Pick::Taken(entry) => Pick::Taken(Permit::taken(entry.connection())),
            Pick::Full => Pick::Full,
            Pick::Excluded => Pick::Excluded,
            Pick::Empty => Pick::Empty,
        }
    }

    pub(crate) fn summary(&self) -> &Summary {
        &self.published.summary
    }
}

/// Number of consecutive responses that are not gRPC, after which an endpoint no longer counts as a gRPC server. A single such response may
/// be sent by a proxy while the server behind it restarts.
const FOREIGN: u32 = 3;
