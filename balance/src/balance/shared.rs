//! The part of the balancer that calls use: the published ready set, and the requests to the driver.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::dial_permit::DialPermit;
use super::endpoint::{AnswerFault, Endpoint};
use super::endpoint_status::{EndpointState, EndpointStatus};
use super::estimate::Reference;
use super::load::Loads;
use super::options::Options;
use super::permit::Permit;
use super::picker::{Pick, Picker, SCAN_LIMIT};
use super::ready_connection::{ReadyConnection, ReadyEntry};
use super::ready_set::ReadySet;
use super::stream_queue::Waiters;
use super::summary::Summary;
use crate::address::Address;
use crate::transport::connect::{Connector, DialError, DialHistory};

/// The state that calls share with the driver.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(super) published: ArcSwap<Published>,
    /// Wakes the calls that wait for a connection: after each publication, and after a change that may let more calls use a connection.
    pub(super) changed: Notify,
    /// Wakes the driver when a call waits, when the caller has given up a connection, when a call has found a connection dead, or when a
    /// call has reported a response that is not gRPC.
    pub(super) demand: Notify,
    /// Connections that callers have given up (`BalancedChannel::reconnect`), until the driver has removed them from the ready set.
    given_up: Mutex<Vec<Arc<ReadyConnection>>>,
    pub(super) waiters: Arc<Waiters>,
    picker: Picker,
    pub(super) directory: Mutex<HashMap<Address, Arc<Endpoint>>>,
    /// Dials the private connections, which carry one call each.
    connector: Arc<Connector>,
    /// Whether a call has found a connection dead after a silence. Other connections may be dead as well, so the driver then checks those
    /// on which nothing was read for a while.
    found_dead: AtomicBool,
    /// Whether a call has begun to wait since the driver last read this flag.
    call_waits: AtomicBool,
    /// The reason why the channel makes no more calls, once it has ended.
    ended: OnceLock<Arc<str>>,
    /// Endpoints whose responses are not gRPC, as reported by calls.
    not_grpc: Mutex<Vec<Arc<Endpoint>>>,
    pub(super) started: Instant,
}

impl Shared {
    pub(super) fn new(options: &Options, connector: Arc<Connector>) -> Self {
        Self {
            connector,
            found_dead: AtomicBool::new(false),
            call_waits: AtomicBool::new(false),
            ended: OnceLock::new(),
            not_grpc: Mutex::new(Vec::new()),
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
    /// The permit refers to the connection and not to an index of the set. So the call cannot reach a different endpoint, even if the
    /// driver replaces the set between the pick and the send.
    pub(crate) fn pick(&self, usable: impl Fn(&Arc<ReadyConnection>) -> bool) -> Pick<Permit> {
        self.snapshot(SCAN_LIMIT).pick(usable)
    }

    /// Returns the published state. A pick from it draws a few connections. If none of them can take the call, the pick scans at most
    /// `scan_limit` slots of the set.
    pub(crate) fn snapshot(&self, scan_limit: usize) -> Snapshot<'_> {
        Snapshot {
            picker: &self.picker,
            published: self.published.load(),
            scan_limit,
        }
    }

    /// Returns the summary of the published state.
    pub(crate) fn summary(&self) -> Summary {
        self.published.load().summary.clone()
    }

    /// Returns true if the channel has ended, so that no more calls are made.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get().is_some()
    }

    pub(crate) fn changed(&self) -> &Notify {
        &self.changed
    }

    pub(crate) fn waiters(&self) -> &Arc<Waiters> {
        &self.waiters
    }

    /// Wakes the driver because a call waits. The driver adds a connection to each endpoint whose streams are all in use, and dials the
    /// resting subchannels, whose connections ended while no call needed them.
    pub(crate) fn demand(&self) {
        self.call_waits.store(true, Ordering::Relaxed);
        self.demand.notify_one();
    }

    /// Makes the driver check the connections on which nothing was read for a while, because a call has found one of them dead.
    pub(crate) fn check_silent(&self) {
        self.found_dead.store(true, Ordering::Relaxed);
        self.demand.notify_one();
    }

    /// Records a response that was not gRPC. After [`MAX_NOT_GRPC`] such responses in a row, the driver puts the endpoint in quarantine. If
    /// no response of the endpoint has been gRPC since its last quarantine, one more response that is not gRPC is enough.
    #[cold]
    pub(crate) fn on_not_grpc(
        &self,
        endpoint: &Arc<Endpoint>,
        fault: AnswerFault,
        describe: impl FnOnce() -> String,
    ) {
        endpoint.record_fault(fault, describe);
        if endpoint.on_not_grpc() >= MAX_NOT_GRPC {
            self.lock_not_grpc().push(Arc::clone(endpoint));
            self.demand.notify_one();
        }
    }

