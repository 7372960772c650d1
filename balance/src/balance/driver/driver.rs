//! The task of a channel: its state, its loop and its timers.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{Id, JoinSet};
use tokio::time::Instant;
use tokio_stream::Stream;
use tower::discover::Change;

use super::quarantine::Quarantine;
use crate::address::Address;
use crate::attributes::Attributes;
use crate::balance::connect_backoff::ConnectBackoff;
use crate::balance::endpoint::{Endpoint, Tally};
use crate::balance::health::Health;
use crate::balance::load::Loads;
use crate::balance::options::Options;
use crate::balance::outlier::Ejection;
use crate::balance::picker::LbPolicy;
use crate::balance::ready_connection::ReadyEntry;
use crate::balance::ready_set::ReadySetBuilder;
use crate::balance::shared::Shared;
use crate::balance::subchannel::{
    Connecting, Draining, Idle, Ready, Resting, Subchannel, TransientFailure,
};
use crate::balance::summary::Summary;
use crate::balance::updates::Updates;
use crate::balance::zone::Zones;
use crate::transport::connect::{Connector, DialError};
use crate::transport::connection_task::{self, CloseReason};
use crate::transport::http2::Connection;
use crate::transport::ping_policy::KeepAlive;

/// The number of a subchannel; numbers are never reused.
pub(super) type SubchannelId = u64;

/// A subchannel in any of its states.
#[derive(Debug)]
pub(super) enum State {
    Idle(Subchannel<Idle>),
    Connecting(Subchannel<Connecting>),
    Ready(Subchannel<Ready>),
    Resting(Subchannel<Resting>),
    TransientFailure(Subchannel<TransientFailure>),
}

/// A dial in progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dial {
    pub(super) subchannel: SubchannelId,
    pub(super) id: DialId,
    /// Whether the previous attempt failed.
    pub(super) is_retry: bool,
}

/// An endpoint in the current set.
#[derive(Debug)]
pub(super) struct EndpointEntry {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) attributes: Attributes,
    pub(super) subchannels: Vec<SubchannelId>,
    pub(super) class: Class,
    pub(super) ejection: Ejection,
    /// Set while the endpoint's answers are not gRPC responses.
    pub(super) quarantine: Option<Quarantine>,
    /// A second connection, dialled because the first one is silent. Cleared when either of them answers.
    pub(super) spare: Option<SubchannelId>,
    /// The backoff between dials of second connections, and the earliest time of the next one.
    pub(super) spare_backoff: ConnectBackoff,
    pub(super) spare_at: Option<Instant>,
    /// Whether a connection was ready since the last failed attempt or registration.
    pub(super) warm: bool,
    /// The keep-alive that the server tolerates.
    pub(super) keep_alive: Option<KeepAlive>,
    /// The time when the endpoint became ready, while its share still grows.
    pub(super) started: Option<Instant>,
    /// The counters at the end of the last interval of the outlier detection.
    pub(super) judged: Tally,
}

/// The class of an endpoint in the summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Ready,
    Pending,
    Failing,
}

/// An event of a connection.
#[derive(Debug)]
pub(super) enum SubchannelEvent {
    Connection(connection_task::ConnectionEvent),
    Health(Health),
}

/// The number of a dial and of the connection that it makes.
pub(super) type DialId = u64;

/// Owns the subchannels of a channel.
#[derive(Debug)]
pub(in crate::balance) struct Driver {
    pub(super) shared: Arc<Shared>,
    pub(super) connector: Arc<Connector>,
    pub(super) options: Options,
    pub(super) rng: fastrand::Rng,

    pub(super) endpoints: HashMap<Address, EndpointEntry>,
    /// All subchannels. They are not stored in their endpoint's entry, so that a transition can take a state out and insert the next one.
    pub(super) subchannels: HashMap<SubchannelId, (Address, State)>,
    pub(super) next_id: SubchannelId,
    pub(super) draining: Vec<(Arc<Endpoint>, Subchannel<Draining>)>,
    /// Endpoints removed since the last set was published, and whether calls are in flight there. They stay in the endpoint list until no
    /// pick can find them.
    pub(super) removed: Vec<(Arc<Endpoint>, bool)>,

    /// Idle subchannels to dial.
    pub(super) queue: VecDeque<SubchannelId>,
    /// Idle subchannels to dial whose last attempt failed.
    pub(super) failing: VecDeque<SubchannelId>,
    /// Number of dials in progress whose previous attempt failed.
    pub(super) retries: usize,
    pub(super) dials: JoinSet<Result<Connection, DialError>>,
    pub(super) dialling: HashMap<Id, Dial>,
    /// Endpoints that have a silent connection.
    pub(super) stalled: Vec<Address>,
    /// Endpoints whose answers are not gRPC responses.
    pub(super) quarantined: Vec<Address>,
    /// Resting subchannels, which are dialled when a call needs them.
    pub(super) resting: HashSet<SubchannelId>,
    /// Total number of calls at the last scan for resting connections.
    pub(super) calls_then: Option<u64>,
    pub(super) connected: HashMap<DialId, SubchannelId>,
    pub(super) timers: BinaryHeap<Reverse<(Instant, SubchannelId)>>,
    pub(super) events: mpsc::UnboundedReceiver<(DialId, SubchannelEvent)>,
    pub(super) on_event: mpsc::UnboundedSender<(DialId, SubchannelEvent)>,
    /// Connections whose loss was reported before the outcome of their dial.
    pub(super) lost_early: HashMap<DialId, CloseReason>,

