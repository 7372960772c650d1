//! etcd, as the tasks see it. The only place that names `etcd_client`.
//!
//! The client runs on channels that are balanced over all members: a member that is down is not asked, and one that does not answer is not
//! asked again. What a connection does not show, [`standing`] remembers: whoever fails a request or a stream is avoided by the next ones.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::Client;

use crate::error::{EtcdError, EtcdErrorKind};
use crate::format::MAX_VALUE;
use crate::keyspace::{Header, Key, KeyValue, LeaseId, Range, Revision};
use tonic_balance::Address;

mod auth;
mod connect;
mod endpoint;
mod error;
mod kv;
mod lease;
mod member_health;
mod members;
mod raw;
mod request_channel;
mod retry;
mod token;
mod watch;

pub(crate) use connect::Config;
pub(crate) use endpoint::MemberEndpoint;
pub(crate) use token::{Credentials, Token};
pub(crate) use watch::Watch;

use auth::Auth;
use member_health::{Failure, Traffic};
use members::{Members, Open};
use request_channel::RequestChannel;
use retry::with_deadline;

/// A handle on an etcd cluster. Cloning is a reference count.
#[derive(Clone, Debug)]
pub(crate) struct Etcd(Arc<Cluster>);

struct Cluster {
    source: Source,
    auth: Auth,
}

/// Where connections come from.
enum Source {
    Members(Members),
    /// A client that the user made, whose connections are its own.
    Given(Arc<Client>),
}

impl Etcd {
    /// Takes the members as they are: connections are made by the first request.
    fn lazy(addresses: Vec<Address>, open: Open, auth: Auth) -> Self {
        let source = Source::Members(Members::new(addresses, open));
        Self(Arc::new(Cluster { source, auth }))
    }

    /// Takes a client that the user made.
    pub(crate) fn from_client(client: Client) -> Self {
        let source = Source::Given(Arc::new(client));
        let auth = Auth::new(None);
        Self(Arc::new(Cluster { source, auth }))
    }

    /// The same cluster over connections of the runtime that it is then used on; a client that the user made stays on its own.
    pub(crate) fn detached(&self) -> Self {
        let source = match &self.0.source {
            Source::Members(members) => Source::Members(members.detached()),
            Source::Given(client) => Source::Given(Arc::clone(client)),
        };
        let auth = self.0.auth.detached();
        Self(Arc::new(Cluster { source, auth }))
    }

    /// The members' addresses as `host:port`; none for a client that the user made.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        let addresses = self.addresses().iter();
        addresses.map(ToString::to_string).collect()
    }

    fn addresses(&self) -> &[Address] {
        match &self.0.source {
            Source::Members(members) => &members.addresses,
            Source::Given(_) => &[],
        }
    }

    /// How many members there are; a client that the user made counts as one.
    pub(crate) fn members(&self) -> usize {
        self.addresses().len().max(1)
    }

    /// Whether the same request may succeed later, or at another member.
    fn may_succeed(&self, error: &EtcdError) -> bool {
        let elsewhere = error.kind() == EtcdErrorKind::Unimplemented && self.members() > 1;
        error.kind().is_transient() || elsewhere
    }

    /// The way of one request.
    async fn channel(
        &self,
        traffic: Traffic,
        deadline: Duration,
    ) -> Result<RequestChannel, EtcdError> {
        match &self.0.source {
            Source::Members(members) => members.channel(traffic, deadline, &self.0.auth).await,
            Source::Given(client) => Ok(RequestChannel::given(client)),
        }
    }

    /// Takes note of how a request, or the stream that it began, has ended.
    fn record_outcome(
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
            // A full store is full at every member.
            Some(EtcdErrorKind::NoSpace) => return,
            Some(_) if error.is_some_and(|error| self.may_succeed(error)) => Failure::Error,
            _ => return members.on_answer(service, traffic),
        };
        members.on_failure(service, traffic, failure);
    }

    /// Fetches a fresh token, unless somebody else has done so since one was `refused`. Says whether there is one to try.
    async fn renew_token(
        &self,
        refused: Option<&Token>,
        deadline: Duration,
    ) -> Result<bool, EtcdError> {
        let deadline = deadline.max(DEADLINE);
        let channel = self.channel(Traffic::Keys, deadline).await?;
        let auth = &self.0.auth;
        let renewal = Box::pin(async {
            match &channel.service {
                Some(service) => auth.refresh(refused, service, deadline).await,
                None => {
                    auth.refresh_client(&channel.client, &channel.endpoint())
                        .await
                }
            }
        });
        // The wait for somebody else's renewal included.
        let outcome = with_deadline("authenticate", deadline, &channel, renewal).await;
        self.record_outcome(&channel, Traffic::Keys, outcome.as_ref().err());
        outcome
    }

    /// Opens a watch on a range; `None` watches from now. Waits for the first message's head, up to 2 s; tried once.
    pub(crate) async fn watch(
        &self,
        range: &Range,
        from: Option<Revision>,
    ) -> Result<Watch, EtcdError> {
        let open = |channel: RequestChannel| watch::open(channel, range.clone(), from);
        self.attempt(Traffic::Keys, "watch", DEADLINE, open).await
    }

    /// Opens a watch from now on each of the keys, over one stream, and waits until all of them are watched, for 2 s each for the first and for
    /// the others. Tried once.
    pub(crate) async fn watch_each(&self, first: &Key, others: &[Key]) -> Result<Watch, EtcdError> {
        let mut watch = self.watch(&Range::key(first), None).await?;
        let channel = watch.channel.clone();
        let all = async {
            for key in others {
                watch.add(Range::key(key)).await?;
            }
            watch.created().await
        };
        match with_deadline("watch", DEADLINE, &channel, Box::pin(all)).await {
            Ok(()) => Ok(watch),
            Err(error) => {
                self.report(&watch, &error);
                Err(error)
            }
        }
    }

    /// Answers a watch's end: if it is the member's fault, the next one goes elsewhere.
    pub(crate) fn report(&self, watch: &Watch, error: &EtcdError) {
        match (&self.0.source, &watch.channel.service) {
            // The watchdog has waited for long enough.
            (Source::Members(members), Some(service))
                if error.kind() == EtcdErrorKind::DeadlineExceeded =>
            {
                members.on_failure(service, Traffic::Keys, Failure::StreamTimeout);
            }
            _ => self.record_outcome(&watch.channel, Traffic::Keys, Some(error)),
        }
    }

    /// The token in use, to be handed to [`Etcd::refused`] if a watch that is opened now is refused later.
    pub(crate) fn token(&self) -> Option<Token> {
        self.0.auth.token()
    }

    /// Answers a refusal that came in a watch's messages: fetches a fresh token, unless somebody else has done so since.
    pub(crate) async fn refused(&self, token: Option<&Token>) -> Result<(), EtcdError> {
        self.renew_token(token, DEADLINE).await.map(drop)
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Cluster");
        match &self.source {
            Source::Members(members) => shown.field("members", &members.addresses),
            Source::Given(_) => shown.field("members", &"(the given client)"),
        };
        shown.field("auth", &self.auth).finish_non_exhaustive()
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
/// The limit on one message: a page of 500 values and a watch's backlog of a thousand revisions, one key each, stay below, a hostile prefix
/// does not get more memory. What is larger is listed, in pages that are halved until they fit.
const MAX_MESSAGE: usize = 16 << 20;

#[cfg(test)]
mod tests;
