//! A source of endpoints that looks up a name with the system's resolver.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::BoxError;
use tower::discover::Change;

use crate::address::{Address, AddressPolicy};
use crate::channel::source::{EndpointSource, Endpoints, SourceContext, parse};

/// A source of endpoints that looks up the addresses of a name in the DNS, for example those of a headless service of Kubernetes.
///
/// Each IPv4 and each IPv6 address is an endpoint. So a server that has one of each counts as two endpoints. The name is looked up
///
/// - at the start,
/// - every [`interval`](Self::interval), 30 s by default,
/// - after a failed attempt to connect to an endpoint, because the endpoint may have moved, but not within 5 s of the start of the last
///   successful lookup.
///
/// The lookups use the resolver of the operating system (`getaddrinfo`), and so `/etc/hosts` and `/etc/resolv.conf`. If a lookup fails, or
/// its answer contains no address, the endpoints stay as they are. The lookup is then repeated after 1 s, 2 s, 4 s and so on, at most after
/// the interval. The errors of calls that find no endpoint contain the failure.
///
/// The name is the server name for TLS, unless the TLS configuration contains another one, and the authority of calls.
///
/// ```no_run
/// use std::time::Duration;
/// use tonic_balance::BalancedChannel;
/// use tonic_balance::channel::Dns;
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let dns = Dns::new("greeter.default.svc.cluster.local:50051").interval(Duration::from_secs(10));
/// let channel = BalancedChannel::builder().source(dns).connect().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Dns {
    name: String,
    interval: Duration,
    pub(super) lookup: Lookup,
}

pub(super) type Answer = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// The function that looks up a host and a port.
pub(super) type Lookup = Arc<dyn Fn(String, u16) -> Answer + Send + Sync>;

impl Dns {
    /// Creates a source for a name in the form `host:port`, `http://host:port`, or, with TLS configured, `https://host:port`. If the name
    /// has another form, the channel is [invalid](crate::error::ChannelError::InvalidOption).
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            interval: INTERVAL,
            lookup: Arc::new(|host, port| {
                Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
            }),
        }
    }

    /// Sets the interval between two lookups. Default 30 s; values below 5 s count as 5 s.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval.clamp(MIN_INTERVAL, MAX_INTERVAL);
        self
    }
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns")
            .field("name", &crate::address::without_password(&self.name))
            .field("interval", &self.interval)
            .finish_non_exhaustive()
    }
}

impl EndpointSource for Dns {
    type Attributes = ();
    type Error = Infallible;
    type Stream = UnboundedReceiverStream<Result<Change<Address, ()>, Infallible>>;

    fn start(self, context: &SourceContext) -> Result<Endpoints<Self::Stream>, BoxError> {
        let address = parse(&self.name, context.tls)?;
        let Some((host, port)) = address.host_and_port() else {
            return Err(format!("{address} is a Unix socket, which has no name to look up").into());
        };
        let (changes, stream) = mpsc::unbounded_channel();
        let (known, on_known) = oneshot::channel();
        let wake = Arc::new(Notify::new());
        let error = Arc::new(Mutex::new(None));
        let task = Task {
            host: host.to_owned(),
            port,
            interval: self.interval,
            lookup: self.lookup,
            policy: context.policy.clone(),
            addresses: BTreeSet::new(),
            changes,
            known: Some(known),
            wake: Arc::clone(&wake),
            error: Arc::clone(&error),
        };
        tokio::spawn(task.run());
        let current = move || error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut endpoints = Endpoints::new(UnboundedReceiverStream::new(stream))
            .known_after(async { drop(on_known.await) })
            .last_error(current)
            .on_refused(move |_| wake.notify_one())
            .service(address.as_str())
            .target(format!("dns:///{address}"));
        endpoints.name = Some(address);
        Ok(endpoints)
    }
}

/// The task that looks up the name until the channel is dropped.
struct Task {
    host: String,
    port: u16,
    interval: Duration,
    lookup: Lookup,
    policy: AddressPolicy,
    addresses: BTreeSet<Address>,
    changes: mpsc::UnboundedSender<Result<Change<Address, ()>, Infallible>>,
    /// Completes when the set of endpoints is known.
    known: Option<oneshot::Sender<()>>,
    /// Wakes the task after a failed attempt to connect.
    wake: Arc<Notify>,
    /// The error of the last lookup, if it failed.
    error: Arc<Mutex<Option<String>>>,
}

impl Task {
    async fn run(mut self) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let start = Instant::now();
            let answer = tokio::select! {
                answer = (self.lookup)(self.host.clone(), self.port) => answer,
                () = self.changes.closed() => return,
            };
            let outcome = self.allowed(answer);
            let wait = if outcome.is_ok() {
                backoff = FIRST_BACKOFF;
                self.interval
            } else {
                let wait = backoff;
                backoff = (backoff * 2).min(self.interval);
                wait
            };
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

    /// Returns the addresses that the policy allows, or the reason why there are none.
    fn allowed(&self, answer: io::Result<Vec<SocketAddr>>) -> Result<BTreeSet<Address>, String> {
        let found = answer.map_err(|error| error.to_string())?;
        let mut refused = None;
        let mut addresses = BTreeSet::new();
        for address in found {
            let checked = Address::try_from(address)
                .and_then(|address| self.policy.check(&address).map(|()| address));
            match checked {
                Ok(address) => {
                    addresses.insert(address);
                }
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            Some(error) if addresses.is_empty() => Err(error.to_string()),
            None if addresses.is_empty() => Err("the name has no address".to_owned()),
            _ => Ok(addresses),
        }
    }

    fn apply(&mut self, outcome: Result<BTreeSet<Address>, String>) {
        let failed = outcome.as_ref().err().map(|error| {
            let Self { host, port, .. } = self;
            format!("the lookup of {host}:{port} failed: {error}")
        });
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(failed) = &failed
            && error.as_ref() != Some(failed)
        {
            // A failure that repeats is logged once.
            tracing::warn!(error = failed, "the endpoints stay as they are");
        }
        *error = failed;
        drop(error);
        let Ok(addresses) = outcome else {
            return;
        };
        // New endpoints come first, so that the set is never empty while all addresses change.
        let inserted = addresses.difference(&self.addresses).cloned();
        let removed = self.addresses.difference(&addresses).cloned();
        let inserted = inserted.map(|address| Change::Insert(address, ()));
        for change in inserted.chain(removed.map(Change::Remove)) {
            // Fails only if the channel was dropped, and the task then ends.
            let _ = self.changes.send(Ok(change));
        }
        self.addresses = addresses;
        if let Some(known) = self.known.take() {
            let _ = known.send(());
        }
    }
}

/// gRPC's DNS resolver also waits 30 s between two lookups.
const INTERVAL: Duration = Duration::from_secs(30);
/// The time to live of the records of Kubernetes' DNS.
const MIN_INTERVAL: Duration = Duration::from_secs(5);
/// The end of the interval must be representable as an `Instant`.
const MAX_INTERVAL: Duration = Duration::from_secs(24 * 3600);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
