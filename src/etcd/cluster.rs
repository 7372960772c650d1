//! A handle to an etcd cluster: the source of its connections, the credentials, and the watch streams.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use etcd_client::Client;
use tokio::sync::SemaphorePermit;
use tokio::time::Instant;
use tonic_balance::Address;

use super::auth::Auth;
use super::cluster_id::ClusterId;
use super::concurrency_limit::ConcurrencyLimit;
use super::error;
use super::limits::DEADLINE;
use super::member_health::{Failure, Traffic};
use super::members::{Members, OpenChannel};
use super::metrics::RequestMetrics;
use super::reconcile_batch::ReconcileBatch;
use super::request_channel::RequestChannel;
use super::token_cell::Token;
use super::watch::Watch;
use super::watch_stream::WatchStreams;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Key, Range, Revision};
use crate::metrics::Metrics;
use crate::slots::Slots;

/// A handle to an etcd cluster. A clone shares the handle by a reference count.
#[derive(Clone, Debug)]
pub(crate) struct Etcd(pub(super) Arc<Cluster>);

pub(super) struct Cluster {
    pub(super) source: Source,
    pub(super) auth: Auth,
    streams: WatchStreams,
    /// The id of the cluster, which every response must have.
    pub(super) id: Arc<ClusterId>,
    pub(super) reconcile_batch: ReconcileBatch,
    /// The times at which the resolvers of this handle compare their services with the keys in etcd (reconciliation). All resolvers share
    /// these times.
    slots: Slots,
    /// Limits the requests that the resolvers send at the same time.
    pub(super) concurrency_limit: ConcurrencyLimit,
    /// The metrics, if they are enabled. Shared with detached handles.
    pub(super) metrics: Arc<OnceLock<RequestMetrics>>,
}

impl Cluster {
    fn new(source: Source, auth: Auth, id: Arc<ClusterId>) -> Self {
        Self {
            source,
            auth,
            streams: WatchStreams::new(Arc::clone(&id)),
            id,
            reconcile_batch: ReconcileBatch::default(),
            slots: Slots::new(Instant::now(), &mut fastrand::Rng::new()),
            concurrency_limit: ConcurrencyLimit::default(),
            metrics: Arc::default(),
        }
    }
}

/// The source of connections.
pub(super) enum Source {
    Members(Members),
    /// An external client, which the user has created. It has its own connections.
    External(Arc<Client>),
}

impl Etcd {
    /// Creates a handle over the members. The first request connects.
    pub(super) fn lazy(addresses: Vec<Address>, open: OpenChannel, auth: Auth) -> Self {
        let source = Source::Members(Members::new(addresses, open));
        Self(Arc::new(Cluster::new(source, auth, Arc::default())))
    }

    /// Creates a handle over an external client.
    pub(crate) fn from_client(client: Client) -> Self {
        let source = Source::External(Arc::new(client));
        let auth = Auth::new(None);
        Self(Arc::new(Cluster::new(source, auth, Arc::default())))
    }

    /// Returns a second handle to the same cluster, without connections. Its first request opens new connections on the runtime of that
    /// request. A handle over an external client keeps using the client's connections.
    pub(crate) fn detached(&self) -> Self {
        let source = match &self.0.source {
            Source::Members(members) => Source::Members(members.detached()),
            Source::External(client) => Source::External(Arc::clone(client)),
        };
        let auth = self.0.auth.detached();
        let mut cluster = Cluster::new(source, auth, Arc::clone(&self.0.id));
        cluster.metrics = Arc::clone(&self.0.metrics);
        Self(Arc::new(cluster))
    }

    /// Enables the metrics of this handle and of its clones. Later calls have no effect.
    pub(crate) fn set_metrics(&self, metrics: Metrics) {
        // An error means that the metrics are set already.
        let _ = self.0.metrics.set(RequestMetrics::new(metrics));
    }

    /// Returns the metrics, if they are enabled.
    pub(crate) fn metrics(&self) -> Option<&Metrics> {
        Some(&self.0.metrics.get()?.metrics)
    }