    /// Removes and returns the endpoints whose responses are not gRPC, as reported by calls.
    pub(super) fn take_not_grpc(&self) -> Vec<Arc<Endpoint>> {
        std::mem::take(&mut *self.lock_not_grpc())
    }

    fn lock_not_grpc(&self) -> MutexGuard<'_, Vec<Arc<Endpoint>>> {
        self.not_grpc.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether a call has begun to wait since this function was last called.
    pub(super) fn take_call_waits(&self) -> bool {
        self.call_waits.swap(false, Ordering::Relaxed)
    }

    /// Returns whether a call has found a connection dead after a silence, since this function was last called.
    pub(super) fn take_found_dead(&self) -> bool {
        self.found_dead.swap(false, Ordering::Relaxed)
    }

    /// Dials a private connection to an endpoint, for one call. `metadata`: the size of the metadata of the call, in bytes.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the dial and closes the connection.
    pub(crate) async fn dial_private(
        &self,
        endpoint: &Arc<Endpoint>,
        metadata: usize,
        dial_permit: DialPermit,
    ) -> Result<Permit, DialError> {
        let connected = self
            .connector
            .connect(endpoint.address(), DialHistory::default(), |_| {});
        let load = Loads::new().begin(None, Reference::default());
        let connection = ReadyConnection::new(
            connected.await?,
            Arc::clone(endpoint),
            load,
            Arc::<Waiters>::clone(&self.waiters),
            self.started,
        );
        let connection = Arc::new(connection);
        connection.update_stream_limit();
        connection.load().acquire();
        dial_permit.end_soon();
        Ok(Permit::private(&connection, metadata, dial_permit))
    }

    /// Makes the driver replace a connection by a new one to the same endpoint. Calls on the old connection finish. The driver removes the
    /// old connection from the ready set only later, so [`given_up`](Self::given_up) returns it until then.
    pub(crate) fn give_up(&self, connection: &Arc<ReadyConnection>) {
        self.lock_given_up().push(Arc::clone(connection));
        self.demand.notify_one();
    }

    /// Returns the connections that were given up and may still be in the ready set.
    pub(crate) fn given_up(&self) -> Vec<Arc<ReadyConnection>> {
        self.lock_given_up().clone()
    }

    /// Removes these connections from the list of connections that callers have given up.
    pub(super) fn forget_given_up(&self, replaced: &[Arc<ReadyConnection>]) {
        self.lock_given_up().retain(|connection| {
            let mut replaced = replaced.iter();
            !replaced.any(|replaced| Arc::ptr_eq(replaced, connection))
        });
    }

    fn lock_given_up(&self) -> MutexGuard<'_, Vec<Arc<ReadyConnection>>> {
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

    /// Returns the current state of every endpoint.
    pub(super) fn states(&self) -> Vec<EndpointState> {
        let directory = self.directory();
        directory
            .values()
            .map(|endpoint| endpoint.state())
            .collect()
    }

    /// Ends the channel: waiting calls and all later calls fail with this reason.
    pub(super) fn end(&self, why: &str, summary: &Summary) {
        // Keeps the first reason. `Balancer::end` sets the reason why the channel is invalid, and then aborts the driver. When the driver
        // is dropped, it calls this function again, with another reason.
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

    /// Removes an endpoint from the directory. [`endpoints`](Self::endpoints) then no longer reports it.
    pub(super) fn forget(&self, endpoint: &Arc<Endpoint>) {
        let mut directory = self.directory();
        // If the address was registered again, the directory contains a new endpoint for it, which must stay.
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

/// One published state, for two steps: a pick, and if the pick finds no connection, the decision whether the call waits or fails. If each
/// step loaded the state, an endpoint could become ready in between. The pick would then find no ready endpoint, the decision would find no
/// pending endpoint, and the call would fail.
#[derive(Debug)]
pub(crate) struct Snapshot<'a> {
    pub(super) picker: &'a Picker,
    pub(super) published: Guard<Arc<Published>>,
    scan_limit: usize,
}

impl Snapshot<'_> {
    /// Picks as [`Shared::pick`] does.
    pub(crate) fn pick(&self, usable: impl Fn(&Arc<ReadyConnection>) -> bool) -> Pick<Permit> {
        let usable = |entry: &ReadyEntry| usable(entry.connection());
        match self
            .picker
            .pick(&self.published.ready, usable, self.scan_limit)
        {
            Pick::Taken(entry) => Pick::Taken(Permit::reserved(entry.connection())),
            Pick::Full => Pick::Full,
            Pick::Excluded => Pick::Excluded,
            Pick::Empty => Pick::Empty,
        }
    }

    pub(crate) fn summary(&self) -> &Summary {
        &self.published.summary
    }
}

/// Number of consecutive responses that are not gRPC, after which an endpoint no longer counts as a gRPC server. A single such response is
/// not enough, because a proxy may send it while the server behind it restarts.
const MAX_NOT_GRPC: u32 = 3;
