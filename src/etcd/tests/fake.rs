//! A scripted etcd. It sends real messages over an in-memory connection, in the orders and with the faults that were measured on real
//! servers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use etcd_client::proto::{
    PbCompactionRequest, PbCompactionResponse, PbDeleteRequest, PbDeleteResponse, PbKvServer,
    PbKvService, PbLeaseGrantRequest, PbLeaseGrantResponse, PbLeaseKeepAliveRequest,
    PbLeaseKeepAliveResponse, PbLeaseLeasesRequest, PbLeaseLeasesResponse, PbLeaseRevokeRequest,
    PbLeaseRevokeResponse, PbLeaseServer, PbLeaseService, PbLeaseTimeToLiveRequest,
    PbLeaseTimeToLiveResponse, PbPutRequest, PbPutResponse, PbRangeRequest, PbRangeResponse,
    PbRangeStreamResponse, PbResponseOp, PbTargetUnion, PbTxnOpRequest, PbTxnOpResponse,
    PbTxnRequest, PbTxnResponse, PbWatchRequest, PbWatchResponse, PbWatchServer, PbWatchService,
};
use tokio::io::DuplexStream;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::store::Store;
use super::users::{Authenticate, Users};
use super::watcher;
use crate::etcd::Etcd;
use crate::etcd::auth::Auth;
use crate::etcd::connect::tuned;
use crate::etcd::members::OpenChannel;
use tonic_balance::Address;
use tonic_balance::BalancedChannel;

/// The scripted server. Clones share the store and the script.
#[derive(Clone)]
pub(super) struct Fake {
    store: Arc<Mutex<Store>>,
    script: Arc<Mutex<Script>>,
    /// A counter that is incremented when the store changes, and when all streams must end. Streams wait for its changes.
    pub(super) changed: watch::Sender<u64>,
    /// The number of the connection that this value serves.
    connection: u32,
    /// The address of the member that this value serves.
    pub(super) member: Arc<str>,
}

/// The faults to inject, and the requests counted so far.
pub(super) struct Script {
    pub(super) rng: fastrand::Rng,
    /// Percentage of requests and watch messages with a fault.
    pub(super) faults: u8,
    /// Number of further watch streams that are opened but send no message.
    pub(super) mute_watches: u32,
    /// Number of further delete events that are dropped and not sent on a watch.
    pub(super) lost_deletes: usize,
    /// Number of connections so far.
    pub(super) connections: u32,
    /// The numbers of the connections that carried reads of keys.
    pub(super) keys_over: BTreeSet<u32>,
    /// The numbers of the connections that carried lease requests.
    pub(super) leases_over: BTreeSet<u32>,
    /// A key and a lease. Just before the next transaction, another server writes the key under this lease.
    pub(super) usurped: Option<(Vec<u8>, i64)>,
    /// Number of further renewals with a response from an old raft term.
    pub(super) stale_renewals: u32,
    pub(super) users: Users,
    /// Requests on the connection with this number, and on all earlier connections, get no response.
    pub(super) frozen: u32,
    /// A prefix that the user may not read.
    pub(super) hidden: Option<String>,
    /// The member whose watches send no more messages.
    pub(super) mute: Option<&'static str>,
    /// Number of further renewals whose streams end without a response.
    pub(super) closed_renewals: u32,
    /// Number of requested watch streams.
    pub(super) watches: u32,
    /// Number of open renewal streams.
    pub(super) renewing: u32,
    /// Number of reads of a single key with its value.
    pub(super) reads_of_values: u32,
    /// Number of requested list pages.
    pub(super) pages: u32,
    /// Number of further grants that are executed, but whose responses are lost.
    pub(super) lost_grants: u32,
    /// Number of requests by kind. Each message of a stream counts as one.
    pub(super) counts: BTreeMap<&'static str, u64>,
    /// Whether grants ignore the requested id and return another one, as kine does.
    pub(super) chooses_leases: bool,
    /// Whether the server chooses the watch ids itself and ignores the requested ids, as `etcd grpc-proxy` does.
    pub(super) numbers_watchers: bool,
    /// The time that reads, and requests for watchers, take.
    pub(super) delay: Duration,
    /// The reads, and the requests for watchers, that have no response yet.
    pub(super) in_flight: BTreeMap<&'static str, InFlight>,
}

/// The requests of one kind that have no response yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct InFlight {
    now: usize,
    /// The largest number so far.
    pub(super) peak: usize,
}

