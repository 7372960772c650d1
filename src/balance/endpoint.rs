//! An endpoint: what callers and the driver count and know of an address.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use http::uri::Authority;

use super::load::Estimate;
use super::member::Member;
use super::outlier::Counts;
use super::ticket::Blame;
use crate::address::Address;

/// An address, over all its connections.
#[derive(Debug)]
pub(crate) struct Endpoint {
    address: Address,
    authority: Authority,
    calls: AtomicU64,
    failures: AtomicU64,
    /// Of the failures, those of the connection.
    faults: AtomicU64,
    overruns: AtomicU64,
    /// Calls that say nothing of the endpoint: refused unseen, or dropped by the caller.
    unjudged: AtomicU64,
    described: Mutex<Described>,
}

/// What only the driver and [`Endpoint::status`] touch.
#[derive(Debug)]
struct Described {
    state: EndpointState,
    weight: u32,
    last_resort: bool,
    ejected: bool,
    last_error: Option<Arc<str>>,
    connections: Vec<Weak<Member>>,
    /// What the last connection knew of the latency.
    estimate: Option<Estimate>,
}

impl Endpoint {
    pub(super) fn new(address: Address) -> Self {
        // Host and port of an address are a subset of what an authority may be.
        let authority = Authority::try_from(address.as_str())
            .unwrap_or_else(|_| Authority::from_static("localhost"));
        Self {
            address,
            authority,
            calls: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            overruns: AtomicU64::new(0),
            unjudged: AtomicU64::new(0),
            described: Mutex::new(Described {
                state: EndpointState::Idle,
                weight: 1,
                last_resort: false,
                ejected: false,
                last_error: None,
                connections: Vec::new(),
                estimate: None,
            }),
        }
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    pub(super) fn set_state(&self, state: EndpointState) {
        self.lock().state = state;
    }

    pub(super) fn set_attributes(&self, weight: u32, last_resort: bool) {
        let mut described = self.lock();
        described.weight = weight;
        described.last_resort = last_resort;
    }

    pub(super) fn set_ejected(&self, ejected: bool) {
        self.lock().ejected = ejected;
    }

    /// All that was counted so far, for whoever takes the difference.
    pub(super) fn tally(&self) -> Tally {
        let described = self.lock();
        let members = described.connections.iter().filter_map(Weak::upgrade);
        let in_flight = members.map(|member| u64::from(member.load().in_flight()));
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Tally {
            judged: count(&self.calls)
                .saturating_sub(in_flight.sum())
                .saturating_sub(count(&self.unjudged)),
            faults: count(&self.faults),
            overruns: count(&self.overruns),
        }
    }

    pub(super) fn set_last_error(&self, error: Arc<str>) {
        self.lock().last_error = Some(error);
    }

    pub(super) fn add_connection(&self, member: &Arc<Member>) {
        let mut described = self.lock();
        described
            .connections
            .retain(|known| known.strong_count() > 0);
        described.connections.push(Arc::downgrade(member));
    }

    /// Remembers what a connection that goes knew, for the next one.
    pub(super) fn keep_estimate(&self, estimate: Option<Estimate>) {
        let mut described = self.lock();
        described.estimate = estimate.or(described.estimate);
    }

    pub(super) fn estimate(&self) -> Option<Estimate> {
        self.lock().estimate
    }

    /// A call was sent to it.
    pub(super) fn on_call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn on_failure(&self, blame: Blame) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        if blame == Blame::Connection {
            self.faults.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A call has overrun its deadline.
    pub(super) fn on_overrun(&self) {
        self.overruns.fetch_add(1, Ordering::Relaxed);
    }

    /// A call that was sent says nothing of it.
    pub(super) fn on_unjudged(&self) {
        self.unjudged.fetch_add(1, Ordering::Relaxed);
    }

    /// How the endpoint is now.
    pub(super) fn status(&self) -> EndpointStatus {
        let described = self.lock();
        let members = described.connections.iter().filter_map(Weak::upgrade);
        let members: Vec<_> = members.collect();
        let latency = members
            .iter()
            .find_map(|member| member.load().estimate())
            .or(described.estimate);
        EndpointStatus {
            address: self.address.clone(),
            state: described.state,
            weight: described.weight,
            last_resort: described.last_resort,
            connections: members.len(),
            in_flight: members
                .iter()
                .map(|member| member.load().in_flight() as usize)
                .sum(),
            latency: latency.map(|estimate| estimate.latency()),
            round_trip: members
                .last()
                .map(|member| member.connection().round_trip()),
            calls: self.calls.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            ejected: described.ejected,
            last_error: described.last_error.as_deref().map(str::to_owned),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Described> {
        // Nothing panics while it is held; and the data would be whole even then.
        self.described
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an endpoint has done since it is known.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    judged: u64,
    faults: u64,
    overruns: u64,
}

impl Tally {
    /// What was done since an earlier time.
    pub(super) fn since(self, earlier: Self) -> Counts {
        let faults = self.faults.saturating_sub(earlier.faults);
        let overruns = self.overruns.saturating_sub(earlier.overruns);
        let judged = self.judged.saturating_sub(earlier.judged);
        Counts {
            successes: judged.saturating_sub(faults + overruns),
            failures: faults,
            overruns,
        }
    }
}

/// An endpoint of a channel, as it was at one moment.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct EndpointStatus {
    /// Where it is.
    pub address: Address,
    /// Whether it can take calls.
    pub state: EndpointState,
    /// Its share of the calls relative to the others'.
    pub weight: u32,
    /// Whether the registry has lost it together with most others: it gets calls only while nothing else is ready.
    pub last_resort: bool,
    /// How many connections to it are open.
    pub connections: usize,
    /// Calls whose response has not ended.
    pub in_flight: usize,
    /// The mean time to a response's head over the last seconds; none before the first call.
    pub latency: Option<Duration>,
    /// The round trip of the last connection's first PING.
    pub round_trip: Option<Duration>,
    /// Calls sent to it.
    pub calls: u64,
    /// Calls that it failed: connection lost, or a status that says the server is at fault.
    pub failures: u64,
    /// Whether it is ready but gets calls only while nothing else is, because it does not answer any more or has failed too many
    /// ([`OutlierDetection`](crate::OutlierDetection)).
    pub ejected: bool,
    /// Why the last connection attempt failed, or the last connection was lost.
    pub last_error: Option<String>,
}

/// The connectivity of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndpointState {
    /// No connection, and none being made: it waits for its turn, or is a last resort that is not dialled.
    Idle,
    /// A connection is being made.
    Connecting,
    /// A connection has answered and takes calls.
    Ready,
    /// The last attempt failed, and the next follows after a backoff; or it says itself that it does not serve
    /// ([`health_check`](crate::ChannelBuilder::health_check)).
    TransientFailure,
    /// Removed; its last calls are being finished.
    Draining,
}
