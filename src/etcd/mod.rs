//! etcd, as the tasks see it. The only place that names `etcd_client`.
//!
//! Each member has a client of its own, and one of them is in use: a call that fails there for the member's own fault moves on to the
//! next member, for this call and those after it. One channel balanced over all members would go on handing every third call to the
//! member that is frozen.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, GetOptions, LeaseGrantOptions, PutOptions,
    SortOrder, SortTarget, Txn, TxnOp,
};
use tower::util::BoxCloneSyncService;

use crate::error::{EtcdError, EtcdErrorKind};
use crate::format::MAX_VALUE;
use crate::keyspace::{
    GuardedPut, Header, KeepAlive, Key, KeyValue, KeyVersion, LeaseId, ListRequest, Page, Range,
    Revision,
};

mod auth;
mod connect;
mod endpoint;
mod error;
mod rpc;
mod watch;

pub(crate) use auth::{Credentials, Token};
pub(crate) use connect::Config;
pub(crate) use endpoint::MemberEndpoint;
pub(crate) use watch::Watch;

use auth::{Auth, MemberService};

/// A handle on an etcd cluster. Cloning is a reference count.
#[derive(Clone, Debug)]
pub(crate) struct Etcd(Arc<Cluster>);

struct Cluster {
    members: Vec<Member>,
    /// The index of the member in use.
    current: AtomicUsize,
    auth: Auth,
}

/// One member and its clients.
#[derive(Clone)]
struct Member {
    endpoint: Arc<str>,
    client: Client,
    /// The channel under the client; `None` for a client that the user made.
    service: Option<MemberService>,
}

impl Etcd {
    /// Makes the clients without a round trip.
    async fn lazy(
        members: Vec<(String, tonic::transport::Channel)>,
        auth: Auth,
    ) -> Result<Self, EtcdError> {
        let mut list = Vec::with_capacity(members.len());
        for (endpoint, channel) in members {
            let service = auth.service(channel);
            let custom =
                etcd_client::Channel::Custom(BoxCloneSyncService::new(tower::util::MapErr::new(
                    service.clone(),
                    tower::BoxError::from as fn(tonic::transport::Error) -> tower::BoxError,
                )));
            let client = Client::from_channel(custom, Some(ConnectOptions::new()))
                .await
                .map_err(|source| error::of_client("connect", &endpoint, source))?;
            list.push(Member {
                endpoint: endpoint.into(),
                client,
                service: Some(service),
            });
        }
        Ok(Self::of_members(list, auth))
    }

    /// Takes a client that the user made.
    pub(crate) fn from_client(client: Client) -> Self {
        let member = Member {
            endpoint: "(the given client)".into(),
            client,
            service: None,
        };
        Self::of_members(vec![member], Auth::new(None))
    }

    fn of_members(members: Vec<Member>, auth: Auth) -> Self {
        // All clients of a fleet are given the same list; the random start keeps them off its first member.
        let current = AtomicUsize::new(fastrand::usize(..members.len().max(1)));
        Self(Arc::new(Cluster {
            members,
            current,
            auth,
        }))
    }

