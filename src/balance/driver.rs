//! The driver: the one task that dials, loses and retires connections, and says which are ready.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_stream::Stream;
use tower::discover::Change;

use super::endpoint::{Endpoint, EndpointState, Member};
use super::feed::{Batch, Feed};
use super::load::{Load, Ticks, median};
use super::pool::Roster;
use super::subchannel::{
    ConnectBackoff, Connecting, Draining, Idle, Lost, Ready, Subchannel, TransientFailure,
};
use super::{EndpointError, Options, Published, Shared, Summary};
use crate::address::Address;
use crate::instance::Instance;
use crate::transport::connect::{Connector, DialError};
use crate::transport::http2::{Connection, Leave};

/// A subchannel's number, never used twice.
type SubchannelId = u64;

/// A subchannel in whichever state.
#[derive(Debug)]
enum State {
    Idle(Subchannel<Idle>),
    Connecting(Subchannel<Connecting>),
    Ready(Subchannel<Ready>),
    TransientFailure(Subchannel<TransientFailure>),
}

/// An address that the registry names.
#[derive(Debug)]
struct Known {
    endpoint: Arc<Endpoint>,
    instance: Instance,
    subchannels: Vec<SubchannelId>,
    class: Class,
}

/// What an endpoint counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Ready,
    Pending,
    Failing,
}

/// A dial's number, and that of the connection that came of it.
type DialId = u64;

/// A connection takes no more calls.
#[derive(Debug)]
struct Left(DialId, Leave);

/// Owns the subchannels of a channel.
#[derive(Debug)]
pub(super) struct Driver {
    shared: Arc<Shared>,
    connector: Arc<Connector>,
    options: Options,
    rng: fastrand::Rng,

    known: HashMap<Address, Known>,
    /// Each state apart from its endpoint, so that a transition takes it out and puts the next one in.
    subchannels: HashMap<SubchannelId, (Address, State)>,
    next_id: SubchannelId,
    draining: Vec<(Arc<Endpoint>, Subchannel<Draining>)>,

    /// Idle subchannels that want a connection.
    queue: VecDeque<SubchannelId>,
    dials: JoinSet<Result<Connection, DialError>>,
    dialling: HashMap<Id, (SubchannelId, DialId)>,
    connected: HashMap<DialId, SubchannelId>,
    timers: BinaryHeap<Reverse<(Instant, SubchannelId)>>,
    leaves: mpsc::UnboundedReceiver<Left>,
    on_leave: mpsc::UnboundedSender<Left>,
    /// Connections that were lost before we heard that they were made.
    lost_early: HashSet<DialId>,

    primary: Roster<SubchannelId, Arc<Member>>,
    last_resort: Roster<SubchannelId, Arc<Member>>,
    summary: Summary,
    pending: usize,
    /// When the set is to be published, if it has changed.
    publish_at: Option<Instant>,
    refresh_at: Instant,
}

impl Driver {
    pub(super) fn new(shared: Arc<Shared>, connector: Connector, options: Options) -> Self {
        let (on_leave, leaves) = mpsc::unbounded_channel();
        let rng = options
            .seed
            .map_or_else(fastrand::Rng::new, fastrand::Rng::with_seed);
        Self {
            shared,
            connector: Arc::new(connector),
            options,
            rng,
            known: HashMap::new(),
            subchannels: HashMap::new(),
            next_id: 0,
            draining: Vec::new(),
            queue: VecDeque::new(),
            dials: JoinSet::new(),
            dialling: HashMap::new(),
            connected: HashMap::new(),
            timers: BinaryHeap::new(),
            leaves,
            on_leave,
            lost_early: HashSet::new(),
            primary: Roster::default(),
            last_resort: Roster::default(),
            summary: Summary::default(),
            pending: 0,
            publish_at: None,
            refresh_at: Instant::now() + REFRESH,
        }
    }

