//! Balancing: from a stream of changes to connections that are ready, and from those to a pick.
//!
//! One task per channel, the *driver*, owns every subchannel and is polled whether calls run or not. It publishes an immutable ready set;
//! a call picks from it in its caller's task. Nothing here knows where the changes come from.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_stream::Stream;
use tower::discover::Change;
use tracing::Instrument;

use crate::address::Address;
use crate::instance::Instance;
use crate::transport::connect::Connector;
use crate::transport::health::HealthCheck;

mod driver;
mod endpoint;
mod feed;
mod health;
mod load;
mod member;
mod outlier;
mod picker;
mod pool;
mod rotation;
#[cfg(test)]
mod simulation;
mod subchannel;
mod ticket;
mod waiters;
mod zone;

pub(crate) use endpoint::Endpoint;
pub use endpoint::{EndpointState, EndpointStatus};
pub(crate) use feed::Feed;
pub(crate) use member::Member;
pub use outlier::OutlierDetection;
pub use picker::Policy;
pub(crate) use picker::{LOOK_AROUND, Pick};
pub(crate) use ticket::{Blame, Ticket};
pub(crate) use waiters::Waiters;

use driver::Driver;
use member::Seat;
use picker::Picker;
use pool::ReadySet;

/// The options of a balancer.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) policy: Policy,
    pub(crate) seed: Option<u64>,
    pub(crate) connections_per_endpoint: usize,
    pub(crate) max_backoff: Duration,
    pub(crate) max_waiters: usize,
    pub(crate) outlier_detection: Option<OutlierDetection>,
    /// What endpoints are asked of their health, if they are.
    pub(crate) health_check: Option<HealthCheck>,
    /// How long a new endpoint takes to its full share.
    pub(crate) slow_start: Option<Duration>,
    pub(crate) on_refused: Option<OnRefused>,
    /// Whether a connection whose peer has stopped answering is left for a new one, in place of waiting for it to answer again.
    pub(crate) redial_stalled: bool,
    /// The zone whose endpoints are preferred.
    pub(crate) zone: Option<Box<str>>,
}

/// Whom to tell that an address, though it is announced, takes no connections. Called by the driver for each attempt, so it never waits.
#[derive(Clone)]
pub(crate) struct OnRefused(pub(crate) Arc<dyn Fn(&Address) + Send + Sync>);

impl std::fmt::Debug for OnRefused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnRefused").finish_non_exhaustive()
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            seed: None,
            connections_per_endpoint: 1,
            max_backoff: MAX_BACKOFF,
            max_waiters: MAX_WAITERS,
            outlier_detection: None,
            health_check: None,
            slow_start: None,
            on_refused: None,
            redial_stalled: false,
            zone: None,
        }
    }
}

/// The driver's task. It ends when this goes; calls in flight finish.
#[derive(Debug)]
pub(crate) struct Balancer {
    shared: Arc<Shared>,
    driver: AbortHandle,
}

impl Balancer {
    /// Starts the driver.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub(crate) fn start<S, E>(
        service: &str,
        changes: Feed<S>,
        connector: Connector,
        options: Options,
    ) -> Self
    where
        S: Stream<Item = Result<Change<Address, Instance>, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let shared = Arc::new(Shared::new(&options));
        let span = tracing::info_span!("balancer", service);
        let driver = Driver::new(Arc::clone(&shared), connector, options);
        let driver = tokio::spawn(driver.run(changes).instrument(span)).abort_handle();
        Self { shared, driver }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// What calls see of the balancer.
#[derive(Debug)]
pub(crate) struct Shared {
    published: ArcSwap<Published>,
    /// Tells those that wait for a connection of every new set.
    changed: Notify,
    /// Tells the driver that a call found every connection full, or has given one up.
    demand: Notify,
    /// Connections that calls have given up and the driver has not taken out of the set yet.
    given_up: Mutex<Vec<Arc<Member>>>,
    waiters: Arc<Waiters>,
    picker: Picker,
    directory: Mutex<HashMap<Address, Arc<Endpoint>>>,
    started: Instant,
}

impl Shared {
    fn new(options: &Options) -> Self {
        Self {
            published: ArcSwap::from_pointee(Published::default()),
            changed: Notify::new(),
            demand: Notify::new(),
            given_up: Mutex::new(Vec::new()),
            waiters: Arc::new(Waiters::new(options.max_waiters)),
            picker: Picker::new(options.policy, options.seed),
            directory: Mutex::new(HashMap::new()),
            started: Instant::now(),
        }
    }

    /// Takes a place on a `usable` connection.
    ///
    /// The place is on a connection and not at an index: whatever is removed between the pick and the send, the call can reach no other
    /// endpoint.
    pub(crate) fn pick(&self, usable: impl Fn(&Arc<Member>) -> bool) -> Pick<Ticket> {
        self.look(LOOK_AROUND).pick(usable)
    }

