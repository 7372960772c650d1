//! The driver of a channel, which runs in one task: its state, its loop and its timers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_stream::Stream;
use tower::discover::Change;

use super::dials::Dials;
use super::draining::DrainingConnections;
use super::endpoint_entry::EndpointEntry;
use super::event_queue::Events;
use super::outlier_schedule::OutlierSchedule;
use super::pending_publication::PendingPublication;
use super::pushbacks::Pushbacks;
use super::quarantine::Quarantines;
use super::ready_set_pair::ReadySets;
use super::reported_weights::ReportedWeights;
use super::resting::Resting;
use super::ring_schedule::RingSchedule;
use super::scaling::Scaling;
use super::selections::Selections;
use super::slow_start::SlowStart;
use super::subchannel_table::Subchannels;
use super::subset::{EndpointSubset, PeerUpdates};
use super::timers::Timers;
use super::zone_preference::ZonePreference;
use crate::address::Address;
use crate::attributes::Attributes;
use crate::balance::estimate::Ticks;
use crate::balance::latencies::Latencies;
use crate::balance::options::Options;
use crate::balance::picker::{LbPolicy, Picker};
use crate::balance::ready_connection::ReadyEntry;
use crate::balance::shared::Shared;
use crate::balance::updates::Updates;
use crate::transport::connect::Connector;

/// Owns the subchannels of a channel, and publishes the ready set: the connections that calls can pick.
#[derive(Debug)]
pub(in crate::balance) struct Driver {
    pub(super) shared: Arc<Shared>,
    pub(super) connector: Arc<Connector>,
    pub(super) options: Options,
    pub(super) rng: fastrand::Rng,

    /// The endpoints to which the channel connects.
    pub(super) endpoints: HashMap<Address, EndpointEntry>,
    /// Chooses these endpoints. `None` if the channel connects to all endpoints of the source.
    pub(super) subset: Option<EndpointSubset>,
    pub(super) peers: PeerUpdates,
    pub(super) subchannels: Subchannels,
    pub(super) events: Events,

    pub(super) dials: Dials,
    pub(super) timers: Timers,
    pub(super) resting: Resting,
    /// Endpoints that had a silent connection (on which nothing was read for a while) at the last refresh or since then.
    pub(super) silent: HashSet<Address>,
    pub(super) scaling: Scaling,
    pub(super) draining: DrainingConnections,

    pub(super) picker: Arc<Picker>,
    pub(super) ready_sets: ReadySets<ReadyEntry>,
    pub(super) selections: Selections,
    pub(super) rings: RingSchedule,
    pub(super) publication: PendingPublication,
    pub(super) latencies: Latencies,
    pub(super) slow_start: SlowStart,
    pub(super) zones: ZonePreference,
    pub(super) reported_weights: ReportedWeights,
    pub(super) detection: OutlierSchedule,
    pub(super) quarantines: Quarantines,
    pub(super) pushbacks: Pushbacks,
    /// The endpoints that get no ordinary calls because of a pushback.
    pub(super) pushed_back: HashSet<Address>,
    refreshed_at: Instant,
    /// Whether a connection was in use at the last refresh or within the 10 s before it.
    in_use: bool,
}