/// Counts a request until it is dropped.
pub(super) struct Open {
    fake: Fake,
    kind: &'static str,
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(in_flight) = self.fake.script().in_flight.get_mut(self.kind) {
            in_flight.now -= 1;
        }
    }
}

impl Script {
    /// Decides at random whether the next request or message has a fault. If so, returns a random number below `ways`, which chooses the
    /// fault.
    pub(super) fn fault(&mut self, ways: u8) -> Option<u8> {
        (self.rng.u8(..100) < self.faults).then(|| self.rng.u8(..ways))
    }
}

impl Fake {
    pub(super) fn new(seed: u64, faults: u8) -> Self {
        Self {
            store: Arc::new(Mutex::new(Store::new())),
            script: Arc::new(Mutex::new(Script {
                rng: fastrand::Rng::with_seed(seed),
                faults,
                mute_watches: 0,
                lost_deletes: 0,
                connections: 0,
                keys_over: BTreeSet::new(),
                leases_over: BTreeSet::new(),
                usurped: None,
                stale_renewals: 0,
                users: Users::default(),
                frozen: 0,
                hidden: None,
                mute: None,
                closed_renewals: 0,
                watches: 0,
                renewing: 0,
                reads_of_values: 0,
                pages: 0,
                lost_grants: 0,
                counts: BTreeMap::new(),
                chooses_leases: false,
                numbers_watchers: false,
                delay: Duration::ZERO,
                in_flight: BTreeMap::new(),
            })),
            changed: watch::Sender::new(0),
            connection: 0,
            member: Arc::from(""),
        }
    }

    pub(super) fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().expect(BROKEN)
    }

    /// Asserts a property that every request must have. A panic in the task of the server would only end a connection, and the library
    /// recovers from that. So the script is locked during the assertion: the panic poisons the lock, and the next access to the script
    /// panics in the test.
    pub(super) fn insist(&self, holds: bool, what: &str) {
        let _poisoned = self.script();
        assert!(holds, "{what}");
    }

    pub(super) fn count(&self, kind: &'static str) {
        *self.script().counts.entry(kind).or_default() += 1;
    }

    /// Counts a request as one without a response until the result is dropped.
    pub(super) fn open_request(&self, kind: &'static str) -> Open {
        let mut script = self.script();
        let in_flight = script.in_flight.entry(kind).or_default();
        in_flight.now += 1;
        in_flight.peak = in_flight.peak.max(in_flight.now);
        drop(script);
        Open {
            fake: self.clone(),
            kind,
        }
    }

    /// Removes expired leases, and returns the store.
    pub(super) fn store(&self) -> MutexGuard<'_, Store> {
        let mut store = self.store.lock().expect(BROKEN);
        let before = store.revision;
        store.expire(Instant::now());
        if store.revision != before {
            self.tell();
        }
        store
    }

    /// Ends every watch stream, as the restart of a member does.
    pub(super) fn cut(&self) {
        self.store().epoch += 1;
        self.tell();
    }

    pub(super) fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Creates a client for a cluster with this number of members.
    pub(super) fn etcd(&self, members: usize) -> Etcd {
        self.etcd_at((0..members).map(|index| format!("member{index}:1")))
    }

    /// Creates a client for members at the given addresses. A member with the host name `stranger` is a server that is not an etcd.
    pub(super) fn etcd_at(&self, addresses: impl IntoIterator<Item = String>) -> Etcd {
        let addresses = addresses.into_iter();
        let addresses: Vec<Address> = addresses
            .map(|address| address.parse().expect("a valid address"))
            .collect();
        let credentials = self.script().users.credentials();
        Etcd::lazy(
            addresses.clone(),
            self.open(addresses),
            Auth::new(credentials),
        )
    }

    /// Returns a function that opens channels. Their connections are in memory, so that paused time advances only while every task is idle.
    fn open(&self, addresses: Vec<Address>) -> OpenChannel {
        let fake = self.clone();
        Arc::new(move || {
            let fake = fake.clone();
            let dial = move |address: Address| std::future::ready(Ok(fake.accept(&address)));
            let channel = tuned(BalancedChannel::builder()).connector(dial);
            channel
                .addresses(addresses.iter().map(Address::as_str))
                .connect_lazy()
        })
    }

    fn accept(&self, address: &Address) -> DuplexStream {
        let connection = {
            let mut script = self.script();
            script.connections += 1;
            script.connections
        };
        let fake = Self {
            connection,
            member: Arc::from(address.as_str()),
            ..self.clone()
        };
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let mut services = tonic::service::Routes::default();
        if address.host() != Some("stranger") {
            services = services
                .add_service(PbKvServer::new(fake.clone()))
                .add_service(Authenticate(fake.clone()))
                .add_service(PbLeaseServer::new(fake.clone()))
                .add_service(PbWatchServer::new(fake));
        }
        let router = tonic::transport::Server::builder().add_routes(services);
        let incoming = tokio_stream::once(Ok::<_, std::io::Error>(theirs));
        tokio::spawn(async move {
            // The server ends with its connection.
            drop(router.serve_with_incoming(incoming).await);
        });
        ours
    }

    /// Chooses the fault of a request at random: an error, no response, a response that is lost after the execution, or a delay. Returns
    /// whether the response must be lost.
    async fn fate(&self) -> Result<bool, Status> {
        if self.connection <= self.script().frozen {
            tokio::time::sleep(NEVER).await;
        }
        let fault = self.script().fault(5);
        match fault {
            Some(0) => Err(Status::unavailable("etcdserver: no leader")),
            Some(1) => Err(Status::unavailable("etcdserver: request timed out")),
            Some(2) => {
                tokio::time::sleep(NEVER).await;
                Err(Status::unknown("transport error"))
            }
            Some(3) => Ok(true),
            Some(_) => {
                tokio::time::sleep(Duration::from_millis(300)).await;
                Ok(false)
            }
            None => Ok(false),
        }
    }

    async fn answer<T>(
        &self,
        work: impl FnOnce(&mut Store) -> Result<T, Status>,
    ) -> Result<Response<T>, Status> {
        let lost = self.fate().await?;
        let answer = {
            let mut store = self.store();
            let before = store.revision;
            let answer = work(&mut store);
            store.expire(Instant::now());
            if store.revision != before {
                self.tell();
            }
            answer
        };
        if lost {
            tokio::time::sleep(NEVER).await;
        }
        answer.map(Response::new)
    }
}

