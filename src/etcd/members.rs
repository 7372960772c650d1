//! The members of a cluster: two channels over all of them, and how they stand.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::auth::Auth;
use super::member_health::{Failure, MemberHealth, Traffic};
use super::request_channel::{RequestChannel, RequestService};
use crate::error::EtcdError;
use tonic_balance::Address;
use tonic_balance::{BalancedChannel, Routing};

/// Opens a channel over all members.
pub(super) type Open = Arc<dyn Fn() -> BalancedChannel + Send + Sync>;

/// The members, and our connections to them. What keeps leases alive has its own: whatever happens on the others, watches that nobody reads
/// or a list of ten thousand keys, a renewal does not wait behind it.
pub(super) struct Members {
    pub(super) addresses: Vec<Address>,
    open: Open,
    /// Opened by their first request: a client that registers nothing has no lease, and needs no connections for any.
    keys: Mutex<Option<BalancedChannel>>,
    leases: Mutex<Option<BalancedChannel>>,
    health: Mutex<MemberHealth>,
}

impl Members {
    pub(super) fn new(mut addresses: Vec<Address>, open: Open) -> Self {
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

    /// The same members over connections of the runtime that they are first used on.
    pub(super) fn detached(&self) -> Self {
        Self::new(self.addresses.clone(), Arc::clone(&self.open))
    }

    /// The way of one request.
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
            // Nobody else may know of the token yet. Who has failed stays behind those that have not.
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
        // Boxed, for `etcd-client`'s futures are large.
        Box::pin(RequestChannel::over(service)).await
    }

    /// The channel of this runtime. One whose runtime has ended is opened anew: a registry may outlive the runtime that has used it first.
    fn current(&self, channel: &Mutex<Option<BalancedChannel>>) -> BalancedChannel {
        let mut channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
        match &*channel {
            Some(open) if !open.is_closed() => open.clone(),
            _ => channel.insert((self.open)()).clone(),
        }
    }

    /// The member that a request went to has answered it.
    pub(super) fn on_answer(&self, service: &RequestService, traffic: Traffic) {
        if let Some(member) = service.routing.address() {
            self.health().on_answer(&member, traffic);
        }
    }

    /// The member that a request went to has failed it, or the stream that it began: the next one goes elsewhere. One that went nowhere is
    /// nobody's fault.
    pub(super) fn on_failure(&self, service: &RequestService, traffic: Traffic, failure: Failure) {
        let Some(member) = service.routing.address() else {
            return;
        };
        let now = Instant::now();
        let (news, give_up) = {
            let mut health = self.health();
            let news = !health.avoided(now).contains(&member);
            (news, health.on_failure(&member, traffic, failure, now))
        };
        if news && self.addresses.len() > 1 {
            tracing::info!(%member, ?failure, "an etcd member has failed a request or a watch: others are asked first");
        }
        let since = now.checked_sub(service.deadline).unwrap_or(now);
        let silent_since = (failure != Failure::Error).then_some(since);
        service.routing.report_failure(now, silent_since);
        if give_up {
            tracing::debug!(%member, ?traffic, "etcd is silent on a connection; the next request goes over another");
            service.channel.reconnect(&service.routing);
        }
    }

    fn health(&self) -> MutexGuard<'_, MemberHealth> {
        // Nothing panics while it is held; and the data would be whole even then.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