impl Driver {
    pub(in crate::balance) fn new(
        shared: Arc<Shared>,
        connector: Arc<Connector>,
        options: Options,
    ) -> Self {
        let now = Instant::now();
        let takes_turns = options.policy.takes_turns();
        let is_hashed = options.policy == LbPolicy::RingHash;
        let size = options.subset_size;
        let mut driver = Self {
            picker: Arc::clone(&shared.published.load().picker),
            shared,
            connector,
            rng: options
                .seed
                .map_or_else(fastrand::Rng::new, fastrand::Rng::with_seed),
            endpoints: HashMap::new(),
            subset: None,
            peers: PeerUpdates::new(options.peers.clone()),
            subchannels: Subchannels::default(),
            events: Events::new(),
            dials: Dials::default(),
            timers: Timers::default(),
            resting: Resting::default(),
            silent: HashSet::new(),
            scaling: Scaling::new(now),
            draining: DrainingConnections::default(),
            ready_sets: ReadySets::new(takes_turns, is_hashed),
            selections: Selections::new(options.splits.current(), takes_turns, is_hashed, now),
            rings: RingSchedule::new(now),
            publication: PendingPublication::default(),
            latencies: Latencies::new(),
            slow_start: SlowStart::new(options.slow_start),
            zones: ZonePreference::new(options.zone.clone()),
            reported_weights: ReportedWeights::new(options.load_weights.clone(), now),
            detection: OutlierSchedule::new(options.outlier_detection.clone(), now),
            quarantines: Quarantines::default(),
            pushbacks: Pushbacks::default(),
            pushed_back: HashSet::new(),
            refreshed_at: now,
            in_use: true,
            options,
        };
        driver.set_subset_size(size);
        driver
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
            // The events of connections, such as a lost connection, are handled first. The stream of endpoint changes is last, because it
            // may always be ready and would then starve the other branches.
            tokio::select! {
                biased;
                Some((dial_id, event)) = self.events.recv() => self.on_event(dial_id, event),
                Some(ended) = self.dials.ended() => self.on_dial_ended(ended),
                () = self.shared.demand.notified() => self.on_demand(),
                () = self.peers.changed() => self.on_peers(),
                () = tokio::time::sleep_until(wake) => {}
                batch = changes.next() => self.on_batch(batch),
            }
        }
    }

    fn on_time(&mut self, now: Instant) {
        while let Some(id) = self.timers.pop_due(now) {
            self.on_backoff_over(id, now);
        }
        if self.scaling.take_due(now) {
            self.add_connections();
        }
        if self.refresh_at() <= now {
            self.refreshed_at = now;
            self.refresh(now);
        }
        if self.detection.is_due(now) {
            self.detect_outliers(now);
        }
        if self.pushbacks.is_due(now) {
            self.check_pushbacks(now);
        }
        // The subset is updated before a publication. If all its endpoints are failing, calls then wait for the endpoints that replace them,
        // and do not fail.
        self.update_due_subset();
        if self.reported_weights.take_due(now) {
            self.update_reported_weights(now);
        }
        // Reads the clock again, because the steps above may schedule a publication for a time after `now`. If `now` were used, such a
        // publication would not count as due in this iteration of the loop, and an outlier that was just ejected would stay in the ready
        // set until the next iteration.
        if self.publication.is_due(Instant::now()) {
            self.publish();
        }
    }

    fn wake_at(&self) -> Instant {
        let wakes = [
            self.timers.next(),
            self.publication.next(),
            self.detection.next(),
            self.scaling.next(),
            self.subset.as_ref().and_then(EndpointSubset::next),
            self.reported_weights.next(),
            self.pushbacks.next(),
        ];
        let first = wakes.into_iter().flatten().min();
        let refresh = self.refresh_at();
        first.map_or(refresh, |first| first.min(refresh))
    }

    /// Returns the time of the next refresh. The interval is longer if the channel is not in use and no other work waits for a refresh.
    fn refresh_at(&self) -> Instant {
        let waits = self.slow_start.is_waiting()
            || self.quarantines.is_waiting()
            || self.draining.is_waiting()
            || !self.silent.is_empty();
        let is_idle = !self.in_use && !waits;
        self.refreshed_at + if is_idle { IDLE_REFRESH } else { REFRESH }
    }

    /// Does the periodic work that needs no exact time.
    fn refresh(&mut self, now: Instant) {
        self.grow_weights(now);
        self.wake_resting_for_calls();
        self.end_quarantines(now);
        self.pushbacks.recheck(now);
        self.dial_second_connections(now);
        self.remove_connections(now);
        self.sweep_selections(now);
        let ticks = Ticks::at(now, self.shared.started);
        let primary = self.ready_sets.primary().map(ReadyEntry::load);
        let all = self.ready_sets.all().map(ReadyEntry::load);
        self.in_use = self.latencies.refresh(primary, all, ticks);
        if self.options.load_reports {
            let primary = self.ready_sets.primary().map(ReadyEntry::load);
            let all = self.ready_sets.all().map(ReadyEntry::load);
            self.latencies.refresh_server_loads(primary, all, ticks);
        }
        self.forget_drained();
    }
}

impl Drop for Driver {
    /// Fails all calls with the reason why the driver has ended. Otherwise waiting calls would never end. This function also runs after a
    /// panic, and when the runtime shuts down.
    fn drop(&mut self) {
        let ended = if std::thread::panicking() {
            "the channel's driver has panicked"
        } else {
            "the tokio runtime in which the channel was created has shut down"
        };
        self.shared.end(ended, self.publication.summary());
    }
}

/// Interval between refreshes, which update the latency estimates and do the other periodic work.
const REFRESH: Duration = Duration::from_millis(200);
/// Interval between refreshes of a channel that is not in use. The first calls after a pause may therefore use estimates that are this old.
/// To avoid that, every call would have to check whether the driver must be woken.
const IDLE_REFRESH: Duration = Duration::from_secs(2);
