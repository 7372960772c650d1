//! etcd, as the tasks see it. The only place that names `etcd_client`.
//!
//! Each member has a client of its own, and one of them is in use: a call that fails there for the member's own fault moves on to the
//! next member, for this call and those after it. One channel balanced over all members would go on handing every third call to the
//! member that is frozen.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::Client;

use crate::error::{EtcdError, EtcdErrorKind};
use crate::format::MAX_VALUE;
use crate::keyspace::{Header, KeyValue, LeaseId, Range, Revision};

mod auth;
mod call;
mod connect;
mod endpoint;
mod error;
mod kv;
mod lease;
mod member;
mod rpc;
mod watch;

pub(crate) use auth::{Credentials, Token};
pub(crate) use connect::Config;
#[cfg(feature = "tls")]
pub(crate) use connect::Tls;
pub(crate) use endpoint::MemberEndpoint;
pub(crate) use watch::Watch;

use auth::Auth;
use call::bounded;
use member::{Link, Member, Open, Traffic};

/// A handle on an etcd cluster. Cloning is a reference count.
#[derive(Clone, Debug)]
pub(crate) struct Etcd(Arc<Cluster>);

struct Cluster {
    members: Vec<Member>,
    /// The index of the member in use.
    current: AtomicUsize,
    auth: Auth,
}

impl Etcd {
    /// Makes the clients without a round trip.
    async fn lazy(members: Vec<(String, Open)>, auth: Auth) -> Result<Self, EtcdError> {
        let mut list = Vec::with_capacity(members.len());
        for (endpoint, open) in members {
            list.push(Member::lazy(endpoint, open, &auth).await?);
        }
        Ok(Self::of_members(list, auth))
    }

    /// Takes a client that the user made.
    pub(crate) fn from_client(client: Client) -> Self {
        Self::of_members(vec![Member::given(client)], Auth::new(None))
    }

    /// The same cluster over connections of the runtime that this is called on.
    pub(crate) async fn apart(&self) -> Result<Self, EtcdError> {
        let mut members = Vec::with_capacity(self.members());
        for member in &self.0.members {
            members.push(member.apart(&self.0.auth).await?);
        }
        Ok(Self::of_members(members, self.0.auth.clone()))
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
        let members = self.0.members.iter().filter(|member| !member.is_given());
        members.map(|member| member.endpoint.to_string()).collect()
    }

    /// The member that the next request goes to.
    #[cfg(test)]
    pub(crate) fn endpoint_in_use(&self) -> String {
        let member = self.member("test");
        member.map_or_else(|_| String::new(), |(_, member)| member.endpoint.to_string())
    }

    pub(crate) fn members(&self) -> usize {
        self.0.members.len()
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
        link: &Link,
        refused: Option<&Token>,
        deadline: Duration,
    ) -> Result<bool, EtcdError> {
        let deadline = deadline.max(DEADLINE);
        let renewal = async {
            match &link.service {
                Some(service) => {
                    self.0
                        .auth
                        .refresh(refused, service, &link.endpoint, deadline)
                        .await
                }
                None => {
                    self.0
                        .auth
                        .refresh_client(&link.client, &link.endpoint)
                        .await
                }
            }
        };
        // The wait for somebody else's renewal included.
        bounded("authenticate", deadline, link, renewal).await
    }

    /// Opens a watch on a range; `None` watches from now. Waits for the first message's head, up to 2 s; tried once.
    pub(crate) async fn watch(
        &self,
        range: &Range,
        from: Option<Revision>,
    ) -> Result<Watch, EtcdError> {
        let open = |link: Link| watch::open(link.client, link.endpoint, range.clone(), from);
        self.attempt(Traffic::Keys, "watch", DEADLINE, open).await
    }

    /// Answers a watch's end for the member's fault: the next one goes elsewhere.
    pub(crate) fn report(&self, error: &EtcdError) {
        let mut members = self.0.members.iter();
        if let Some(index) = members.position(|member| *member.endpoint == *error.endpoint()) {
            if error.kind() == EtcdErrorKind::DeadlineExceeded {
                // The watchdog has waited for long enough for both.
                self.0.members[index].link(Traffic::Keys).replace();
            }
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
        self.renew_token(member.link(Traffic::Keys), token, DEADLINE)
            .await
            .map(drop)
    }
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
/// The limit on one message: a page of 500 values and a watch's fragments stay far below, a hostile prefix does not get more memory.
const MAX_MESSAGE: usize = 16 << 20;

#[cfg(test)]
mod tests;