/// Checks the metadata of a request. Every request must have `hasleader`, so that a member without a leader rejects the request. Unary
/// requests, and only these, must have a deadline.
fn is_well_formed<T>(fake: &Fake, request: &Request<T>, unary: bool) {
    let asks = request.metadata().get("hasleader");
    let asks = asks.is_some_and(|asks| asks == "true");
    fake.insist(asks, "`hasleader` is missing");
    let deadline = request.metadata().contains_key("grpc-timeout");
    fake.insist(
        deadline == unary,
        "unary requests, and only these, must have a deadline",
    );
}

fn range(store: &Store, request: &PbRangeRequest) -> Result<PbRangeResponse, Status> {
    if request.revision > store.revision {
        let text = "etcdserver: mvcc: required revision is a future revision";
        return Err(Status::out_of_range(text));
    }
    if request.revision > 0 && request.revision < store.revision {
        // The scripted store keeps no older revisions of its keys, so every older revision counts as compacted.
        let text = "etcdserver: mvcc: required revision has been compacted";
        return Err(Status::out_of_range(text));
    }
    let within = |key: &[u8]| {
        if request.range_end.is_empty() {
            return key == request.key;
        }
        key >= request.key.as_slice() && key < request.range_end.as_slice()
    };
    let found = store.keys.values().filter(|kv| within(&kv.key));
    let mut kvs: Vec<_> = found.cloned().collect();
    let count = kvs.len();
    kvs.retain(|kv| kv.mod_revision >= request.min_mod_revision);
    if request.count_only {
        kvs.clear();
    }
    let selected = kvs.len();
    let limit = usize::try_from(request.limit).unwrap_or(0);
    if limit > 0 {
        kvs.truncate(limit);
    }
    if request.keys_only {
        for kv in &mut kvs {
            kv.value.clear();
        }
    }
    Ok(PbRangeResponse {
        header: Some(store.header()),
        more: kvs.len() < selected,
        count: i64::try_from(count).unwrap_or(i64::MAX),
        kvs,
    })
}

