//! All subchannels of a channel, each in one of its states.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;

use crate::address::Address;
use crate::balance::endpoint_status::EndpointState;
use crate::balance::health_status::Health;
use crate::balance::ready_connection::ReadyConnection;
use crate::balance::subchannel::{Connecting, Idle, Ready, Resting, Subchannel, TransientFailure};

/// The number of a subchannel. Numbers are never reused.
pub(super) type SubchannelId = u64;

/// The number of a dial, and of the connection that the dial makes.
pub(super) type DialId = u64;

/// A subchannel in any of its states.
#[derive(Debug)]
pub(super) enum State {
    Idle(Subchannel<Idle>),
    Connecting(Subchannel<Connecting>),
    Ready(Subchannel<Ready>),
    Resting(Subchannel<Resting>),
    TransientFailure(Subchannel<TransientFailure>),
}

/// The class of an endpoint in the summary. An endpoint is pending if it is neither ready nor failing, and may become ready at any moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Ready,
    Pending,
    Failing,
}

/// The table of subchannels. They are stored here and not in the entry of their endpoint, so that a transition can take the old state out
/// of the table and insert the new one.
#[derive(Debug, Default)]
pub(super) struct Subchannels {
    states: HashMap<SubchannelId, (Address, State)>,
    /// The subchannel of each connection.
    connections: HashMap<DialId, SubchannelId>,
    last_id: u64,
}

impl Subchannels {
    /// Returns a new number for a subchannel or a dial.
    pub(super) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    pub(super) fn insert(&mut self, id: SubchannelId, address: Address, state: State) {
        self.states.insert(id, (address, state));
    }

    /// Takes a subchannel out of the table, for a transition.
    pub(super) fn take(&mut self, id: SubchannelId) -> Option<(Address, State)> {
        self.states.remove(&id)
    }

    /// Removes a subchannel, and returns it if it is ready. Dropping a subchannel in any other state stops its dial or its wait.
    pub(super) fn remove(&mut self, id: SubchannelId) -> Option<Subchannel<Ready>> {
        match self.states.remove(&id)? {
            (_, State::Ready(subchannel)) => Some(subchannel),
            _ => None,
        }
    }

    pub(super) fn ids(&self) -> Vec<SubchannelId> {
        self.states.keys().copied().collect()
    }

    /// Returns a subchannel and its address if the subchannel is ready.
    pub(super) fn ready(&self, id: SubchannelId) -> Option<(&Address, &Subchannel<Ready>)> {
        match self.states.get(&id)? {
            (address, State::Ready(subchannel)) => Some((address, subchannel)),
            _ => None,
        }
    }

    /// Returns the connections of all subchannels, each with its subchannel.
    pub(super) fn connected(&self) -> Vec<(DialId, SubchannelId)> {
        let connections = self.connections.iter();
        connections.map(|(dial_id, id)| (*dial_id, *id)).collect()
    }

    /// Records that a dial has made the connection of a subchannel.
    pub(super) fn on_connected(&mut self, dial_id: DialId, id: SubchannelId) {
        self.connections.insert(dial_id, id);
    }

    /// Returns the ready subchannel of a connection. Returns `None` for a connection that was removed or replaced.
    pub(super) fn of_connection(
        &mut self,
        dial_id: DialId,
    ) -> Option<(SubchannelId, &Address, &mut Subchannel<Ready>)> {
        let id = *self.connections.get(&dial_id)?;
        match self.states.get_mut(&id)? {
            (address, State::Ready(subchannel)) => Some((id, address, subchannel)),
            _ => None,
        }
    }

    /// Removes the subchannel of an ended connection from the table, and returns it. Returns `None` for a connection that was removed or
    /// replaced.
    pub(super) fn take_closed(
        &mut self,
        dial_id: DialId,
    ) -> Option<(SubchannelId, Address, Subchannel<Ready>)> {
        let id = self.connections.remove(&dial_id)?;
        match self.states.remove(&id)? {
            (address, State::Ready(subchannel)) => Some((id, address, subchannel)),
            _ => None,
        }
    }

    /// Forgets the connection of a subchannel, so that later events of the connection are ignored.
    pub(super) fn forget_connection(&mut self, id: SubchannelId) {
        self.connections.retain(|_, connected| *connected != id);
    }

    /// Returns the subchannel in `ids` that has this connection.
    pub(super) fn find(
        &self,
        ids: &[SubchannelId],
        connection: &Arc<ReadyConnection>,
    ) -> Option<SubchannelId> {
        let is_same = |id: &SubchannelId| {
            let ready = self.ready(*id);
            ready.is_some_and(|(_, ready)| Arc::ptr_eq(ready.connection(), connection))
        };
        ids.iter().copied().find(is_same)
    }