    /// The members' addresses as `host:port`; none for a client that the user made.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        let members = self
            .0
            .members
            .iter()
            .filter(|member| member.service.is_some());
        members.map(|member| member.endpoint.to_string()).collect()
    }

    pub(crate) fn members(&self) -> usize {
        self.0.members.len()
    }

    /// Tries a request up to five times, 2 s each, on one member after another.
    async fn call<T, Fut>(
        &self,
        operation: &'static str,
        request: impl Fn(Member) -> Fut,
    ) -> Result<T, EtcdError>
    where
        Fut: Future<Output = Result<T, EtcdError>>,
    {
        let mut tries = 1;
        loop {
            match self.attempt(operation, DEADLINE, &request).await {
                Err(error) if self.may_succeed(&error) && tries < TRIES => {
                    tracing::debug!(%error, tries, "etcd call failed, trying again");
                    let step = match error.kind() {
                        EtcdErrorKind::NoLeader => ELECTION_STEP,
                        // The first try at each further member costs no wait.
                        _ if (tries as usize) < self.members() => Duration::ZERO,
                        _ => RETRY_STEP,
                    };
                    let wait = crate::backoff::jittered(
                        step * 2u32.pow(tries - 1),
                        &mut fastrand::Rng::new(),
                    );
                    tokio::time::sleep(wait).await;
                    tries += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Tries a request once, on the member in use, and moves on to the next one if that failed for the member's fault. A refusal is
    /// answered with a fresh token and a second try.
    async fn attempt<T, Fut>(
        &self,
        operation: &'static str,
        deadline: Duration,
        request: impl Fn(Member) -> Fut,
    ) -> Result<T, EtcdError>
    where
        Fut: Future<Output = Result<T, EtcdError>>,
    {
        let (index, member) = self.member(operation)?;
        let token = self.0.auth.token();
        let mut outcome = bounded(operation, deadline, member, request(member.clone())).await;
        if let Err(error) = &outcome
            && error.kind().is_refusal()
        {
            match self.renew_token(member, token.as_ref(), deadline).await {
                Ok(true) => {
                    tracing::debug!(%error, "etcd refused the token, trying again with a fresh one");
                    outcome = bounded(operation, deadline, member, request(member.clone())).await;
                }
                Ok(false) => {}
                Err(error) => outcome = Err(error),
            }
        }
        if let Err(error) = &outcome {
            self.report_at(index, error);
        }
        outcome
    }

    /// Whether the same request may succeed later, or at another member.
    fn may_succeed(&self, error: &EtcdError) -> bool {
        // One wrong endpoint among good ones must not be the end.
        let elsewhere = error.kind() == EtcdErrorKind::Unimplemented && self.members() > 1;
        error.kind().is_transient() || elsewhere
    }

    fn report_at(&self, index: usize, error: &EtcdError) {
        // A full store is full at every member.
        if self.may_succeed(error) && error.kind() != EtcdErrorKind::NoSpace {
            self.move_on(index);
        }
    }

    fn member(&self, operation: &'static str) -> Result<(usize, &Member), EtcdError> {
        let index = self.0.current.load(Ordering::Relaxed);
        let member = self.0.members.get(index);
        member.map(|member| (index, member)).ok_or_else(|| {
            EtcdError::new(
                EtcdErrorKind::Unavailable,
                operation,
                "(none)",
                "there is no member",
            )
        })
    }

    /// Leaves the member at `index`, if it is still the one in use: of many calls that fail together, one moves on.
    fn move_on(&self, index: usize) {
        let next = (index + 1) % self.members();
        if next != index
            && self
                .0
                .current
                .compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            tracing::info!(from = %self.0.members[index].endpoint, to = %self.0.members[next].endpoint, "moved on to another etcd member");
        }
    }

    async fn renew_token(
        &self,
        member: &Member,
        refused: Option<&Token>,
        deadline: Duration,
    ) -> Result<bool, EtcdError> {
        let deadline = deadline.max(DEADLINE);
        let renewal = async {
            match &member.service {
                Some(service) => {
                    self.0
                        .auth
                        .refresh(refused, service, &member.endpoint, deadline)
                        .await
                }
                None => {
                    self.0
                        .auth
                        .refresh_client(&member.client, &member.endpoint)
                        .await
                }
            }
        };
        // The wait for somebody else's renewal included.
        bounded("authenticate", deadline, member, renewal).await
    }

    /// Reads up to `limit` keys of a range, linearizably: at `revision`, or at the newest.
    pub(crate) async fn list(&self, request: &ListRequest) -> Result<Page, EtcdError> {
        const OPERATION: &str = "list";
        self.call(OPERATION, |member| {
            let mut options = GetOptions::new()
                .with_range(request.range.end.as_bytes())
                .with_limit(request.limit)
                .with_revision(request.revision.get())
                .with_sort(SortTarget::Key, SortOrder::Ascend);
            if request.keys_only {
                options = options.with_keys_only();
            }
            let start = request.range.start.as_bytes().to_vec();
            async move {
                let mut kv = member
                    .client
                    .kv_client()
                    .max_decoding_message_size(MAX_MESSAGE);
                let response = kv.get(start, Some(options)).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &member.endpoint, source))?;
                Ok(Page {
                    header: header(response.0.header.as_ref()),
                    more: response.0.more,
                    kvs: response.0.kvs.into_iter().map(key_value).collect(),
                })
            }
        })
        .await
    }

    /// Reads one key, linearizably.
    pub(crate) async fn read(&self, key: &Key) -> Result<(Header, Option<KeyValue>), EtcdError> {
        self.call("read", |member| read(member, key.clone())).await
    }

    /// Reads which write of a key is the last, linearizably and without its value.
    pub(crate) async fn version(
        &self,
        key: &Key,
    ) -> Result<(Header, Option<KeyVersion>), EtcdError> {
        let request = ListRequest {
            range: Range::key(key),
            limit: 1,
            revision: Revision::ZERO,
            keys_only: true,
        };
        let page = self.list(&request).await?;
        Ok((page.header, page.kvs.first().map(KeyValue::version)))
    }

    /// As [`Etcd::read`], tried once.
    pub(crate) async fn read_once(
        &self,
        key: &Key,
        deadline: Duration,
    ) -> Result<(Header, Option<KeyValue>), EtcdError> {
        self.attempt("read", deadline, |member| read(member, key.clone()))
            .await
    }

    /// Opens a watch on a range; `None` watches from now. Waits for the first message's head, up to 2 s; tried once.
    pub(crate) async fn watch(
        &self,
        range: &Range,
        from: Option<Revision>,
    ) -> Result<Watch, EtcdError> {
        let open = |member: Member| {
            watch::open(
                member.client,
                Arc::clone(&member.endpoint),
                range.clone(),
                from,
            )
        };
        self.attempt("watch", DEADLINE, open).await
    }

    /// Answers a watch's end for the member's fault: the next one goes elsewhere.
    pub(crate) fn report(&self, error: &EtcdError) {
        let mut members = self.0.members.iter();
        if let Some(index) = members.position(|member| *member.endpoint == *error.endpoint()) {
            self.report_at(index, error);
        }
    }

    /// The token in use, to be handed to [`Etcd::refused`] if a watch that is opened now is refused later.
    pub(crate) fn token(&self) -> Option<Token> {
        self.0.auth.token()
    }

    /// Answers a refusal that came in a watch's messages: fetches a fresh token, unless somebody else has done so since.
    pub(crate) async fn refused(&self, token: Option<&Token>) -> Result<(), EtcdError> {
        let (_, member) = self.member("authenticate")?;
        self.renew_token(member, token, DEADLINE).await.map(drop)
    }

    /// Grants a lease under a chosen id, and says its time to live, which may be longer than asked. Tried once.
    pub(crate) async fn grant(
        &self,
        lease: LeaseId,
        ttl: Duration,
        deadline: Duration,
    ) -> Result<Duration, EtcdError> {
        const OPERATION: &str = "lease grant";
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        self.attempt(OPERATION, deadline, |member| async move {
            let options = LeaseGrantOptions::new().with_id(lease.get());
            let response = member
                .client
                .lease_client()
                .grant(seconds, Some(options))
                .await;
            let response =
                response.map_err(|source| error::of_client(OPERATION, &member.endpoint, source))?;
            Ok(u64::try_from(response.ttl()).map_or(ttl, Duration::from_secs))
        })
        .await
    }

    /// Renews a lease. Tried once.
    pub(crate) async fn keep_alive(
        &self,
        lease: LeaseId,
        deadline: Duration,
    ) -> Result<KeepAlive, EtcdError> {
        const OPERATION: &str = "lease keep-alive";
        self.attempt(OPERATION, deadline, |member| async move {
            if let Some(service) = &member.service {
                return rpc::keep_alive(service, &member.endpoint, lease).await;
            }
            let failed = |source| error::of_client(OPERATION, &member.endpoint, source);
            let (mut keeper, mut answers) = member
                .client
                .lease_client()
                .keep_alive(lease.get())
                .await
                .map_err(failed)?;
            // etcd-client keeps the first answer's TTL and header to itself; the second one on the stream shows both.
            keeper.keep_alive().await.map_err(failed)?;
            let answer = answers.message().await.map_err(failed)?;
            let answer = answer.filter(|answer| answer.ttl() > 0).ok_or_else(|| {
                EtcdError::new(
                    EtcdErrorKind::LeaseNotFound,
                    OPERATION,
                    &member.endpoint,
                    format!("lease {lease} has no time left"),
                )
            })?;
            let ttl = Duration::from_secs(answer.ttl().unsigned_abs());
            Ok(KeepAlive {
                header: answer.0.header.as_ref().map(|head| header(Some(head))),
                ttl,
            })
        })
        .await
    }

    /// Revokes a lease, and with it every key that hangs on it. Tried once; a lease that is gone counts as revoked.
    pub(crate) async fn revoke(&self, lease: LeaseId, deadline: Duration) -> Result<(), EtcdError> {
        const OPERATION: &str = "lease revoke";
        let outcome = self
            .attempt(OPERATION, deadline, |member| async move {
                let response = member.client.lease_client().revoke(lease.get()).await;
                response
                    .map(drop)
                    .map_err(|source| error::of_client(OPERATION, &member.endpoint, source))
            })
            .await;
        match outcome {
            Err(error) if error.kind() == EtcdErrorKind::LeaseNotFound => Ok(()),
            outcome => outcome,
        }
    }

    /// Puts a key under a lease if nobody has written it since `expected` (zero: if it does not exist). Says the new revision, or
    /// `None` if somebody has. Tried once.
    pub(crate) async fn put_if(
        &self,
        put: &GuardedPut,
        deadline: Duration,
    ) -> Result<Option<Revision>, EtcdError> {
        const OPERATION: &str = "put";
        self.attempt(OPERATION, deadline, |member| {
            let key = || put.key.as_bytes().to_vec();
            let compare = Compare::mod_revision(key(), CompareOp::Equal, put.expected.get());
            let options = PutOptions::new().with_lease(put.lease.get());
            let txn = Txn::new().when([compare]).and_then([TxnOp::put(
                key(),
                put.value.clone(),
                Some(options),
            )]);
            async move {
                let response = member.client.kv_client().txn(txn).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &member.endpoint, source))?;
                Ok(response
                    .succeeded()
                    .then(|| header(response.0.header.as_ref()).revision))
            }
        })
        .await
    }
}

