//! Where a call has been, and where it goes next.

use std::sync::Arc;

use tonic::Status;

use crate::address::Address;
use crate::balance::{Endpoint, Look, Member, Pick, Summary, Ticket};
use crate::channel::{Core, Route, status};

/// Where a call has been: without being processed in this attempt, and at all in earlier ones.
#[derive(Default)]
pub(in crate::channel) struct Tried {
    endpoints: Vec<Arc<Endpoint>>,
    connections: Vec<Arc<Member>>,
    last: Option<Failure>,
    /// Endpoints of attempts before this one, or beside it, the latest last. They are used again only where no other is ready.
    avoided: Vec<Address>,
    /// Where the call goes is told to whoever asked for it.
    route: Option<Route>,
}

/// How a try ended.
struct Failure {
    address: Address,
    error: h2::Error,
}

impl Tried {
    /// For a call with wishes of its own.
    pub(in crate::channel) fn by(route: Route, given_up: Vec<Arc<Member>>) -> Self {
        Self {
            connections: given_up,
            avoided: route.avoided().to_vec(),
            route: Some(route),
            ..Self::default()
        }
    }

    /// The call goes there now.
    pub(super) fn on_placed(&self, ticket: &Ticket) {
        if let Some(route) = &self.route {
            route.set_member(ticket.member());
        }
    }

    /// Notes a connection that took no more streams when the call came: nothing against its endpoint.
    pub(in crate::channel) fn add_gone(&mut self, ticket: &Ticket, error: h2::Error) {
        self.connections.push(Arc::clone(ticket.member()));
        self.last = Some(Failure {
            address: ticket.endpoint().address().clone(),
            error,
        });
    }

    /// Notes an endpoint that has refused the call after it was sent.
    pub(super) fn add_refused(&mut self, ticket: &Ticket, error: h2::Error) {
        self.endpoints.push(Arc::clone(ticket.endpoint()));
        self.add_gone(ticket, error);
    }

    /// Notes an endpoint that is to be used for another attempt only where no other is ready.
    pub(super) fn avoid(&mut self, endpoint: &Endpoint) {
        self.avoided.push(endpoint.address().clone());
    }

    /// Begins another attempt. What has refused the last one is not forgotten, but not ruled out any more.
    pub(super) fn next_attempt(&mut self, failed: Option<&Arc<Endpoint>>) {
        let refused = std::mem::take(&mut self.endpoints);
        let left = refused.iter().chain(failed);
        let left = left.map(|endpoint| endpoint.address().clone());
        self.avoided.extend(left);
        self.connections.clear();
        self.last = None;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    pub(super) fn is_exhausted(&self) -> bool {
        self.endpoints.len() > REPLAYS
    }

    /// Whether the connection that was tried last stays in the ready set, so that waiting for the next set is in vain.
    pub(super) fn is_refusal_final(&self) -> bool {
        self.last.as_ref().is_some_and(|last| last.error.is_reset())
    }

    pub(super) fn pick(&self, look: &Look<'_>) -> Pick<Ticket> {
        if !self.avoided.is_empty() {
            let last = self.avoided.last();
            let is_last =
                |member: &Arc<Member>| last.is_some_and(|last| last == member.endpoint().address());
            match self.pick_new(look) {
                Pick::Excluded => {}
                pick => return pick,
            }
            match look.pick(|member| self.is_open(member) && !is_last(member)) {
                Pick::Excluded => {}
                pick => return pick,
            }
        }
        let Summary {
            endpoints, pending, ..
        } = *look.summary();
        match look.pick(|member| self.is_open(member)) {
            // Where every endpoint has been tried, but for those that cannot be reached, another connection to one of them is another server
            // more often than not.
            Pick::Excluded if self.endpoints.len() >= endpoints || pending == 0 => {
                look.pick(|member| self.is_untried(member))
            }
            pick => pick,
        }
    }

    /// Picks an endpoint that the call has not been to in any attempt.
    pub(super) fn pick_new(&self, look: &Look<'_>) -> Pick<Ticket> {
        let avoided = |member: &Arc<Member>| self.avoided.contains(member.endpoint().address());
        look.pick(|member| self.is_open(member) && !avoided(member))
    }

    /// Whether neither the connection nor its endpoint was tried in this attempt.
    fn is_open(&self, member: &Arc<Member>) -> bool {
        self.is_untried(member) && !self.endpoints.iter().any(|tried| is_at(tried, member))
    }

    fn is_untried(&self, member: &Arc<Member>) -> bool {
        let mut tried = self.connections.iter();
        !tried.any(|tried| Arc::ptr_eq(tried, member))
    }

    /// What the caller is told if there is no way on. Asked once.
    pub(super) fn take_status(&mut self, core: &Core, summary: &Summary, why: &str) -> Status {
        match self.last.take() {
            Some(Failure { address, error }) => status::broken(&core.service, &address, error),
            None => status::unready(core, summary, why),
        }
    }
}

/// Whether a connection is to this endpoint, or to one of the same address that has been registered anew.
fn is_at(endpoint: &Endpoint, member: &Member) -> bool {
    endpoint.address() == member.endpoint().address()
}

/// How often a call is sent again at most.
const REPLAYS: usize = 3;
