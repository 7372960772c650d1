//! The members of a cluster: two channels over all members, and their failure records.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::auth::Auth;
use super::member_health::{Failure, MemberHealth, Traffic};
use super::request_channel::{RequestChannel, RequestService};
use crate::error::EtcdError;
use tonic_balance::Address;
use tonic_balance::{BalancedChannel, channel::Routing};

/// Opens a channel over all members.
pub(super) type OpenChannel = Arc<dyn Fn() -> BalancedChannel + Send + Sync>;

/// The members and the connections to them. Lease requests have a separate channel, so that a renewal never waits behind unread watch
/// messages or behind a list of ten thousand keys.
pub(super) struct Members {
    pub(super) addresses: Vec<Address>,
    open: OpenChannel,
    /// Each channel is opened by its first request, so that a client that registers nothing has no connections for leases.
    keys: Mutex<Option<BalancedChannel>>,
    leases: Mutex<Option<BalancedChannel>>,
    health: Mutex<MemberHealth>,
}

impl Members {
    pub(super) fn new(mut addresses: Vec<Address>, open: OpenChannel) -> Self {
        addresses.sort();
        addresses.dedup();
        Self {
            addresses,
            open,
            keys: Mutex::default(),
            leases: Mutex::default(),
            health: Mutex::default(),
        }
    }

    /// Returns the same members without connections. The first request opens new connections on its own runtime.
    pub(super) fn detached(&self) -> Self {
        Self::new(self.addresses.clone(), Arc::clone(&self.open))
    }

    /// Returns a channel for one request. The channel uses members with recent failures only if no other member is ready.
    pub(super) async fn channel(
        &self,
        traffic: Traffic,
        deadline: Duration,
        auth: &Auth,
    ) -> Result<RequestChannel, EtcdError> {
        let channel = match traffic {
            Traffic::Keys => &self.keys,
            Traffic::Leases => &self.leases,
        };
        let mut avoided = self.health().avoided(Instant::now());
        if let Some(issuer) = auth.new_issuer() {
            // Other members may not have received the token yet, so this request avoids them as well. The members with recent failures stay
            // at the end of the list, so they are chosen last.
            let others = self.addresses.iter().filter(|member| **member != issuer);
            let well = others.filter(|member| !avoided.contains(member)).cloned();
            avoided = well.chain(avoided.iter().cloned()).collect();
        }
        let service = RequestService {
            channel: self.current(channel),
            routing: Routing::avoiding(avoided),
            deadline,
            token: auth.cell().clone(),
        };
        // Boxed because the futures of `etcd-client` are large.
        Box::pin(RequestChannel::over(service)).await
    }

    /// Returns the open channel. Opens a new channel if there is none, or if the runtime of the channel has ended, because a registry may
    /// outlive the runtime of its first request.
    fn current(&self, channel: &Mutex<Option<BalancedChannel>>) -> BalancedChannel {
        let mut channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
        match &*channel {
            Some(open) if !open.is_closed() => open.clone(),
            _ => channel.insert((self.open)()).clone(),
        }
    }

    /// Records that the member that received the request has responded. An error counts as a response if other members would return it as
    /// well.
    pub(super) fn on_answer(&self, service: &RequestService, traffic: Traffic) {
        if let Some(member) = service.routing.address() {
            self.health().on_answer(&member, traffic);
        }
    }

    /// Records that a request, or the stream that it opened, has failed on the member that received the request. Later requests avoid that
    /// member. Does nothing if the request was not sent.
    pub(super) fn on_failure(&self, service: &RequestService, traffic: Traffic, failure: Failure) {
        let Some(member) = service.routing.address() else {
            return;
        };
        let now = Instant::now();
        let (news, must_reconnect) = {
            let mut health = self.health();
            let news = !health.avoided(now).contains(&member);
            (news, health.on_failure(&member, traffic, failure, now))
        };
        if news && self.addresses.len() > 1 {
            tracing::info!(%member, ?failure, "a request or a watch failed on an etcd member; other members are preferred");
        }
        let since = now.checked_sub(service.deadline).unwrap_or(now);
        let silent_since = (failure != Failure::Error).then_some(since);
        service.routing.report_failure(now, silent_since);
        if must_reconnect {
            tracing::debug!(%member, ?traffic, "etcd does not respond on a connection; the next request uses a new connection");
            service.channel.reconnect(&service.routing);
        }
    }

    fn health(&self) -> MutexGuard<'_, MemberHealth> {
        // No code panics while the lock is held, and the data would be consistent even then.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