async fn read(member: Member, key: Key) -> Result<(Header, Option<KeyValue>), EtcdError> {
    let mut kv = member
        .client
        .kv_client()
        .max_decoding_message_size(MAX_MESSAGE);
    let response = kv.get(key.as_bytes(), None).await;
    let response = response.map_err(|source| error::of_client("read", &member.endpoint, source))?;
    Ok((
        header(response.0.header.as_ref()),
        response.0.kvs.into_iter().next().map(key_value),
    ))
}

async fn bounded<T>(
    operation: &'static str,
    deadline: Duration,
    member: &Member,
    request: impl Future<Output = Result<T, EtcdError>>,
) -> Result<T, EtcdError> {
    // Boxed, for `etcd-client`'s futures are 20 KiB large, and every task of ours would be.
    tokio::time::timeout(deadline, Box::pin(request))
        .await
        .unwrap_or_else(|_| Err(error::deadline(operation, &member.endpoint, deadline)))
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let endpoints: Vec<_> = self
            .members
            .iter()
            .map(|member| &*member.endpoint)
            .collect();
        f.debug_struct("Cluster")
            .field("endpoints", &endpoints)
            .field("auth", &self.auth)
            .finish_non_exhaustive()
    }
}

fn header(header: Option<&etcd_client::proto::PbResponseHeader>) -> Header {
    header.map_or_else(Header::default, |header| Header {
        cluster_id: header.cluster_id,
        revision: Revision::new(header.revision),
        raft_term: header.raft_term,
    })
}

fn key_value(kv: etcd_client::proto::PbKeyValue) -> KeyValue {
    let mut value = kv.value;
    if value.len() > MAX_VALUE {
        // It will be refused; until then a list of many must not fill the memory.
        value.truncate(MAX_VALUE + 1);
        value.shrink_to_fit();
    }
    KeyValue {
        key: kv.key.into(),
        value,
        create_revision: Revision::new(kv.create_revision),
        mod_revision: Revision::new(kv.mod_revision),
        lease: LeaseId::new(kv.lease),
    }
}

/// The bound on one try of one call. A healthy member answers in milliseconds; a frozen one never does.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);
/// With three members, five tries pass a dead one and a frozen one and still see the third twice.
const TRIES: u32 = 5;
/// Doubled after each try and jittered: the waits of five tries make 1.1 to 2.2 s together.
const RETRY_STEP: Duration = Duration::from_millis(150);
/// The same while there is no leader: 3 to 6 s, in which a cluster with the default election timeout of 1 s has found one even if the
/// first vote is split.
const ELECTION_STEP: Duration = Duration::from_millis(400);
/// The limit on one message: a page of 500 values and a watch's fragments stay far below, a hostile prefix does not get more memory.
const MAX_MESSAGE: usize = 16 << 20;
