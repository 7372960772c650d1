//! The part of the balancer that calls use: the published ready set, and the requests to the driver.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use http::HeaderName;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::dial_permit::DialPermit;
use super::endpoint::{AnswerFault, Endpoint};
use super::endpoint_status::{EndpointState, EndpointStatus};
use super::estimate::Reference;
use super::load::Loads;
use super::options::{Options, Reconfiguration};
use super::permit::Permit;
use super::pick_key::PickKey;
use super::pick_policy::PickPolicy;
use super::picker::{LbPolicy, Pick, SCAN_LIMIT};
use super::ready_connection::{ReadyConnection, ReadyEntry};
use super::ready_set::ReadySet;
use super::request_limit::{Place, RequestLimit};
use super::select::Criterion;
use super::snapshot::{Picking, Published, Snapshot};
use super::stream_queue::Waiters;
use super::subsets::SplitDraw;
use super::summary::Summary;
use super::traffic_split::{TrafficSplit, TrafficSplits};
use super::wanted::Wanted;
use crate::address::Address;
use crate::transport::connect::{Connector, DialError, DialHistory};

/// The state that calls share with the driver.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(super) published: ArcSwap<Published>,
    /// Wakes the calls that wait for a connection: after each publication, and after a change that may let more calls use a connection.
    pub(super) changed: Notify,
    /// Wakes the calls that wait for a place below the limit of the channel, when the channel ends.
    end: Notify,
    /// Wakes the driver when a call waits, when the caller has given up a connection, when a call has found a connection dead, or when a
    /// call has reported a response that is not gRPC.
    pub(super) demand: Arc<Notify>,
    /// Connections that callers have given up (`BalancedChannel::reconnect`), until the driver has removed them from the ready set.
    given_up: Mutex<Vec<Arc<ReadyConnection>>>,
    pub(super) waiters: Arc<Waiters>,
    /// The limit on the requests of the channel, if there is one.
    requests: Option<Arc<RequestLimit>>,
    /// The limit on the requests of each endpoint, if there is one.
    max_requests_per_endpoint: Option<u32>,
    /// Settings of the balancer that the driver has not applied yet.
    reconfiguration: Mutex<Option<Reconfiguration>>,
    picking: Picking,
    /// Whether the policy picks by the hash of a call.
    uses_hashes: AtomicBool,
    /// Whether calls read the load reports of the servers.
    load_reports: AtomicBool,
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
    /// Endpoints whose servers have sent a pushback that the driver does not know yet.
    pushed_back: Mutex<Vec<Arc<Endpoint>>>,
    /// The longest time for which a pushback keeps new calls away. Zero if pushbacks are ignored.
    max_pushback: Duration,
    splits: Mutex<Splits>,
    /// The header whose value is the key of a call for the consistent hash.
    hash_header: ArcSwapOption<HeaderName>,
    pub(super) started: Instant,
}

/// The traffic splits that are set, and the one that the driver has applied.
#[derive(Debug)]
struct Splits {
    set: TrafficSplits,
    applied: TrafficSplit,
}

impl Shared {
    pub(super) fn new(options: &Options, connector: Arc<Connector>) -> Self {
        let demand = Arc::new(Notify::new());
        let requests = options.max_requests.map(RequestLimit::new).map(Arc::new);
        Self {
            connector,
            found_dead: AtomicBool::new(false),
            call_waits: AtomicBool::new(false),
            ended: OnceLock::new(),
            not_grpc: Mutex::new(Vec::new()),
            pushed_back: Mutex::new(Vec::new()),
            max_pushback: options.max_pushback,
            splits: Mutex::new(Splits {
                set: options.splits.clone(),
                applied: options.splits.current().clone(),
            }),
            hash_header: ArcSwapOption::new(options.hash_header.clone().map(Arc::new)),
            published: ArcSwap::from_pointee(Published::new(options)),
            changed: Notify::new(),
            end: Notify::new(),
            demand: Arc::clone(&demand),
            given_up: Mutex::new(Vec::new()),
            waiters: Arc::new(Waiters::new(options.max_waiters, requests.clone())),
            requests,
            max_requests_per_endpoint: options.max_requests_per_endpoint,
            reconfiguration: Mutex::new(None),
            picking: Picking {
                pick_policy: options.pick_policy.clone(),
                wanted: Wanted::new(demand),
            },
            uses_hashes: AtomicBool::new(options.policy == LbPolicy::RingHash),
            load_reports: AtomicBool::new(options.load_reports),
            directory: Mutex::new(HashMap::new()),
            started: Instant::now(),
        }
    }