    pub(super) primary: ReadySetBuilder<SubchannelId, ReadyEntry>,
    pub(super) last_resort: ReadySetBuilder<SubchannelId, ReadyEntry>,
    /// Whether calls pick from the last-resort set.
    pub(super) is_last_resort: bool,
    pub(super) loads: Loads,
    pub(super) summary: Summary,
    pub(super) pending: usize,
    /// Endpoints that became ready since the last set was published.
    pub(super) joined: Vec<Address>,
    /// The time of the next publication, if the set has changed.
    pub(super) publish_at: Option<Instant>,
    pub(super) refresh_at: Instant,
    /// Endpoints whose share still grows (slow start).
    pub(super) starting: Vec<Address>,
    /// The times of the next and the last scan for endpoints that need another connection.
    pub(super) grow_at: Option<Instant>,
    pub(super) grew_at: Instant,
    /// Endpoints with an additional connection, and the time when it was added.
    pub(super) grown: HashMap<Address, Instant>,
    /// The factor of each zone, which weights are multiplied with.
    pub(super) zones: Zones<u32>,
    /// The time of the next outlier detection, if it is enabled.
    pub(super) sweep_at: Option<Instant>,
    /// The pool's median latency as of the last refresh. Computing it at each join would make loading a large set quadratic.
    pub(super) median: f32,
}

impl Driver {
    pub(in crate::balance) fn new(
        shared: Arc<Shared>,
        connector: Arc<Connector>,
        options: Options,
    ) -> Self {
        let (on_event, events) = mpsc::unbounded_channel();
        let rng = options
            .seed
            .map_or_else(fastrand::Rng::new, fastrand::Rng::with_seed);
        let detection = options.outlier_detection.as_ref();
        let sweep_at = detection.map(|detection| Instant::now() + detection.period());
        let takes_turns = options.policy == LbPolicy::WeightedRoundRobin;
        Self {
            sweep_at,
            shared,
            connector,
            options,
            rng,
            endpoints: HashMap::new(),
            subchannels: HashMap::new(),
            next_id: 0,
            draining: Vec::new(),
            removed: Vec::new(),
            queue: VecDeque::new(),
            failing: VecDeque::new(),
            retries: 0,
            dials: JoinSet::new(),
            dialling: HashMap::new(),
            quarantined: Vec::new(),
            resting: HashSet::new(),
            calls_then: None,
            connected: HashMap::new(),
            timers: BinaryHeap::new(),
            events,
            on_event,
            lost_early: HashMap::new(),
            stalled: Vec::new(),
            primary: ReadySetBuilder::new(takes_turns),
            last_resort: ReadySetBuilder::new(takes_turns),
            is_last_resort: false,
            loads: Loads::new(),
            summary: Summary::default(),
            pending: 0,
            joined: Vec::new(),
            starting: Vec::new(),
            grow_at: None,
            grew_at: Instant::now(),
            grown: HashMap::new(),
            zones: Zones::new(),
            publish_at: None,
            refresh_at: Instant::now() + REFRESH,
            median: 0.0,
        }
    }

    pub(in crate::balance) async fn run<S, E>(mut self, mut changes: Updates<S>)
    where
        S: Stream<Item = Result<Change<Address, Attributes>, E>> + Send,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        loop {
            self.on_time(Instant::now());
            self.dial_queued();
            let wake = self.wake_at();
            // Lost connections are handled first. The stream of changes is last: it may always be ready and would then starve the other
            // branches.
            tokio::select! {
                biased;
                Some((dial_id, event)) = self.events.recv() => self.on_event(dial_id, event),
                Some(dialled) = self.dials.join_next_with_id() => self.on_dialled(dialled),
                () = self.shared.demand.notified() => {
                    self.redial_given_up();
                    self.wake_resting();
                    self.check_silent();
                    self.isolate_foreign();
                    self.grow_at.get_or_insert_with(|| (self.grew_at + GROW).max(Instant::now()));
                }
                () = tokio::time::sleep_until(wake) => {}
                batch = changes.next() => self.on_batch(batch),
            }
        }
    }

    fn on_time(&mut self, now: Instant) {
        while let Some(Reverse((until, id))) = self.timers.peek().copied()
            && until <= now
        {
            self.timers.pop();
            self.on_backoff_over(id, now);
        }
        if self.grow_at.is_some_and(|at| at <= now) {
            self.grow_at = None;
            self.grew_at = now;
            self.grow();
        }
        if self.refresh_at <= now {
            self.refresh_at = now + REFRESH;
            self.refresh(now);
        }
        if self.sweep_at.is_some_and(|at| at <= now) {
            self.sweep(now);
        }
        // Reads the clock again: with `now`, an outlier that `sweep` has just ejected would stay in the set until the next tick of the
        // timer.
        if self.publish_at.is_some_and(|at| at <= Instant::now()) {
            self.publish();
        }
    }

    fn wake_at(&self) -> Instant {
        let timer = self.timers.peek().map(|Reverse((until, _))| *until);
        let wakes = [
            Some(self.refresh_at),
            timer,
            self.publish_at,
            self.sweep_at,
            self.grow_at,
        ];
        wakes.into_iter().flatten().min().unwrap_or(self.refresh_at)
    }
}

impl Drop for Driver {
    /// Fails all calls with the reason: waiting calls would otherwise never end. This also covers a panic and the end of the runtime.
    fn drop(&mut self) {
        let ended = if std::thread::panicking() {
            "the channel's driver has panicked"
        } else {
            "the runtime on which the channel was made has ended"
        };
        self.shared.end(ended, &self.summary);
    }
}

/// Minimum interval between scans for endpoints that need another connection; every waiting call requests one.
const GROW: Duration = Duration::from_millis(5);
/// Interval between refreshes of the latency estimates.
const REFRESH: Duration = Duration::from_millis(200);
