//! What calls see of the balancer: the published set, and the ways to tell the driver something.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::dial_permit::DialPermit;
use super::endpoint::{AnswerFault, Endpoint, EndpointStatus};
use super::load::Loads;
use super::permit::Permit;
use super::picker::{Pick, Picker, SCAN_LIMIT};
use super::ready_connection::{ReadyConnection, ReadyEntry};
use super::ready_set::ReadySet;
use super::waiters::Waiters;
use super::{Options, Published, Summary};
use crate::address::Address;
use crate::transport::connect::{Attempt, Connector, DialError};

/// What calls see of the balancer.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(super) published: ArcSwap<Published>,
    /// Tells those that wait for a connection of every new set.
    pub(super) changed: Notify,
    /// Tells the driver that a call found every connection full, or has given one up.
    pub(super) demand: Notify,
    /// Connections that calls have given up and the driver has not taken out of the set yet.
    pub(super) given_up: Mutex<Vec<Arc<ReadyConnection>>>,
    pub(super) waiters: Arc<Waiters>,
    pub(super) picker: Picker,
    pub(super) directory: Mutex<HashMap<Address, Arc<Endpoint>>>,
    /// For connections that carry one call each.
    pub(super) connector: Arc<Connector>,
    /// Whether a call has found a connection dead after a silence, so that others may be.
    pub(super) silent: AtomicBool,
    /// Whether a call waits for a connection.
    pub(super) wanting: AtomicBool,
    /// Why no calls are made any more.
    pub(super) ended: OnceLock<Arc<str>>,
    /// Endpoints whose answers are not gRPC's.
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

    /// Takes a place on a `usable` connection.
    ///
    /// The place is on a connection and not at an index: whatever is removed between the pick and the send, the call can reach no other
    /// endpoint.
    pub(crate) fn pick(&self, usable: impl Fn(&Arc<ReadyConnection>) -> bool) -> Pick<Permit> {
        self.snapshot(SCAN_LIMIT).pick(usable)
    }

    /// The set as it is now. A pick that finds so many places taken does not look at more of them.
    pub(crate) fn snapshot(&self, around: usize) -> Snapshot<'_> {
        Snapshot {
            picker: &self.picker,
            published: self.published.load(),
            around,
        }
    }

    /// How the set of endpoints is.
    pub(crate) fn summary(&self) -> Summary {
        self.published.load().summary.clone()
    }

    /// Whether no calls are made any more.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get().is_some()
    }

    pub(crate) fn changed(&self) -> &Notify {
        &self.changed
    }

    pub(crate) fn waiters(&self) -> &Arc<Waiters> {
        &self.waiters
    }

    /// A call waits: wakes the driver, which makes one more connection to endpoints whose streams are all in use, and dials those that rest.
    pub(crate) fn demand(&self) {
        self.wanting.store(true, Ordering::Relaxed);
        self.demand.notify_one();
    }

    /// Asks the driver to check the connections that were silent for long.
    pub(crate) fn check_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
        self.demand.notify_one();
    }

    /// An answer was not gRPC's. After a few in a row, and after one on probation, the endpoint gets no calls for a while.
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

    /// Makes a connection to an endpoint for one call.
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

    /// Has the driver replace a connection by a new one to the same endpoint. Calls on the old one finish. [`given_up`](Self::given_up)
    /// contains it at once, since the driver removes it from the ready set only later.
    pub(crate) fn give_up(&self, connection: &Arc<ReadyConnection>) {
        self.lock_given_up().push(Arc::clone(connection));
        self.demand.notify_one();
    }

    /// The connections that are to be left and may be picked all the same.
    pub(crate) fn given_up(&self) -> Vec<Arc<ReadyConnection>> {
        self.lock_given_up().clone()
    }

    pub(super) fn lock_given_up(&self) -> MutexGuard<'_, Vec<Arc<ReadyConnection>>> {
        self.given_up.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the channel was made.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Every endpoint as it is now, sorted by address.
    pub(crate) fn endpoints(&self) -> Vec<EndpointStatus> {
        let known: Vec<_> = self.directory().values().cloned().collect();
        let mut statuses: Vec<_> = known.iter().map(|endpoint| endpoint.status()).collect();
        statuses.sort_by(|a, b| a.address.cmp(&b.address));
        statuses
    }

    /// Calls fail for this reason from now on, and none waits.
    pub(super) fn end(&self, why: &str, summary: &Summary) {
        // The first reason is kept: an invalid channel sets its own before it aborts the driver.
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

    /// Shows an endpoint no more.
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
        // Nothing panics while it is held; and the data would be whole even then.
        self.directory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One state of the set, to pick from and to judge by. Two looks may see two of them: nothing that is ready in the one and nothing that is
/// on its way in the other.
#[derive(Debug)]
pub(crate) struct Snapshot<'a> {
    pub(super) picker: &'a Picker,
    pub(super) published: Guard<Arc<Published>>,
    around: usize,
}

impl Snapshot<'_> {
    /// See [`Shared::pick`].
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

/// Answers in a row that are not gRPC's, after which an endpoint is taken for something that is no gRPC server. One alone may be a proxy whose
/// server restarts.
const FOREIGN: u32 = 3;
