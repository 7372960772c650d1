//! The second connection of an endpoint.
//!
//! A connection is silent if nothing was read on it for a while. Silence does not show that the server is down: a middlebox may have
//! dropped the flow, or the address may lead to several servers. So a second connection is dialled beside the silent one, and the first of
//! the two connections that answers is used.

use std::time::Duration;

use tokio::time::Instant;

use super::subchannel_table::SubchannelId;
use crate::balance::connect_backoff::ConnectBackoff;

/// The second connection of an endpoint, and the backoff between dials of second connections.
#[derive(Debug)]
pub(super) struct SecondConnection {
    subchannel: Option<SubchannelId>,
    backoff: ConnectBackoff,
    /// The earliest time of the next dial.
    not_before: Option<Instant>,
}

impl SecondConnection {
    pub(super) fn new(max_backoff: Duration) -> Self {
        Self {
            subchannel: None,
            backoff: ConnectBackoff::new(max_backoff),
            not_before: None,
        }
    }

    /// Ends the backoff, so that another second connection can be dialled at once.
    pub(super) fn reset_backoff(&mut self) {
        self.backoff.reset();
        self.not_before = None;
    }

    /// Returns the subchannel of the second connection, if there is one.
    pub(super) fn subchannel(&self) -> Option<SubchannelId> {
        self.subchannel
    }

    /// Returns whether there is no second connection and the backoff is over.
    pub(super) fn may_dial(&self, now: Instant) -> bool {
        self.subchannel.is_none() && self.not_before.is_none_or(|at| at <= now)
    }

    /// Starts the backoff before the next dial.
    pub(super) fn on_dial(&mut self, now: Instant, rng: &mut fastrand::Rng) {
        self.not_before = Some(now + self.backoff.next(rng));
    }

    pub(super) fn set(&mut self, subchannel: Option<SubchannelId>) {
        self.subchannel = subchannel;
    }

    /// Forgets which subchannel is the second connection, and returns this subchannel.
    pub(super) fn take(&mut self) -> Option<SubchannelId> {
        self.subchannel.take()
    }

    /// If `id` is the subchannel of the second connection, forgets that role and returns true.
    pub(super) fn take_if(&mut self, id: SubchannelId) -> bool {
        self.subchannel.take_if(|second| *second == id).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_connections_are_dialled_one_at_a_time_and_with_a_backoff() {
        let mut rng = fastrand::Rng::with_seed(7);
        let now = Instant::now();
        let mut second = SecondConnection::new(Duration::from_secs(120));
        assert!(second.may_dial(now));
        second.on_dial(now, &mut rng);
        second.set(Some(7));
        let later = now + Duration::from_secs(2);
        assert!(!second.may_dial(later), "must not dial while one exists");
        assert!(!second.take_if(8));
        assert!(second.take_if(7));
        assert!(!second.may_dial(now), "a dial must wait for the backoff");
        assert!(second.may_dial(later));
        second.on_dial(now, &mut rng);
        second.reset_backoff();
        assert!(second.may_dial(now));
    }
}