    /// The set as it is now. A pick that finds so many places taken does not look at more of them.
    pub(crate) fn look(&self, around: usize) -> Look<'_> {
        Look {
            picker: &self.picker,
            published: self.published.load(),
            around,
        }
    }

    /// How the set of endpoints is.
    pub(crate) fn summary(&self) -> Summary {
        self.published.load().summary.clone()
    }

    pub(crate) fn changed(&self) -> &Notify {
        &self.changed
    }

    pub(crate) fn waiters(&self) -> &Arc<Waiters> {
        &self.waiters
    }

    /// Asks the driver for more connections to endpoints whose streams are all in use.
    pub(crate) fn demand(&self) {
        self.demand.notify_one();
    }

    /// Leaves a connection to the calls that are on it, for a new one to the same endpoint. Whoever asks for [`given_up`](Self::given_up)
    /// from now on is kept from it, though the driver takes it out of the set a little later.
    pub(crate) fn give_up(&self, member: &Arc<Member>) {
        self.lock_given_up().push(Arc::clone(member));
        self.demand.notify_one();
    }

    /// The connections that are to be left and may be picked all the same.
    pub(crate) fn given_up(&self) -> Vec<Arc<Member>> {
        self.lock_given_up().clone()
    }

    fn lock_given_up(&self) -> MutexGuard<'_, Vec<Arc<Member>>> {
        self.given_up.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the channel was made.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Every endpoint as it is now, sorted by address.
    pub(crate) fn endpoints(&self) -> Vec<EndpointStatus> {
        let known: Vec<_> = self.directory().values().cloned().collect();
        let mut statuses: Vec<_> = known.iter().map(|endpoint| endpoint.status()).collect();
        statuses.sort_by(|a, b| a.address.cmp(&b.address));
        statuses
    }

    /// Shows an endpoint no more.
    fn forget(&self, endpoint: &Arc<Endpoint>) {
        let mut directory = self.directory();
        // The address may have been registered again, with an endpoint of its own.
        if directory
            .get(endpoint.address())
            .is_some_and(|known| Arc::ptr_eq(known, endpoint))
        {
            directory.remove(endpoint.address());
        }
    }

    fn directory(&self) -> MutexGuard<'_, HashMap<Address, Arc<Endpoint>>> {
        // Nothing panics while it is held; and the data would be whole even then.
        self.directory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One state of the set, to pick from and to judge by. Two looks may see two of them: nothing that is ready in the one and nothing that is
/// on its way in the other.
#[derive(Debug)]
pub(crate) struct Look<'a> {
    picker: &'a Picker,
    published: Guard<Arc<Published>>,
    around: usize,
}

impl Look<'_> {
    /// See [`Shared::pick`].
    pub(crate) fn pick(&self, usable: impl Fn(&Arc<Member>) -> bool) -> Pick<Ticket> {
        let usable = |seat: &Seat| usable(seat.member());
        match self.picker.pick(&self.published.ready, usable, self.around) {
            Pick::Taken(seat) => Pick::Taken(Ticket::taken(seat.member())),
            Pick::Full => Pick::Full,
            Pick::Excluded => Pick::Excluded,
            Pick::Empty => Pick::Empty,
        }
    }

    pub(crate) fn summary(&self) -> &Summary {
        &self.published.summary
    }
}

/// One state of the set of endpoints.
#[derive(Debug, Default)]
struct Published {
    ready: ReadySet<Seat>,
    summary: Summary,
}

/// The numbers behind an error message.
#[derive(Clone, Debug, Default)]
pub(crate) struct Summary {
    /// Whether the set of endpoints is known: a first list is in.
    pub(crate) known: bool,
    pub(crate) endpoints: usize,
    pub(crate) ready: usize,
    /// Endpoints that are neither ready nor failing: a connection may be there any moment.
    pub(crate) pending: usize,
    /// The last failure to connect, or loss of a connection.
    pub(crate) last_error: Option<Arc<EndpointError>>,
}

/// What happened to an endpoint's connection.
#[derive(Debug, thiserror::Error)]
#[error("endpoint {address}: {reason}")]
pub(crate) struct EndpointError {
    pub(crate) address: Address,
    /// The failure with all its causes, in one line.
    pub(crate) reason: Arc<str>,
}

/// A time to come has to fit into an `Instant`.
pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
/// gRPC's connection backoff document.
const MAX_BACKOFF: Duration = Duration::from_secs(120);
/// Each waiting call holds its request, a few kilobytes at least: more than this would be memory spent on calls that have no chance.
const MAX_WAITERS: usize = 32_768;