    /// Runs until it is aborted, which the last clone of the channel does.
    pub(super) async fn run<S, E>(mut self, mut changes: Feed<S>)
    where
        S: Stream<Item = Result<Change<Address, Instance>, E>> + Send,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        loop {
            self.on_time(Instant::now());
            self.dial_queued();
            let wake = self.wake_at();
            // What is lost comes first, and what might never end, the stream, last.
            tokio::select! {
                biased;
                Some(left) = self.leaves.recv() => self.on_left(left),
                Some(dialled) = self.dials.join_next_with_id() => self.on_dialled(dialled),
                () = self.shared.demand.notified() => self.grow(),
                () = tokio::time::sleep_until(wake) => {}
                batch = changes.next() => self.on_batch(batch),
            }
        }
    }

    fn on_batch<E>(&mut self, batch: Batch<Result<Change<Address, Instance>, E>>)
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        for change in batch.changes {
            match change {
                Ok(Change::Insert(address, instance)) => self.insert(&address, &instance),
                Ok(Change::Remove(address)) => self.remove(&address),
                Err(error) => {
                    let error = error.into();
                    tracing::warn!(%error, "discovery failed; the set stays as it is");
                }
            }
        }
        if batch.known && !self.summary.known {
            self.summary.known = true;
            tracing::info!(
                endpoints = self.known.len(),
                "the set of endpoints is known"
            );
            self.publish_now();
        }
    }

    fn insert(&mut self, address: &Address, instance: &Instance) {
        let Some(known) = self.known.get_mut(address) else {
            return self.add(address, instance.clone());
        };
        let before = std::mem::replace(&mut known.instance, instance.clone());
        let (weight, last_resort) = (instance.weight(), instance.is_last_resort());
        known.endpoint.set_attributes(weight, last_resort);
        let subchannels = known.subchannels.clone();
        // A new lease or a new key at an old address is another server, or the same one after a restart.
        let fresh = before.lease() != instance.lease()
            || before.create_revision() != instance.create_revision();
        if before.is_last_resort() != last_resort {
            tracing::info!(%address, last_resort, "endpoint changed its rank");
        }
        for id in subchannels {
            if before.is_last_resort() && !last_resort {
                self.enqueue(id);
            }
            self.update(id, weight, last_resort, fresh);
        }
        self.reclassify(address);
    }

    fn add(&mut self, address: &Address, instance: Instance) {
        let endpoint = Arc::new(Endpoint::new(address.clone()));
        endpoint.set_attributes(instance.weight(), instance.is_last_resort());
        self.shared
            .directory()
            .insert(address.clone(), Arc::clone(&endpoint));
        tracing::info!(%address, weight = instance.weight(), "endpoint added");
        let dial = !instance.is_last_resort();
        let known = Known {
            endpoint,
            instance,
            subchannels: Vec::new(),
            class: Class::Failing,
        };
        self.known.insert(address.clone(), known);
        self.summary.endpoints = self.known.len();
        self.add_subchannel(address, dial);
        self.reclassify(address);
        self.publish_soon();
    }

    fn add_subchannel(&mut self, address: &Address, dial: bool) {
        let Some(known) = self.known.get_mut(address) else {
            return;
        };
        self.next_id += 1;
        let id = self.next_id;
        known.subchannels.push(id);
        let subchannel = Subchannel::new(ConnectBackoff::new(self.options.max_backoff));
        self.subchannels
            .insert(id, (address.clone(), State::Idle(subchannel)));
        if dial {
            self.enqueue(id);
        }
    }

    /// Puts an idle subchannel in the queue, at a random place: clients that all dial the registry's first address first are a stampede.
    fn enqueue(&mut self, id: SubchannelId) {
        self.queue.push_back(id);
        let place = self.rng.usize(..self.queue.len());
        let last = self.queue.len() - 1;
        self.queue.swap(place, last);
    }

    /// Applies changed attributes to a subchannel, without touching its connection.
    fn update(&mut self, id: SubchannelId, weight: u32, last_resort: bool, fresh: bool) {
        let Some((address, state)) = self.subchannels.remove(&id) else {
            return;
        };
        let state = match state {
            State::Ready(subchannel) => {
                self.enlist(id, subchannel.member(), weight, last_resort);
                State::Ready(subchannel)
            }
            State::Connecting(subchannel) if last_resort => State::Idle(subchannel.cancel()),
            State::TransientFailure(subchannel) if last_resort => State::Idle(subchannel.retry()),
            State::Connecting(subchannel) if fresh => State::Connecting(subchannel.refreshed()),
            State::TransientFailure(subchannel) if fresh => {
                tracing::debug!(%address, "fresh registration: connecting at once");
                self.enqueue(id);
                State::Idle(subchannel.reset())
            }
            state => state,
        };
        self.subchannels.insert(id, (address, state));
    }

    /// Puts a ready member where its rank says, with its weight.
    fn enlist(&mut self, id: SubchannelId, member: &Arc<Member>, weight: u32, last_resort: bool) {
        let (here, there) = if last_resort {
            (&mut self.last_resort, &mut self.primary)
        } else {
            (&mut self.primary, &mut self.last_resort)
        };
        if there.remove(&id) {
            here.insert(id, Arc::clone(member), weight);
            self.publish_now();
        } else if here.reweigh(&id, weight) {
            self.publish_soon();
        }
    }

    fn remove(&mut self, address: &Address) {
        let Some(known) = self.known.remove(address) else {
            return;
        };
        tracing::info!(%address, "endpoint removed");
        if known.class == Class::Pending {
            self.pending -= 1;
        }
        let mut drains = false;
        for id in known.subchannels {
            // Dropping the other states ends what they do.
            if let Some((_, State::Ready(subchannel))) = self.subchannels.remove(&id) {
                self.evict(id);
                drains |= subchannel.member().load().in_flight() > 0;
                let draining = subchannel.drain();
                self.draining.push((Arc::clone(&known.endpoint), draining));
            }
        }
        if drains {
            known.endpoint.set_state(EndpointState::Draining);
        } else {
            self.shared.directory().remove(address);
        }
        self.summary.endpoints = self.known.len();
        self.publish_now();
    }

    /// Takes a connection out of the ready set.
    fn evict(&mut self, id: SubchannelId) {
        if self.primary.remove(&id) || self.last_resort.remove(&id) {
            self.publish_now();
        }
    }

    /// Dials what waits for it, as many at a time as the bound allows.
    fn dial_queued(&mut self) {
        while self.dials.len() < DIALS {
            let Some(id) = self.queue.pop_front() else {
                return;
            };
            let Some((address, state)) = self.subchannels.remove(&id) else {
                continue;
            };
            let state = match state {
                State::Idle(subchannel) if self.is_dialled(&address) => {
                    let dial = self.dial(id, &address);
                    State::Connecting(subchannel.connect(dial, Instant::now()))
                }
                state => state,
            };
            self.subchannels.insert(id, (address.clone(), state));
            self.reclassify(&address);
        }
    }

    /// The address of a last resort may be somebody else's by now.
    fn is_dialled(&self, address: &Address) -> bool {
        let known = self.known.get(address);
        known.is_some_and(|known| !known.instance.is_last_resort())
    }

    fn dial(&mut self, id: SubchannelId, address: &Address) -> tokio::task::AbortHandle {
        tracing::debug!(%address, "connecting");
        self.next_id += 1;
        let dial_id = self.next_id;
        let leaves = self.on_leave.clone();
        let on_leave = move |leave| {
            // The driver may be gone, and then nobody cares.
            let _ = leaves.send(Left(dial_id, leave));
        };
        let (connector, address) = (Arc::clone(&self.connector), address.clone());
        let dial = async move { connector.connect(&address, on_leave).await };
        let dial = self.dials.spawn(dial);
        self.dialling.insert(dial.id(), (id, dial_id));
        dial
    }

    fn on_dialled(&mut self, dialled: Result<(Id, Result<Connection, DialError>), JoinError>) {
        let (task, outcome) = match dialled {
            Ok((task, outcome)) => (task, outcome),
            Err(error) => (error.id(), Err(DialError::Panicked(error))),
        };
        let Some((id, dial_id)) = self.dialling.remove(&task) else {
            return;
        };
        let lost_early = self.lost_early.remove(&dial_id);
        let Some((address, state)) = self.subchannels.remove(&id) else {
            return;
        };
        let State::Connecting(subchannel) = state else {
            // Cancelled meanwhile.
            self.subchannels.insert(id, (address, state));
            return;
        };
        match outcome {
            Ok(connection) => {
                self.connected.insert(dial_id, id);
                self.on_connected(id, &address, subchannel, connection);
                if lost_early {
                    self.on_left(Left(dial_id, Leave::Closed));
                }
            }
            Err(error) => self.on_refused(id, &address, subchannel, &error),
        }
    }

    fn on_connected(
        &mut self,
        id: SubchannelId,
        address: &Address,
        subchannel: Subchannel<Connecting>,
        connection: Connection,
    ) {
        let Some(known) = self.known.get(address) else {
            return;
        };
        tracing::info!(%address, round_trip = ?connection.round_trip(), "endpoint ready");
        let median = self.median();
        let member = Arc::new(Member::new(
            connection,
            Arc::clone(&known.endpoint),
            Load::new(known.endpoint.estimate(), median),
            Arc::clone(&self.shared.waiters),
            self.shared.started,
        ));
        known.endpoint.add_connection(&member);
        let (weight, last_resort) = (known.instance.weight(), known.instance.is_last_resort());
        let missing = self
            .options
            .connections_per_endpoint
            .saturating_sub(known.subchannels.len());
        let roster = if last_resort {
            &mut self.last_resort
        } else {
            &mut self.primary
        };
        roster.insert(id, Arc::clone(&member), weight);
        let ready = State::Ready(subchannel.connected(member));
        self.subchannels.insert(id, (address.clone(), ready));
        // Only an endpoint that answers is worth its other connections.
        for _ in 0..missing {
            self.add_subchannel(address, !last_resort);
        }
        self.reclassify(address);
        self.publish_soon();
    }

    fn on_refused(
        &mut self,
        id: SubchannelId,
        address: &Address,
        subchannel: Subchannel<Connecting>,
        error: &DialError,
    ) {
        let first = !subchannel.is_failing();
        let failed = subchannel.failed(&mut self.rng, Instant::now());
        let reason = causes(error);
        if first {
            tracing::info!(%address, %reason, "endpoint failing: no connection");
        } else {
            tracing::debug!(%address, %reason, "endpoint still failing");
        }
        self.note(address, reason.into());
        self.timers.push(Reverse((failed.until(), id)));
        let failed = State::TransientFailure(failed);
        self.subchannels.insert(id, (address.clone(), failed));
        self.reclassify(address);
    }

    fn on_left(&mut self, Left(dial_id, leave): Left) {
        let Some(id) = self.connected.remove(&dial_id) else {
            if self
                .dialling
                .values()
                .any(|(_, dialling)| *dialling == dial_id)
            {
                self.lost_early.insert(dial_id);
            }
            return;
        };
        // A removed endpoint's connection leaves as well, and nobody minds.
        let Some((address, State::Ready(subchannel))) = self.subchannels.remove(&id) else {
            return;
        };
        self.evict(id);
        if leave.is_graceful() {
            tracing::info!(%address, reason = %leave, "endpoint is leaving");
        } else {
            tracing::info!(%address, reason = %leave, "connection lost");
        }
        self.note(&address, leave.to_string().into());
        let known = self.known.get(&address);
        if let Some(known) = known {
            let estimate = subchannel.member().load().estimate();
            known.endpoint.keep_estimate(estimate);
        }
        let last_resort = known.is_some_and(|known| known.instance.is_last_resort());
        let state = match subchannel.lost(&mut self.rng, Instant::now()) {
            Lost::Idle(subchannel) => {
                if !last_resort {
                    self.enqueue(id);
                }
                State::Idle(subchannel)
            }
            Lost::TransientFailure(subchannel) if last_resort => State::Idle(subchannel.retry()),
            Lost::TransientFailure(subchannel) => {
                self.timers.push(Reverse((subchannel.until(), id)));
                State::TransientFailure(subchannel)
            }
        };
        self.subchannels.insert(id, (address.clone(), state));
        self.reclassify(&address);
    }

    fn note(&mut self, address: &Address, reason: Arc<str>) {
        if let Some(known) = self.known.get(address) {
            known.endpoint.set_last_error(Arc::clone(&reason));
        }
        let address = address.clone();
        self.summary.last_error = Some(Arc::new(EndpointError { address, reason }));
        self.publish_soon();
    }

    /// Opens one more connection to each endpoint whose streams are all in use.
    fn grow(&mut self) {
        let limit = self.options.connections_per_endpoint + 1;
        let full = |known: &Known| {
            !known.instance.is_last_resort()
                && known.subchannels.len() < limit
                && known.subchannels.iter().all(|id| {
                    matches!(self.subchannels.get(id), Some((_, State::Ready(ready))) if ready.member().is_full())
                })
        };
        let full: Vec<_> = self.known.iter().filter(|(_, known)| full(known)).collect();
        let full: Vec<_> = full
            .into_iter()
            .map(|(address, _)| address.clone())
            .collect();
        for address in full {
            tracing::debug!(%address, "every stream is in use: one more connection");
            self.add_subchannel(&address, true);
        }
    }

    /// Does what is due.
    fn on_time(&mut self, now: Instant) {
        while let Some(Reverse((until, id))) = self.timers.peek().copied()
            && until <= now
        {
            self.timers.pop();
            self.on_backoff_over(id, now);
        }
        if self.refresh_at <= now {
            self.refresh_at = now + REFRESH;
            self.refresh(now);
        }
        if self.publish_at.is_some_and(|at| at <= now) {
            self.publish();
        }
    }

    fn on_backoff_over(&mut self, id: SubchannelId, now: Instant) {
        let Some((address, state)) = self.subchannels.remove(&id) else {
            return;
        };
        let state = match state {
            // A timer of an earlier wait finds another one running.
            State::TransientFailure(subchannel) if subchannel.until() <= now => {
                self.enqueue(id);
                State::Idle(subchannel.retry())
            }
            state => state,
        };
        self.subchannels.insert(id, (address, state));
    }

    /// When there is something to do by itself.
    fn wake_at(&self) -> Instant {
        let timer = self.timers.peek().map(|Reverse((until, _))| *until);
        let wakes = [Some(self.refresh_at), timer, self.publish_at];
        wakes.into_iter().flatten().min().unwrap_or(self.refresh_at)
    }

    /// Brings the estimates up to date, and forgets what has drained.
    fn refresh(&mut self, now: Instant) {
        let median = self.median();
        let now = Ticks::at(now, self.shared.started);
        for member in self.primary.members().chain(self.last_resort.members()) {
            member.load().refresh(median, now);
        }
        let mut directory = self.shared.directory();
        self.draining.retain(|(endpoint, subchannel)| {
            let drained = subchannel.is_drained();
            // The address may have been registered again, with an endpoint of its own.
            if drained
                && directory
                    .get(endpoint.address())
                    .is_some_and(|known| Arc::ptr_eq(known, endpoint))
            {
                directory.remove(endpoint.address());
            }
            !drained
        });
    }

    fn median(&self) -> f32 {
        let estimates = self
            .primary
            .members()
            .filter_map(|member| member.load().estimate());
        let mut latencies: Vec<_> = estimates.map(|estimate| estimate.mean()).collect();
        median(&mut latencies)
    }

    /// Counts an endpoint anew after one of its subchannels has changed.
    fn reclassify(&mut self, address: &Address) {
        let Some(known) = self.known.get_mut(address) else {
            return;
        };
        let states = known
            .subchannels
            .iter()
            .filter_map(|id| self.subchannels.get(id));
        let mut class = Class::Failing;
        let mut shown = EndpointState::Idle;
        for (_, state) in states {
            let (of_one, seen) = match state {
                State::Ready(_) => (Class::Ready, EndpointState::Ready),
                State::Connecting(one) if one.is_failing() => {
                    (Class::Failing, EndpointState::Connecting)
                }
                State::Connecting(_) => (Class::Pending, EndpointState::Connecting),
                State::Idle(one) if one.is_failing() || known.instance.is_last_resort() => {
                    (Class::Failing, EndpointState::Idle)
                }
                State::Idle(_) => (Class::Pending, EndpointState::Idle),
                State::TransientFailure(_) => (Class::Failing, EndpointState::TransientFailure),
            };
            if class == Class::Failing || of_one == Class::Ready {
                (class, shown) = (of_one, seen);
            }
        }
        known.endpoint.set_state(shown);
        let before = std::mem::replace(&mut known.class, class);
        self.pending += usize::from(class == Class::Pending);
        self.pending -= usize::from(before == Class::Pending);
        if before != class {
            self.publish_soon();
        }
    }

    /// Joins are gathered for a moment: a set of thousands comes up in a few steps and not in thousands. The first is not kept waiting.
    fn publish_soon(&mut self) {
        let delay = if self.summary.ready == 0 {
            Duration::ZERO
        } else {
            GATHER
        };
        self.publish_at
            .get_or_insert_with(|| Instant::now() + delay);
    }

    /// What is gone is told before the next event is looked at.
    fn publish_now(&mut self) {
        self.publish_at = Some(Instant::now());
    }

    fn publish(&mut self) {
        self.publish_at = None;
        self.summary.pending = self.pending;
        // Both, since a roster holds on to what it has frozen last.
        let (primary, held) = (self.primary.freeze(), self.last_resort.freeze());
        let last_resort = primary.len() == 0;
        let ready = if last_resort { held } else { primary };
        let were_ready = std::mem::replace(&mut self.summary.ready, ready.len());
        if (were_ready == 0) != (ready.len() == 0) {
            tracing::info!(
                ready = ready.len(),
                endpoints = self.summary.endpoints,
                last_resort = last_resort && ready.len() > 0,
                "channel {}",
                if ready.len() > 0 {
                    "ready"
                } else {
                    "has no ready endpoint"
                }
            );
        }
        let summary = self.summary.clone();
        self.shared
            .published
            .store(Arc::new(Published { ready, summary }));
        self.shared.changed.notify_waiters();
    }
}

/// An error with all its causes, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors of the libraries below repeat their cause.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// How often estimates are brought up to date.
const REFRESH: Duration = Duration::from_millis(200);
/// How long joins are gathered before they are published.
const GATHER: Duration = Duration::from_millis(1);
/// Connections made at once: enough for a set of thousands to come up in a second, few enough for a limit on open files.
const DIALS: usize = 256;