fn txn(store: &mut Store, request: PbTxnRequest) -> Result<PbTxnResponse, Status> {
    let holds = request.compare.iter().all(|compare| {
        let kv = store.keys.get(&compare.key);
        match &compare.target_union {
            Some(PbTargetUnion::ModRevision(revision)) => {
                kv.map_or(0, |kv| kv.mod_revision) == *revision
            }
            Some(PbTargetUnion::Lease(lease)) => kv.map_or(0, |kv| kv.lease) == *lease,
            _ => false,
        }
    });
    let guarded = |key: &[u8]| {
        let mut guards = request.compare.iter();
        guards.any(|guard| {
            guard.key == key && matches!(guard.target_union, Some(PbTargetUnion::ModRevision(_)))
        })
    };
    let operations = if holds {
        request.success
    } else {
        request.failure
    };
    let mut changes = Vec::new();
    let mut responses = Vec::new();
    for operation in operations {
        responses.push(match operation.request {
            Some(PbTxnOpRequest::RequestRange(request)) => PbResponseOp {
                response: Some(PbTxnOpResponse::ResponseRange(range(store, &request)?)),
            },
            Some(PbTxnOpRequest::RequestPut(put)) => {
                assert_ne!(put.lease, 0, "a put must have a lease");
                assert!(guarded(&put.key), "a put must compare the mod revision");
                if !store.leases.contains_key(&put.lease) {
                    return Err(Status::not_found("etcdserver: requested lease not found"));
                }
                changes.push((put.key, Some((put.value, put.lease))));
                PbResponseOp::default()
            }
            Some(PbTxnOpRequest::RequestDeleteRange(delete)) => {
                changes.push((delete.key, None));
                PbResponseOp::default()
            }
            _ => return Err(Status::unimplemented("not scripted")),
        });
    }
    store.apply(changes);
    Ok(PbTxnResponse {
        header: Some(store.header()),
        succeeded: holds,
        responses,
    })
}

#[tonic::async_trait]
impl PbKvService for Fake {
    type RangeStreamStream = ReceiverStream<Result<PbRangeStreamResponse, Status>>;

    async fn range(
        &self,
        request: Request<PbRangeRequest>,
    ) -> Result<Response<PbRangeResponse>, Status> {
        is_well_formed(self, &request, true);
        // Only the TTL of a lease depends on a count.
        let counts = request.get_ref().count_only;
        self.insist(
            request.get_ref().serializable == counts,
            "a read must be linearizable, and a count must not be",
        );
        let one = request.get_ref().range_end.is_empty();
        self.count(if counts {
            "count"
        } else if one || request.get_ref().limit == 1 {
            "read"
        } else {
            "list"
        });
        self.script().pages += u32::from(!one && !counts && request.get_ref().limit != 1);
        self.admits(&request)?;
        let is_hidden = |prefix: &String| request.get_ref().key.starts_with(prefix.as_bytes());
        if self.script().hidden.as_ref().is_some_and(is_hidden) {
            return Err(Status::permission_denied("etcdserver: permission denied"));
        }
        {
            let mut script = self.script();
            script.keys_over.insert(self.connection);
            script.reads_of_values += u32::from(one && !request.get_ref().keys_only);
        }
        let _open = self.open_request("read");
        let delay = self.script().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        self.answer(|store| range(store, request.get_ref())).await
    }

    async fn txn(&self, request: Request<PbTxnRequest>) -> Result<Response<PbTxnResponse>, Status> {
        is_well_formed(self, &request, true);
        self.count("txn");
        self.admits(&request)?;
        if let Some((key, lease)) = self.script().usurped.take() {
            self.store()
                .apply(vec![(key, Some((b"127.0.0.1:9".to_vec(), lease)))]);
            self.tell();
        }
        self.answer(|store| txn(store, request.into_inner())).await
    }

    async fn range_stream(
        &self,
        _: Request<PbRangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn put(&self, _: Request<PbPutRequest>) -> Result<Response<PbPutResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn delete_range(
        &self,
        _: Request<PbDeleteRequest>,
    ) -> Result<Response<PbDeleteResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn compact(
        &self,
        _: Request<PbCompactionRequest>,
    ) -> Result<Response<PbCompactionResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }
}

#[tonic::async_trait]
impl PbLeaseService for Fake {
    async fn lease_grant(
        &self,
        request: Request<PbLeaseGrantRequest>,
    ) -> Result<Response<PbLeaseGrantResponse>, Status> {
        is_well_formed(self, &request, true);
        self.count("grant");
        self.admits(&request)?;
        self.script().leases_over.insert(self.connection);
        let PbLeaseGrantRequest { ttl, mut id } = *request.get_ref();
        let lost = {
            let mut script = self.script();
            let lost = script.lost_grants > 0;
            script.lost_grants = script.lost_grants.saturating_sub(1);
            if script.chooses_leases {
                id = ttl;
            }
            lost
        };
        let answer = self.answer(|store| {
            let length = Duration::from_secs(ttl.unsigned_abs());
            if store.leases.contains_key(&id) {
                return Err(Status::failed_precondition(
                    "etcdserver: lease already exists",
                ));
            }
            store.leases.insert(id, (length, Instant::now() + length));
            Ok(PbLeaseGrantResponse {
                header: Some(store.header()),
                id,
                ttl,
                error: String::new(),
            })
        });
        let answer = answer.await;
        if lost {
            tokio::time::sleep(NEVER).await;
        }
        answer
    }

