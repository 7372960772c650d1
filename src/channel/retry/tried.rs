//! Where a call has been, and where it goes next.

use std::sync::Arc;

use tonic::Status;

use crate::address::Address;
use crate::balance::{Endpoint, Member, Pick, Summary, Ticket};
use crate::channel::{Core, status};

/// Where a call has been without being processed.
#[derive(Default)]
pub(in crate::channel) struct Tried {
    endpoints: Vec<Arc<Endpoint>>,
    connections: Vec<Arc<Member>>,
    last: Option<Failure>,
}

/// How a try ended.
struct Failure {
    address: Address,
    error: h2::Error,
}

impl Tried {
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

    pub(super) fn pick(&self, core: &Core, summary: &Summary) -> Pick<Ticket> {
        let shared = core.shared();
        let not_tried = |member: &Arc<Member>| {
            !self
                .connections
                .iter()
                .any(|tried| Arc::ptr_eq(tried, member))
        };
        let elsewhere = |member: &Arc<Member>| {
            not_tried(member)
                && !self
                    .endpoints
                    .iter()
                    .any(|tried| tried.address() == member.endpoint().address())
        };
        match shared.pick(elsewhere) {
            // Where every endpoint has been tried, another connection to one of them is another server more often than not.
            Pick::Excluded if self.endpoints.len() >= summary.endpoints => shared.pick(not_tried),
            pick => pick,
        }
    }

    pub(super) fn into_status(self, core: &Core, summary: &Summary, why: &str) -> Status {
        match self.last {
            Some(Failure { address, error }) => status::broken(&core.service, &address, error),
            None => status::unready(core, summary, why),
        }
    }
}

/// How often a call is sent again at most.
const REPLAYS: usize = 3;