    /// Takes a place below the limit of the channel, picks a `usable` connection, and returns a permit on it.
    ///
    /// The permit refers to the connection and not to an index of the set. So the call cannot reach a different endpoint, even if the
    /// driver replaces the set between the pick and the send.
    pub(crate) fn pick(
        &self,
        key: &PickKey,
        draw: &SplitDraw,
        usable: impl Fn(&Arc<ReadyConnection>) -> bool,
    ) -> Pick<Permit> {
        match &self.requests {
            None => self.pick_unlimited(key, draw, usable),
            Some(limit) => self.pick_limited(limit, key, draw, usable),
        }
    }

    // Not inlined, so that a pick without a limit stays short.
    #[inline(never)]
    fn pick_limited(
        &self,
        limit: &Arc<RequestLimit>,
        key: &PickKey,
        draw: &SplitDraw,
        usable: impl Fn(&Arc<ReadyConnection>) -> bool,
    ) -> Pick<Permit> {
        let published = self.published.load();
        if published.ready.len() == 0 {
            // A call that waits until an endpoint is ready takes no place of other calls.
            return Pick::Empty;
        }
        // The policy of the program may panic. The guard then makes the place free.
        let Some(place) = limit.place() else {
            return Pick::Limited;
        };
        let picked = self.pick_from(published, key, draw, usable);
        if matches!(picked, Pick::Taken(_)) {
            place.keep();
        }
        picked
    }

    #[inline]
    fn pick_unlimited(
        &self,
        key: &PickKey,
        draw: &SplitDraw,
        usable: impl Fn(&Arc<ReadyConnection>) -> bool,
    ) -> Pick<Permit> {
        self.pick_from(self.published.load(), key, draw, usable)
    }

    #[inline]
    fn pick_from(
        &self,
        published: Guard<Arc<Published>>,
        key: &PickKey,
        draw: &SplitDraw,
        usable: impl Fn(&Arc<ReadyConnection>) -> bool,
    ) -> Pick<Permit> {
        // The common case needs no `Snapshot`, whose creation would add a dozen instructions to each pick.
        if let (PickKey::Any, None) = (key, &published.subsets) {
            let usable = |entry: &ReadyEntry| usable(entry.connection());
            let picked = published.picker.pick(&published.ready, usable, SCAN_LIMIT);
            return picked.map(|entry| Permit::reserved(entry.connection()));
        }
        Snapshot::new(&self.picking, published, key, draw, SCAN_LIMIT).pick(usable)
    }

