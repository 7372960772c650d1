//! The task that looks up a name again and again, until the channel is dropped.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::discover::Change;

use crate::address::{Address, AddressPolicy};
use crate::channel::source::Endpoints;

/// A kind of lookup.
pub(super) trait Lookup: Send + 'static {
    /// The attributes of an endpoint.
    type Attributes: Clone + PartialEq + Send + 'static;

    /// Looks up the name once. Fails if the endpoints must stay as they are.
    fn lookup(&mut self) -> impl Future<Output = Result<Found<Self::Attributes>, String>> + Send;
}

/// The result of a successful lookup.
#[derive(Debug)]
pub(super) struct Found<A> {
    pub(super) endpoints: Vec<(SocketAddr, A)>,
    /// The time for which the records are valid, if it is known.
    pub(super) ttl: Option<Duration>,
    /// Why a part of the endpoints could not be looked up. The lookup is then repeated as after a failure.
    pub(super) trouble: Option<String>,
}

/// The changes of the endpoints of a name.
pub(super) type Changes<A> = UnboundedReceiverStream<Result<Change<Address, A>, Infallible>>;

/// Starts the task. `name` is the name in messages.
pub(super) fn start<L: Lookup>(
    name: String,
    lookup: L,
    interval: Duration,
    policy: AddressPolicy,
) -> Endpoints<Changes<L::Attributes>> {
    let (changes, stream) = mpsc::unbounded_channel();
    let (known, on_known) = oneshot::channel();
    let wake = Arc::new(Notify::new());
    let error = Arc::new(Mutex::new(None));
    let task = Task {
        name: name.clone(),
        lookup,
        interval: interval.clamp(MIN_INTERVAL, MAX_INTERVAL),
        policy,
        endpoints: BTreeMap::new(),
        changes,
        known: Some(known),
        wake: Arc::clone(&wake),
        error: Arc::clone(&error),
        backoff: FIRST_BACKOFF,
    };
    tokio::spawn(task.run());
    let lost = Arc::clone(&wake);
    let current = move || error.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Endpoints::new(UnboundedReceiverStream::new(stream))
        .known_after(async { drop(on_known.await) })
        .last_error(current)
        .on_refused(move |_| wake.notify_one())
        .on_lost(move |_| lost.notify_one())
        .target(format!("dns:///{name}"))
        .service(name)
}

struct Task<L: Lookup> {
    name: String,
    lookup: L,
    interval: Duration,
    policy: AddressPolicy,
    endpoints: BTreeMap<Address, L::Attributes>,
    changes: mpsc::UnboundedSender<Result<Change<Address, L::Attributes>, Infallible>>,
    /// Completes when the set of endpoints is known.
    known: Option<oneshot::Sender<()>>,
    /// Wakes the task after the end of a connection, and after a failed attempt to connect.
    wake: Arc<Notify>,
    /// The error of the last lookup, if it failed.
    error: Arc<Mutex<Option<String>>>,
    /// The wait after the next failure.
    backoff: Duration,
}

/// The result of a lookup, with the endpoints that the policy allows.
struct Allowed<A> {
    endpoints: BTreeMap<Address, A>,
    ttl: Option<Duration>,
    trouble: Option<String>,
}

impl<L: Lookup> Task<L> {
    async fn run(mut self) {
        loop {
            let start = Instant::now();
            let answer = tokio::select! {
                answer = timeout(LOOKUP_TIMEOUT, self.lookup.lookup()) => {
                    answer.unwrap_or_else(|_| Err(LATE.to_owned()))
                }
                () = self.changes.closed() => return,
            };
            let outcome = answer.and_then(|found| self.allowed(found));
            let wait = self.next_wait(&outcome);
            self.apply(outcome);
            let refused = async {
                self.wake.notified().await;
                sleep_until(start + MIN_INTERVAL.min(wait)).await;
            };
            tokio::select! {
                () = sleep_until(Instant::now() + wait) => {}
                () = refused => {}
                () = self.changes.closed() => return,
            }
        }
    }

    /// Returns the endpoints that the policy allows, or the reason why there are none.
    fn allowed(&self, found: Found<L::Attributes>) -> Result<Allowed<L::Attributes>, String> {
        let mut refused = None;
        let mut endpoints = BTreeMap::new();
        for (address, attributes) in found.endpoints {
            let checked = Address::try_from(address)
                .and_then(|address| self.policy.check(&address).map(|()| address));
            match checked {
                Ok(address) => {
                    endpoints.insert(address, attributes);
                }
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            Some(error) if endpoints.is_empty() => Err(error.to_string()),
            None if endpoints.is_empty() => Err("the name has no address".to_owned()),
            _ => Ok(Allowed {
                endpoints,
                ttl: found.ttl,
                trouble: found.trouble,
            }),
        }
    }

    /// Returns the time from the end of a lookup to the next one: the time for which the records are valid, within limits, or the backoff
    /// after a failure.
    fn next_wait(&mut self, outcome: &Result<Allowed<L::Attributes>, String>) -> Duration {
        if let Ok(Allowed {
            ttl, trouble: None, ..
        }) = outcome
        {
            self.backoff = FIRST_BACKOFF;
            let ttl = ttl.map_or(self.interval, |ttl| ttl.max(MIN_INTERVAL));
            return ttl.min(self.interval);
        }
        let wait = self.backoff;
        self.backoff = (self.backoff * 2).min(self.interval);
        wait
    }

    fn apply(&mut self, outcome: Result<Allowed<L::Attributes>, String>) {
        let name = &self.name;
        let failed = match &outcome {
            Ok(allowed) => allowed.trouble.as_ref(),
            Err(error) => Some(error),
        };
        let failed = failed.map(|error| format!("the lookup of {name} failed: {error}"));
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(failed) = &failed
            && error.as_ref() != Some(failed)
        {
            // A failure that repeats is logged once.
            if outcome.is_ok() {
                tracing::warn!(
                    error = failed,
                    "the endpoints of the target stay as they are"
                );
            } else {
                tracing::warn!(error = failed, "the endpoints stay as they are");
            }
        }
        *error = failed;
        drop(error);
        let Ok(Allowed { endpoints, .. }) = outcome else {
            return;
        };
        // New endpoints come first, so that the set is never empty while all addresses change.
        let is_new = |(address, attributes): &(&Address, _)| {
            self.endpoints.get(*address) != Some(*attributes)
        };
        let inserted = endpoints.iter().filter(is_new);
        let inserted = inserted
            .map(|(address, attributes)| Change::Insert(address.clone(), attributes.clone()));
        let is_gone = |address: &&Address| !endpoints.contains_key(*address);
        let removed = self.endpoints.keys().filter(is_gone).cloned();
        for change in inserted.chain(removed.map(Change::Remove)) {
            // Fails only if the channel was dropped, and the task then ends.
            let _ = self.changes.send(Ok(change));
        }
        self.endpoints = endpoints;
        if let Some(known) = self.known.take() {
            let _ = known.send(());
        }
    }
}

/// gRPC's DNS resolver also waits 30 s between two lookups.
pub(super) const INTERVAL: Duration = Duration::from_secs(30);
/// The time to live of the records of Kubernetes' DNS.
const MIN_INTERVAL: Duration = Duration::from_secs(5);
/// The end of the interval must be representable as an `Instant`.
const MAX_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// Timeout of a lookup. The endpoints of many targets can need many queries, and each of them can time out.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);
/// The failure after this timeout.
const LATE: &str = "it was not complete after 30 s";
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