    /// Returns the addresses of the members as `host:port`. Empty for an external client.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        let addresses = self.addresses().iter();
        addresses.map(ToString::to_string).collect()
    }

    fn addresses(&self) -> &[Address] {
        match &self.0.source {
            Source::Members(members) => &members.addresses,
            Source::External(_) => &[],
        }
    }

    /// Returns the number of members. An external client counts as one.
    pub(crate) fn members(&self) -> usize {
        self.addresses().len().max(1)
    }

    /// Returns whether the same request may succeed later, or at another member.
    pub(super) fn may_succeed(&self, error: &EtcdError) -> bool {
        let elsewhere = error.kind() == EtcdErrorKind::Unimplemented && self.members() > 1;
        error.kind().is_transient() || elsewhere
    }

    /// Returns the channel for one request.
    pub(super) async fn channel(
        &self,
        traffic: Traffic,
        deadline: Duration,
    ) -> Result<RequestChannel, EtcdError> {
        match &self.0.source {
            Source::Members(members) => members.channel(traffic, deadline, &self.0.auth).await,
            Source::External(client) => Ok(RequestChannel::external(client)),
        }
    }

    /// Records the outcome of a request, or of the stream that it opened.
    pub(super) fn record_outcome(
        &self,
        channel: &RequestChannel,
        traffic: Traffic,
        error: Option<&EtcdError>,
    ) {
        let (Source::Members(members), Some(service)) = (&self.0.source, &channel.service) else {
            return;
        };
        let failure = match error.map(EtcdError::kind) {
            Some(EtcdErrorKind::DeadlineExceeded) => Failure::Timeout,
            // The store is full on every member, so this error is not a failure of the member.
            Some(EtcdErrorKind::NoSpace) => return,
            Some(_) if error.is_some_and(|error| self.may_succeed(error)) => Failure::Error,
            _ => return members.on_answer(service, traffic),
        };
        members.on_failure(service, traffic, failure);
    }

    /// Waits until the registry may send another request, but at most for a second. See [`ConcurrencyLimit::acquire`].
    pub(crate) async fn acquire_permit(&self) -> Option<SemaphorePermit<'_>> {
        self.0.concurrency_limit.acquire().await
    }

    /// Opens a watch on a range. The watch begins at the revision `from`, or at the current revision if `from` is `None`. Makes a single
    /// attempt. If a new stream is needed, waits up to 2 s for its response headers.
    pub(crate) async fn watch(
        &self,
        range: &Range,
        from: Option<Revision>,
    ) -> Result<Watch, EtcdError> {
        self.watch_ranges(vec![range.clone()], from, true).await
    }

    async fn watch_ranges(
        &self,
        ranges: Vec<Range>,
        from: Option<Revision>,
        is_probed: bool,
    ) -> Result<Watch, EtcdError> {
        let open = |channel: RequestChannel| {
            let (streams, token) = (self.0.streams.clone(), self.token());
            let ranges = ranges.clone();
            async move {
                let count = ranges.len();
                let subscribed = streams
                    .watch(channel, token, ranges, from, is_probed)
                    .await?;
                Ok(Watch::new(subscribed, count))
            }
        };
        self.attempt(Traffic::Keys, "watch", DEADLINE, open).await
    }

    /// Returns the number of open watch streams.
    #[cfg(test)]
    pub(super) fn watch_streams(&self) -> usize {
        self.0.streams.count()
    }

    /// Opens one watch on all `keys`, from the current revision on. Waits until all keys are watched: up to 2 s for a stream, and then up
    /// to 8 s until the server has created one watcher for each key. Makes a single attempt. The stream is not probed for this watch, so the
    /// caller must read the keys at intervals.
    pub(crate) async fn watch_each(&self, keys: &[Key]) -> Result<Watch, EtcdError> {
        let ranges = keys.iter().map(Range::key).collect();
        let mut watch = self.watch_ranges(ranges, None, false).await?;
        let channel = watch.channel.clone();
        let created = tokio::time::timeout(WATCHERS_TIMEOUT, Box::pin(watch.created())).await;
        match created {
            Ok(Ok(())) => Ok(watch),
            Ok(Err(error)) => {
                self.record_watch_end(&watch, &error);
                Err(error)
            }
            // This timeout is not recorded as a failure of the member, because the requests for the watchers may be queued behind those of
            // many other watches. If the member is the cause, the task of the stream detects it.
            Err(_) => Err(error::deadline(
                "watch",
                &channel.endpoint(),
                WATCHERS_TIMEOUT,
            )),
        }
    }

    /// Records the end of a watch. If the error is a failure of the member, the next watch avoids that member.
    pub(crate) fn record_watch_end(&self, watch: &Watch, error: &EtcdError) {
        if !watch.take_report() {
            return;
        }
        match (&self.0.source, &watch.channel.service) {
            // A watch ends with `DeadlineExceeded` only after the member was silent for seconds, so the connection to the member is replaced
            // at once.
            (Source::Members(members), Some(service))
                if error.kind() == EtcdErrorKind::DeadlineExceeded =>
            {
                members.on_failure(service, Traffic::Keys, Failure::StreamTimeout);
            }
            _ => self.record_outcome(&watch.channel, Traffic::Keys, Some(error)),
        }
    }

    /// Returns the times at which the services of this handle are reconciled.
    pub(crate) fn slots(&self) -> Slots {
        self.0.slots
    }

    /// Returns the token in use. A caller that opens a watch keeps this token, and passes it to [`Etcd::on_token_rejected`] if etcd rejects
    /// the watch.
    pub(crate) fn token(&self) -> Option<Token> {
        self.0.auth.token()
    }

    /// Records that a registration renews its lease with this handle. From then on, the random delay before a rejected token is replaced
    /// (see [`Etcd::on_known_servers`]) is at most 200 ms, so that the lease is renewed in time.
    pub(crate) fn set_renews_leases(&self) {
        self.0.auth.set_renews_leases();
    }

    /// Records how many registered servers a resolver of this client knows. The more servers there are, the longer this client may delay
    /// the replacement of a rejected token. So the servers, which must renew their leases, get their tokens first.
    pub(crate) fn on_known_servers(&self, count: usize) {
        self.0.auth.on_known_servers(count);
    }

    /// Handles a watch message that reports a rejected token: fetches a new token, unless a concurrent request has already done so.
    pub(crate) async fn on_token_rejected(&self, token: Option<&Token>) -> Result<(), EtcdError> {
        self.renew_token(token, DEADLINE).await.map(drop)
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Cluster");
        match &self.source {
            Source::Members(members) => shown.field("members", &members.addresses),
            Source::External(_) => shown.field("members", &"(external client)"),
        };
        shown.field("auth", &self.auth).finish_non_exhaustive()
    }
}

/// Limit on the time until the watchers of a registration's keys are created.
const WATCHERS_TIMEOUT: Duration = Duration::from_secs(8);
