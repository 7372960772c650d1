//! A call's own way through a channel: endpoints that it avoids, and where it went. For the library's own traffic to etcd, which knows more
//! of a member than its connection shows.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::Request;
use tokio::time::Instant;
use tonic::body::Body;

use super::{BalancedChannel, ResponseFuture};
use crate::address::Address;
use crate::balance::Member;

/// The way of one call. Clones share where it went.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    avoided: Arc<[Address]>,
    /// The connection that the call was sent on last.
    member: Arc<Mutex<Option<Arc<Member>>>>,
}

impl Route {
    /// Goes to these endpoints only where no other is ready, and to the last of them last.
    pub(crate) fn avoiding(endpoints: impl Into<Arc<[Address]>>) -> Self {
        Self {
            avoided: endpoints.into(),
            member: Arc::default(),
        }
    }

    pub(super) fn avoided(&self) -> &[Address] {
        &self.avoided
    }

    pub(super) fn set_member(&self, member: &Arc<Member>) {
        *self.lock() = Some(Arc::clone(member));
    }

    /// The endpoint that the call was sent to; none if it never got so far.
    pub(crate) fn address(&self) -> Option<Address> {
        let member = self.lock();
        member
            .as_ref()
            .map(|member| member.endpoint().address().clone())
    }

    /// The endpoint has failed the call, or a stream that it began, in a way that the connection cannot see: that counts as a failure. With
    /// a time since when it was to answer, a PING will tell whether it is there at all.
    pub(crate) fn complain(&self, now: Instant, silent_since: Option<Instant>) {
        if let Some(member) = &*self.lock() {
            member.on_complaint(now, silent_since);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Member>>> {
        // Nothing panics while it is held.
        self.member.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BalancedChannel {
    /// Makes a call by a route.
    pub(crate) fn call_by(&self, route: &Route, request: Request<Body>) -> ResponseFuture {
        ResponseFuture::by(Arc::clone(&self.0), request, route.clone())
    }

    /// Leaves the connection that a call went over for a new one to the same endpoint. What is open on it goes on; no further call by a
    /// route gets there, from now on.
    pub(crate) fn give_up(&self, route: &Route) {
        if let Some(member) = &*route.lock() {
            self.0.shared().give_up(member);
        }
    }

    /// Whether the channel makes no calls any more, because its runtime has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.0.shared().has_ended()
    }

    /// What happened to a connection last, and at which endpoint.
    pub(crate) fn last_failure(&self) -> Option<Address> {
        let summary = self.0.shared().summary();
        summary.last_error.map(|error| error.address.clone())
    }
}