    async fn lease_revoke(
        &self,
        request: Request<PbLeaseRevokeRequest>,
    ) -> Result<Response<PbLeaseRevokeResponse>, Status> {
        is_well_formed(self, &request, true);
        self.admits(&request)?;
        let id = request.get_ref().id;
        self.script().leases_over.insert(self.connection);
        self.answer(|store| match store.leases.remove(&id) {
            Some(_) => Ok(PbLeaseRevokeResponse {
                header: Some(store.header()),
            }),
            None => Err(Status::not_found("etcdserver: requested lease not found")),
        })
        .await
    }

    type LeaseKeepAliveStream = ReceiverStream<Result<PbLeaseKeepAliveResponse, Status>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<PbLeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        is_well_formed(self, &request, false);
        if self.script().users.renewals_are_checked {
            self.admits(&request)?;
        }
        self.script().leases_over.insert(self.connection);
        let mut requests = request.into_inner();
        let (answers, stream) = mpsc::channel(4);
        let fake = self.clone();
        fake.script().renewing += 1;
        tokio::spawn(async move {
            loop {
                let request = tokio::select! {
                    request = requests.message() => request,
                    () = answers.closed() => break,
                };
                let Ok(Some(request)) = request else {
                    break;
                };
                fake.count("renewal");
                let closed = fake.script().closed_renewals > 0;
                if closed {
                    fake.script().closed_renewals -= 1;
                    break;
                }
                // As measured: a former leader that was frozen answers the renewal of a lease that the cluster has already removed. The
                // response has an old raft term.
                let lie = {
                    let mut script = fake.script();
                    let stale = script.stale_renewals > 0;
                    script.stale_renewals = script.stale_renewals.saturating_sub(1);
                    stale || script.fault(8) == Some(0)
                };
                let answer = fake
                    .answer(|store| Ok(renewal(store, request.id, lie)))
                    .await;
                if answers
                    .send(answer.map(Response::into_inner))
                    .await
                    .is_err()
                {
                    break;
                }
            }
            fake.script().renewing -= 1;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn lease_time_to_live(
        &self,
        _: Request<PbLeaseTimeToLiveRequest>,
    ) -> Result<Response<PbLeaseTimeToLiveResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn lease_leases(
        &self,
        _: Request<PbLeaseLeasesRequest>,
    ) -> Result<Response<PbLeaseLeasesResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }
}

fn renewal(store: &mut Store, id: i64, lie: bool) -> PbLeaseKeepAliveResponse {
    let mut header = store.header();
    let mut ttl = 0;
    if let Some((length, expires)) = store.leases.get_mut(&id) {
        if !lie {
            *expires = Instant::now() + *length;
        }
        ttl = i64::try_from(length.as_secs()).unwrap_or(i64::MAX);
    }
    if lie {
        // The former leader may also report that a lease does not exist, because it has not received the grant.
        ttl = if id % 2 == 0 { 10 } else { 0 };
        header.raft_term -= 1;
    }
    PbLeaseKeepAliveResponse {
        header: Some(header),
        id,
        ttl,
    }
}

#[tonic::async_trait]
impl PbWatchService for Fake {
    type WatchStream = ReceiverStream<Result<PbWatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<PbWatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        is_well_formed(self, &request, false);
        // As measured: etcd rejects an invalid token with a message on the stream, not with a status.
        let refusal = self.admits(&request).err();
        self.script().watches += 1;
        if self.script().fault(4) == Some(0) {
            return Err(Status::unavailable("etcdserver: no leader"));
        }
        let (answers, stream) = mpsc::channel(64);
        let mute = {
            let mut script = self.script();
            let mute = script.mute_watches > 0
                || script.mute == Some(&*self.member)
                || script.fault(8) == Some(0);
            script.mute_watches = script.mute_watches.saturating_sub(1);
            mute
        };
        let requests = request.into_inner();
        let stream_of = watcher::serve(self.clone(), requests, answers, mute, refusal);
        tokio::spawn(stream_of);
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// A time that is longer than any timeout of the tests.
const NEVER: Duration = Duration::from_secs(3_600);

/// The panic message for a poisoned script or store.
const BROKEN: &str = "an earlier request violated an assertion";