    /// Returns the published state. A pick from it draws a few connections. If none of them can take the call, the pick scans at most
    /// `scan_limit` slots of the set.
    pub(crate) fn snapshot<'a>(
        &'a self,
        key: &'a PickKey,
        draw: &'a SplitDraw,
        scan_limit: usize,
    ) -> Snapshot<'a> {
        let published = self.published.load();
        Snapshot::new(&self.picking, published, key, draw, scan_limit)
    }

    /// Returns whether picks use data of the call even if the call selects no endpoints.
    pub(crate) fn uses_call_data(&self) -> bool {
        self.uses_hashes() || self.picking.pick_policy.is_some()
    }

    pub(crate) fn pick_policy(&self) -> Option<&dyn PickPolicy> {
        self.picking.policy()
    }

    /// Returns whether picks use the hash of a call.
    pub(crate) fn uses_hashes(&self) -> bool {
        self.uses_hashes.load(Ordering::Relaxed)
    }

    /// Records whether the policy uses the hash of a call.
    pub(super) fn set_uses_hashes(&self, uses_hashes: bool) {
        self.uses_hashes.store(uses_hashes, Ordering::Relaxed);
    }

    /// Returns whether calls read the load reports of the servers.
    pub(crate) fn reads_load_reports(&self) -> bool {
        self.load_reports.load(Ordering::Relaxed)
    }

    /// Sets whether calls read the load reports of the servers.
    pub(super) fn set_load_reports(&self, load_reports: bool) {
        self.load_reports.store(load_reports, Ordering::Relaxed);
    }

    /// Removes and returns criteria for which calls have requested a ready set, at most `limit`.
    pub(super) fn take_wanted(&self, limit: usize) -> Vec<Criterion> {
        self.picking.wanted.take(limit)
    }

    /// Returns the header whose value is the key of a call for the consistent hash.
    pub(crate) fn hash_header(&self) -> Guard<Option<Arc<HeaderName>>> {
        self.hash_header.load()
    }

    pub(super) fn set_hash_header(&self, header: Option<HeaderName>) {
        self.hash_header.store(header.map(Arc::new));
    }

    /// Replaces the traffic split of the program. Calls use the new split as soon as the driver has published its ready sets.
    pub(crate) fn set_split(&self, split: TrafficSplit) {
        lock(&self.splits).set.of_program = split;
        self.demand.notify_one();
    }

    /// Replaces the traffic split of the service config.
    pub(super) fn set_split_of_service_config(&self, split: TrafficSplit) {
        lock(&self.splits).set.of_service_config = split;
    }

    /// Returns whether the driver has published the ready sets of the current traffic split.
    #[cfg(test)]
    pub(crate) fn has_applied_split(&self) -> bool {
        self.new_split().is_none()
    }

    /// Returns the current traffic split, if the driver has not applied it yet.
    pub(super) fn new_split(&self) -> Option<TrafficSplit> {
        let splits = lock(&self.splits);
        let current = splits.set.current();
        (*current != splits.applied).then(|| current.clone())
    }

    /// Records that the driver has applied a traffic split.
    pub(super) fn on_split_applied(&self, split: TrafficSplit) {
        lock(&self.splits).applied = split;
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

    /// Returns the signal that the end of the channel was published.
    pub(crate) fn end_signal(&self) -> &Notify {
        &self.end
    }

    pub(crate) fn waiters(&self) -> &Arc<Waiters> {
        &self.waiters
    }

    /// Returns the limit on the requests of the channel, if there is one.
    pub(crate) fn request_limit(&self) -> Option<&Arc<RequestLimit>> {
        self.requests.as_ref()
    }

    /// Returns the limit on the requests of each endpoint, if there is one.
    pub(crate) fn max_requests_per_endpoint(&self) -> Option<u32> {
        self.max_requests_per_endpoint
    }

    /// Returns whether the number of requests of the channel or of its endpoints is limited.
    pub(crate) fn limits_requests(&self) -> bool {
        self.requests.is_some() || self.max_requests_per_endpoint.is_some()
    }

    /// Returns a place below the limit of the channel, if one is free.
    pub(crate) fn place(&self) -> Option<Place> {
        match &self.requests {
            Some(limit) => limit.place(),
            None => Some(Place::unlimited()),
        }
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

    /// Records that a server has refused a call and requests a wait. The driver keeps new calls away from the endpoint for that time.
    #[cold]
    pub(crate) fn on_pushback(&self, endpoint: &Arc<Endpoint>, wait: Duration, now: Instant) {
        if self.max_pushback.is_zero() {
            return;
        }
        let until = now + wait.min(self.max_pushback);
        if endpoint.extend_pushback(until, now) {
            lock(&self.pushed_back).push(Arc::clone(endpoint));
            self.demand.notify_one();
        }
    }

    /// Removes and returns the endpoints whose servers have sent a pushback.
    pub(super) fn take_pushed_back(&self) -> Vec<Arc<Endpoint>> {
        std::mem::take(&mut *lock(&self.pushed_back))
    }

    /// Returns whether a call has begun to wait since this function was last called.
    pub(super) fn take_call_waits(&self) -> bool {
        self.call_waits.swap(false, Ordering::Relaxed)
    }

    /// Returns whether a call has found a connection dead after a silence, since this function was last called.
    pub(super) fn take_found_dead(&self) -> bool {
        self.found_dead.swap(false, Ordering::Relaxed)
    }

    /// Dials a private connection to an endpoint, for one call. `metadata`: the size of the metadata of the call, in bytes. `place`: the permit
    /// that holds the place of the call below the limits on requests, if there are limits.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the dial and closes the connection.
    pub(crate) async fn dial_private(
        &self,
        endpoint: &Arc<Endpoint>,
        metadata: usize,
        dial_permit: DialPermit,
        place: Option<Permit>,
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
        if place.is_none() {
            connection.load().acquire();
        }
        dial_permit.end_soon();
        Ok(Permit::private(&connection, metadata, dial_permit, place))
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
        let known = self.known();
        let mut statuses: Vec<_> = known.iter().map(|endpoint| endpoint.status()).collect();
        statuses.sort_by(|a, b| a.address.cmp(&b.address));
        statuses
    }

    /// Returns every endpoint.
    pub(crate) fn known(&self) -> Vec<Arc<Endpoint>> {
        self.directory().values().cloned().collect()
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
        let picker = Arc::clone(&self.published.load().picker);
        self.published.store(Arc::new(Published {
            ready: ReadySet::default(),
            subsets: None,
            summary,
            picker,
        }));
        self.changed.notify_waiters();
        self.end.notify_waiters();
    }

    /// Makes the driver apply other settings. If it has not applied the previous ones yet, it never does.
    pub(crate) fn reconfigure(&self, settings: Reconfiguration) {
        *self.lock_reconfiguration() = Some(settings);
        self.demand.notify_one();
    }

    /// Removes and returns the settings that the driver has not applied yet.
    pub(super) fn take_reconfiguration(&self) -> Option<Reconfiguration> {
        self.lock_reconfiguration().take()
    }

    fn lock_reconfiguration(&self) -> MutexGuard<'_, Option<Reconfiguration>> {
        let locked = self.reconfiguration.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of consecutive responses that are not gRPC, after which an endpoint no longer counts as a gRPC server. A single such response is
/// not enough, because a proxy may send it while the server behind it restarts.
const MAX_NOT_GRPC: u32 = 3;