    /// Returns whether the subchannel is idle after a failed attempt.
    pub(super) fn is_failing(&self, id: SubchannelId) -> bool {
        matches!(self.states.get(&id), Some((_, State::Idle(idle))) if idle.is_failing())
    }

    /// Returns whether the subchannel is silent: it is connected, but nothing was read from the peer in time.
    pub(super) fn is_silent(&self, id: SubchannelId) -> bool {
        self.ready(id).is_some_and(|(_, ready)| ready.is_silent())
    }

    /// Returns whether the subchannel is connected, but the peer has left a PING unanswered.
    pub(super) fn is_stalled(&self, id: SubchannelId) -> bool {
        self.ready(id).is_some_and(|(_, ready)| ready.is_stalled())
    }

    /// Returns whether all these subchannels are ready, and every stream of their connections is in use.
    pub(super) fn are_full(&self, ids: &[SubchannelId]) -> bool {
        ids.iter().all(|id| {
            let ready = self.ready(*id);
            ready.is_some_and(|(_, ready)| ready.connection().is_full())
        })
    }

    /// Returns whether the last of the ready subchannels in `ids` can be removed: the calls in flight on all ready subchannels would use at
    /// most half of the streams of the remaining ones.
    pub(super) fn can_spare_one(&self, ids: &[SubchannelId]) -> bool {
        let (mut in_flight, mut room) = (0_usize, Vec::new());
        for (_, ready) in ids.iter().filter_map(|id| self.ready(*id)) {
            let load = ready.connection().load();
            in_flight += load.in_flight() as usize;
            room.push(load.limit());
        }
        room.pop();
        let room = room.into_iter().fold(0, usize::saturating_add);
        in_flight.saturating_mul(2) <= room
    }

    /// Returns the time of the next dial of an endpoint with these subchannels, and the number of consecutive dials that have failed. There
    /// is no such time while a subchannel is connected or is being dialled, and if none is waiting.
    pub(super) fn attempts(&self, ids: &[SubchannelId]) -> (Option<Instant>, usize) {
        let (mut next, mut failed, mut is_open) = (None::<Instant>, 0, false);
        for (_, state) in ids.iter().filter_map(|id| self.states.get(id)) {
            let until = match state {
                State::Resting(resting) => Some(resting.until()),
                State::TransientFailure(failure) => Some(failure.until()),
                State::Connecting(_) | State::Ready(_) => {
                    is_open = true;
                    None
                }
                State::Idle(_) => None,
            };
            next = match (next, until) {
                (Some(next), Some(until)) => Some(next.min(until)),
                (next, until) => next.or(until),
            };
            failed = failed.max(state.failed_attempts());
        }
        (next.filter(|_| !is_open), failed)
    }

    /// Returns the class and the state of an endpoint with these subchannels. If a subchannel is of the class `Ready`, it determines both.
    /// Otherwise the first subchannel that is not of the class `Failing` determines them. If all are failing, the last one does.
    pub(super) fn classify(
        &self,
        ids: &[SubchannelId],
        is_last_resort: bool,
    ) -> (Class, EndpointState) {
        let mut of_endpoint = (Class::Failing, EndpointState::Idle);
        for (_, state) in ids.iter().filter_map(|id| self.states.get(id)) {
            let of_subchannel = state.classify(is_last_resort);
            if of_endpoint.0 == Class::Failing || of_subchannel.0 == Class::Ready {
                of_endpoint = of_subchannel;
            }
        }
        of_endpoint
    }
}

impl State {
    fn failed_attempts(&self) -> usize {
        match self {
            Self::Idle(subchannel) => subchannel.failed_attempts(),
            Self::Connecting(subchannel) => subchannel.failed_attempts(),
            Self::Ready(subchannel) => subchannel.failed_attempts(),
            Self::Resting(subchannel) => subchannel.failed_attempts(),
            Self::TransientFailure(subchannel) => subchannel.failed_attempts(),
        }
    }

