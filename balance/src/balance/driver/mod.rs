//! The driver: the one task that dials, loses and retires connections, and says which are ready.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{Id, JoinSet};
use tokio::time::Instant;
use tokio_stream::Stream;
use tower::discover::Change;

use super::connect_backoff::ConnectBackoff;
use super::endpoint::{Endpoint, Tally};
use super::health::Health;
use super::load::Loads;
use super::outlier::Ejection;
use super::picker::LbPolicy;
use super::ready_connection::ReadyEntry;
use super::ready_set::ReadySetBuilder;
use super::subchannel::{Connecting, Draining, Idle, Ready, Resting, Subchannel, TransientFailure};
use super::updates::Updates;
use super::zone::Zones;
use super::{Options, Shared, Summary};
use crate::address::Address;
use crate::attributes::Attributes;
use crate::transport::connect::{Connector, DialError};
use crate::transport::connection_task::{self, CloseReason};
use crate::transport::http2::Connection;
use crate::transport::pings::KeepAlive;

mod changes;
mod connecting;
mod ejection;
mod foreign;
mod health;
mod publish;
mod resting;
mod scaling;
mod slow_start;
mod spare;
mod zones;

use foreign::Quarantine;

/// A subchannel's number, never used twice.
type SubchannelId = u64;

/// A subchannel in whichever state.
#[derive(Debug)]
enum State {
    Idle(Subchannel<Idle>),
    Connecting(Subchannel<Connecting>),
    Ready(Subchannel<Ready>),
    Resting(Subchannel<Resting>),
    TransientFailure(Subchannel<TransientFailure>),
}

/// An attempt under way.
#[derive(Clone, Copy, Debug)]
struct Dial {
    subchannel: SubchannelId,
    id: DialId,
    /// Whether the last one failed.
    is_retry: bool,
}

/// An address that the registry names.
#[derive(Debug)]
struct EndpointEntry {
    endpoint: Arc<Endpoint>,
    attributes: Attributes,
    subchannels: Vec<SubchannelId>,
    class: Class,
    ejection: Ejection,
    /// Set while its answers are not gRPC's.
    quarantine: Option<Quarantine>,
    /// A second connection, dialled because the first stalled; cleared when either answers.
    spare: Option<SubchannelId>,
    /// The pace of such connections, and when the next one may be dialled.
    spare_backoff: ConnectBackoff,
    spare_at: Option<Instant>,
    /// Whether a connection to it was ready since it failed or was registered.
    warm: bool,
    /// The keep-alive that its server tolerates.
    keep_alive: Option<KeepAlive>,
    /// When it became ready, while its share still grows.
    started: Option<Instant>,
    /// What it had done when the last interval of the outlier detection ended.
    judged: Tally,
}

/// What an endpoint counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Ready,
    Pending,
    Failing,
}

/// What a connection has to say.
#[derive(Debug)]
enum SubchannelEvent {
    Connection(connection_task::ConnectionEvent),
    Health(Health),
}

/// A dial's number, and that of the connection that came of it.
type DialId = u64;

/// Owns the subchannels of a channel.
#[derive(Debug)]
pub(super) struct Driver {
    shared: Arc<Shared>,
    connector: Arc<Connector>,
    options: Options,
    rng: fastrand::Rng,

    endpoints: HashMap<Address, EndpointEntry>,
    /// Each state apart from its endpoint, so that a transition takes it out and puts the next one in.
    subchannels: HashMap<SubchannelId, (Address, State)>,
    next_id: SubchannelId,
    draining: Vec<(Arc<Endpoint>, Subchannel<Draining>)>,
    /// Removed since the last set was published, and whether calls are in flight there. They are shown until no pick can find them.
    removed: Vec<(Arc<Endpoint>, bool)>,

    /// Idle subchannels that want a connection.
    queue: VecDeque<SubchannelId>,
    /// Those whose last attempt failed.
    failing: VecDeque<SubchannelId>,
    /// Attempts after a failed one that are under way.
    retries: usize,
    dials: JoinSet<Result<Connection, DialError>>,
    dialling: HashMap<Id, Dial>,
    /// Endpoints with a connection that does not answer.
    stalled: Vec<Address>,
    /// Endpoints whose answers are not gRPC's.
    quarantined: Vec<Address>,
    /// Subchannels that rest until a call wants them.
    resting: HashSet<SubchannelId>,
    /// Total number of calls at the last scan for resting connections.
    calls_then: Option<u64>,
    connected: HashMap<DialId, SubchannelId>,
    timers: BinaryHeap<Reverse<(Instant, SubchannelId)>>,
    events: mpsc::UnboundedReceiver<(DialId, SubchannelEvent)>,
    on_event: mpsc::UnboundedSender<(DialId, SubchannelEvent)>,
    /// Connections that were lost before we heard that they were made.
    lost_early: HashMap<DialId, CloseReason>,

    primary: ReadySetBuilder<SubchannelId, ReadyEntry>,
    last_resort: ReadySetBuilder<SubchannelId, ReadyEntry>,
    /// Whether calls pick from the last resort.
    is_last_resort: bool,
    loads: Loads,
    summary: Summary,
    pending: usize,
    /// Endpoints that are ready and not published yet.
    joined: Vec<Address>,
    /// When the set is to be published, if it has changed.
    publish_at: Option<Instant>,
    refresh_at: Instant,
    /// Endpoints whose share still grows.
    starting: Vec<Address>,
    /// When it is to be looked who needs one more connection, and when that was done last.
    grow_at: Option<Instant>,
    grew_at: Instant,
    /// Endpoints with a connection more than they are to have, and since when.
    grown: HashMap<Address, Instant>,
    /// What weights are multiplied with, by zone.
    zones: Zones<u32>,
    /// When outliers are looked for next, if they are.
    sweep_at: Option<Instant>,
    /// The pool's median latency as of the last refresh: looked for at each join it would make loading a large set quadratic.
    median: f32,
}

impl Driver {
    pub(super) fn new(shared: Arc<Shared>, connector: Arc<Connector>, options: Options) -> Self {
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

    pub(super) async fn run<S, E>(mut self, mut changes: Updates<S>)
    where
        S: Stream<Item = Result<Change<Address, Attributes>, E>> + Send,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        loop {
            self.on_time(Instant::now());
            self.dial_queued();
            let wake = self.wake_at();
            // What is lost comes first, and what might never end, the stream, last.
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
        // The clock is read again: what has just been found to be an outlier is out now, and not with the next tick of a timer.
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
    /// However the driver ends, with its runtime or by a panic, calls fail with the reason and none waits for it.
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
/// How often estimates are brought up to date.
const REFRESH: Duration = Duration::from_millis(200);
