//! Per-call routing: endpoints that a call avoids, and the endpoint that it was sent to.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::address::Address;
use crate::balance::Member;

/// Routes one call: names endpoints to avoid, and reports the endpoint that the call was sent to.
///
/// It is for callers that know more about an endpoint than its connections show, for example that it has lost its quorum. Make one for each
/// call, and pass it to [`BalancedChannel::call_routed`](crate::BalancedChannel::call_routed). Clones share the result.
#[derive(Clone, Debug)]
pub struct Routing {
    avoided: Arc<[Address]>,
    /// The connection that the call was sent on last.
    member: Arc<Mutex<Option<Arc<Member>>>>,
}

impl Routing {
    /// Uses these endpoints only if no other is ready, the last of them last.
    #[must_use]
    pub fn avoiding(endpoints: impl Into<Arc<[Address]>>) -> Self {
        Self {
            avoided: endpoints.into(),
            member: Arc::default(),
        }
    }

    pub(crate) fn avoided(&self) -> &[Address] {
        &self.avoided
    }

    pub(crate) fn set_member(&self, member: &Arc<Member>) {
        *self.lock() = Some(Arc::clone(member));
    }

    /// Returns the endpoint that the call was last sent to; `None` if it was not sent.
    #[must_use]
    pub fn address(&self) -> Option<Address> {
        let member = self.lock();
        member
            .as_ref()
            .map(|member| member.endpoint().address().clone())
    }

    /// Counts a failure against the endpoint, of the call or of a stream that it opened, that its connection does not show.
    ///
    /// With `silent_since`, the time since which an answer was overdue, a PING checks the connection unless something was read since.
    pub fn report_failure(&self, now: Instant, silent_since: Option<Instant>) {
        if let Some(member) = &*self.lock() {
            member.on_complaint(now, silent_since);
        }
    }

    pub(crate) fn member(&self) -> Option<Arc<Member>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Member>>> {
        // Nothing panics while it is held.
        self.member.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