    fn classify(&self, is_last_resort: bool) -> (Class, EndpointState) {
        match self {
            Self::Ready(ready) if ready.is_stalled() => {
                (Class::Failing, EndpointState::TransientFailure)
            }
            Self::Ready(ready) => match ready.health() {
                Health::Serving => (Class::Ready, EndpointState::Ready),
                Health::Unknown => (Class::Pending, EndpointState::Connecting),
                Health::NotServing(_) => (Class::Failing, EndpointState::TransientFailure),
            },
            Self::Connecting(connecting) if connecting.is_failing() => {
                (Class::Failing, EndpointState::Connecting)
            }
            Self::Connecting(_) => (Class::Pending, EndpointState::Connecting),
            Self::Idle(idle) if idle.is_failing() || is_last_resort => {
                (Class::Failing, EndpointState::Idle)
            }
            // A resting subchannel is dialled when a call waits, so it counts as pending.
            Self::Idle(_) | Self::Resting(_) => (Class::Pending, EndpointState::Idle),
            Self::TransientFailure(_) => (Class::Failing, EndpointState::TransientFailure),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::balance::connect_backoff::ConnectBackoff;

    fn idle() -> Subchannel<Idle> {
        Subchannel::new(ConnectBackoff::new(Duration::from_secs(120)))
    }

    fn connecting(idle: Subchannel<Idle>) -> Subchannel<Connecting> {
        idle.connect(tokio::spawn(async {}).abort_handle(), Instant::now())
    }

    fn failed(idle: Subchannel<Idle>) -> Subchannel<TransientFailure> {
        let mut rng = fastrand::Rng::with_seed(7);
        connecting(idle).failed(&mut rng, Instant::now())
    }

    fn table(states: impl IntoIterator<Item = State>) -> (Subchannels, Vec<SubchannelId>) {
        let address: Address = "10.0.0.5:80".parse().expect("a valid address");
        let (mut table, mut ids) = (Subchannels::default(), Vec::new());
        for state in states {
            let id = table.next_id();
            table.insert(id, address.clone(), state);
            ids.push(id);
        }
        (table, ids)
    }

    #[tokio::test]
    async fn an_endpoint_is_pending_until_its_first_attempt_has_failed() {
        let again = || connecting(failed(idle()).retry());
        for (state, class, shown) in [
            (State::Idle(idle()), Class::Pending, EndpointState::Idle),
            (
                State::Connecting(connecting(idle())),
                Class::Pending,
                EndpointState::Connecting,
            ),
            (
                State::TransientFailure(failed(idle())),
                Class::Failing,
                EndpointState::TransientFailure,
            ),
            (
                State::Idle(failed(idle()).retry()),
                Class::Failing,
                EndpointState::Idle,
            ),
            (
                State::Connecting(again()),
                Class::Failing,
                EndpointState::Connecting,
            ),
        ] {
            let (table, ids) = table([state]);
            assert_eq!(table.classify(&ids, false), (class, shown));
        }
    }

    #[tokio::test]
    async fn a_last_resort_that_is_not_connected_is_not_pending() {
        let (table, ids) = table([State::Idle(idle())]);
        let (class, _) = table.classify(&ids, true);
        assert_eq!(class, Class::Failing);
    }

    #[tokio::test]
    async fn one_pending_subchannel_makes_its_endpoint_pending() {
        let failed = State::TransientFailure(failed(idle()));
        let (table, ids) = table([failed, State::Idle(idle())]);
        let (class, _) = table.classify(&ids, false);
        assert_eq!(class, Class::Pending);
        let (class, _) = table.classify(&ids[..1], false);
        assert_eq!(class, Class::Failing);
        assert_eq!(
            table.classify(&[], false).0,
            Class::Failing,
            "an endpoint without subchannels must be failing"
        );
    }

    #[tokio::test]
    async fn the_next_attempt_is_the_earliest_unless_a_dial_is_under_way() {
        let now = Instant::now();
        let (first, second) = (failed(idle()), failed(failed(idle()).retry()));
        let earliest = first.until().min(second.until());
        assert!(earliest > now, "the backoff must have begun");
        let states = [first, second].map(State::TransientFailure);
        let (table, ids) = table(states.into_iter().chain([State::Idle(idle())]));
        assert_eq!(table.attempts(&ids), (Some(earliest), 2));
        assert_eq!(table.attempts(&ids[2..]), (None, 0));

        let again = connecting(failed(idle()).retry());
        let states = [
            State::TransientFailure(failed(idle())),
            State::Connecting(again),
        ];
        let (table, ids) = self::table(states);
        assert_eq!(table.attempts(&ids), (None, 1));
    }

    #[tokio::test]
    async fn a_connection_that_is_not_ready_is_not_found_and_a_forgotten_one_is_not_taken() {
        let (mut table, ids) = table([State::Idle(idle())]);
        table.on_connected(11, ids[0]);
        assert!(
            table.of_connection(11).is_none(),
            "a subchannel that is not ready must not be found"
        );
        table.forget_connection(ids[0]);
        assert!(table.take_closed(11).is_none());
        assert!(table.take(ids[0]).is_some(), "the entry must stay");
    }
}
