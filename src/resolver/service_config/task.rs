//! The task that watches the key of a service config.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::state::{ConfigChange, ConfigState, ToCache};
use super::status::ServiceConfigStatus;
use crate::backoff::jittered;
use crate::error::EtcdError;
use crate::etcd::{Etcd, KeyWatch, News};
use crate::keyspace::Key;
use crate::metrics::{Counter, Metrics, SERVICE_CONFIG_REJECTED, TARGET};
use crate::resolver::cache::{
    CACHE_DELAY, CachedConfig, ConfigCache, READ_TIMEOUT, WRITE_AGAIN, WRITE_DELAY,
};

/// Passes the service config to the channels and to the status.
pub(in crate::resolver) struct ConfigPublisher {
    pub(in crate::resolver) status: watch::Sender<ServiceConfigStatus>,
    rejected: Option<Box<dyn Counter>>,
}

impl ConfigPublisher {
    pub(in crate::resolver) fn new(key: &Key, metrics: Option<&Metrics>, target: &str) -> Self {
        let rejected = metrics
            .and_then(|metrics| metrics.counter(&SERVICE_CONFIG_REJECTED, &[(TARGET, target)]));
        let state = ConfigState::new(key.clone());
        Self {
            status: watch::Sender::new(state.status().clone()),
            rejected,
        }
    }

    /// Publishes the status if it has changed.
    fn publish(&self, status: &ServiceConfigStatus) {
        self.status.send_if_modified(|current| {
            let is_new = current != status;
            if is_new {
                current.clone_from(status);
            }
            is_new
        });
    }

    fn on_rejected(&self) {
        if let Some(rejected) = &self.rejected {
            rejected.add(1);
        }
    }
}

impl std::fmt::Debug for ConfigPublisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigPublisher")
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

/// Watches the key of a service config, in an endless loop. The watch uses a stream that the resolver already has. After the watch was
/// opened, and then once in each `interval`, the key is read, so that no change is missed. With a cache, the service config of the cache is
/// used until etcd answers, and the cache is kept up to date.
pub(in crate::resolver) async fn follow(
    etcd: Etcd,
    key: Key,
    publisher: Arc<ConfigPublisher>,
    interval: Option<Duration>,
    cache: Option<ConfigCache>,
) {
    let mut follower = Follower {
        etcd,
        keys: [key.clone()],
        state: ConfigState::new(key),
        publisher,
        interval,
        warned: None,
        load_at: cache.is_some().then(|| Instant::now() + CACHE_DELAY),
        store_at: None,
        storing: None,
        has_read: false,
        cache,
    };
    let etcd = follower.etcd.clone();
    let mut watch = KeyWatch::new();
    let mut read_at = None;
    loop {
        tokio::select! {
            biased;
            () = until(follower.load_at) => follower.load().await,
            () = until(follower.store_at) => follower.store(),
            stored = ended(&mut follower.storing) => follower.on_stored(stored),
            () = until(read_at) => read_at = follower.read().await,
            news = watch.next(&etcd, &follower.keys) => match news {
                // Events from before the opening are not delivered, so the key is read.
                News::Opened => read_at = Some(Instant::now()),
                News::Events(events) => {
                    for event in events {
                        let change = follower.state.on_event(event);
                        follower.publish(change.as_ref());
                    }
                }
                News::Lost(error) => follower.on_trouble(&error),
            },
        }
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// Waits for the end of a write. A write that has panicked counts as one that succeeded.
async fn ended(write: &mut Option<JoinHandle<io::Result<()>>>) -> io::Result<()> {
    let Some(running) = write else {
        return std::future::pending().await;
    };
    let ended = running.await;
    *write = None;
    ended.unwrap_or(Ok(()))
}

struct Follower {
    etcd: Etcd,
    keys: [Key; 1],
    state: ConfigState,
    publisher: Arc<ConfigPublisher>,
    interval: Option<Duration>,
    /// The time of the last warning about a value that cannot be used.
    warned: Option<Instant>,
    cache: Option<ConfigCache>,
    /// The time at which the cache is used if etcd has not answered before.
    load_at: Option<Instant>,
    /// The time at which the cache is written.
    store_at: Option<Instant>,
    /// A running write of the cache. It must not delay the events of the watch.
    storing: Option<JoinHandle<io::Result<()>>>,
    /// Whether the key has been read since the start.
    has_read: bool,
}

impl Follower {
    /// Reads the key. Returns the time of the next read.
    async fn read(&mut self) -> Option<Instant> {
        let (etcd, keys) = (self.etcd.clone(), self.keys.clone());
        // The future of the request is boxed, because the task waits for the watch most of the time, and the memory of the request would
        // belong to the task during that time.
        let mut reading = Box::pin(async move {
            let _permit = etcd.acquire_permit().await;
            let [key] = &keys;
            etcd.read(key).await
        });
        // A read can take seconds, and must not delay the use of the cache.
        let found = loop {
            tokio::select! {
                biased;
                found = &mut reading => break found,
                () = until(self.load_at) => self.load().await,
            }
        };
        let wait = match found {
            Ok((header, found)) => {
                let change = self.state.on_read(header.revision, found);
                if !std::mem::replace(&mut self.has_read, true) {
                    // The file may have the service config of an earlier run.
                    self.on_changed();
                }
                self.publish(change.as_ref());
                self.interval
            }
            Err(error) => {
                self.on_trouble(&error);
                let needs_operator = error.kind().needs_operator() || error.kind().is_refusal();
                Some(if needs_operator {
                    OPERATOR_WAIT
                } else {
                    READ_AGAIN
                })
            }
        };
        let wait = wait.map(|wait| jittered(wait, &mut fastrand::Rng::new()));
        wait.and_then(|wait| Instant::now().checked_add(wait))
    }

    /// Uses the service config of the cache if etcd has not answered since the start.
    async fn load(&mut self) {
        self.load_at = None;
        let Some(cache) = self.cache.clone().filter(|_| !self.state.is_known()) else {
            return;
        };
        let path = cache.path().to_owned();
        let load = tokio::task::spawn_blocking(move || cache.load());
        let used = match timeout(READ_TIMEOUT, load).await {
            Ok(Ok(Ok(Some(CachedConfig { revision, json })))) => {
                self.state.on_cached(revision, json.as_bytes())
            }
            Ok(Ok(Ok(None)) | Err(_)) => Ok(None),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Err(_) => Err(format!("it was not read within {READ_TIMEOUT:?}")),
        };
        match used {
            Ok(change) => self.publish(change.as_ref()),
            Err(error) => {
                tracing::warn!(file = %path.display(), error, "could not use the cache file");
            }
        }
    }

    /// Schedules a write of the cache, unless one is scheduled already.
    fn on_changed(&mut self) {
        if self.cache.is_some() {
            let at = Instant::now() + WRITE_DELAY;
            self.store_at.get_or_insert(at);
        }
    }

    /// Starts to write the service config in force to the cache, or to remove the file if there is none.
    fn store(&mut self) {
        self.store_at = None;
        if self.storing.is_some() {
            // Two writes could end in the wrong order.
            self.on_changed();
            return;
        }
        let config = match self.state.to_cache() {
            ToCache::Config(revision, config) => Some(CachedConfig {
                revision,
                json: config.as_json().to_owned(),
            }),
            ToCache::Nothing => None,
            ToCache::Unchanged => return,
        };
        let Some(cache) = self.cache.clone() else {
            return;
        };
        let store = tokio::task::spawn_blocking(move || cache.store(config));
        self.storing = Some(store);
    }

    /// Handles the end of a write. A failed one is repeated.
    fn on_stored(&mut self, stored: io::Result<()>) {
        if let (Err(error), Some(cache)) = (stored, &self.cache) {
            tracing::warn!(file = %cache.path().display(), %error, "could not write the cache");
            let again = Instant::now() + WRITE_AGAIN;
            self.store_at.get_or_insert(again);
        }
    }

    fn on_trouble(&mut self, error: &EtcdError) {
        tracing::debug!(%error, "the service config cannot be read or watched");
        self.state.on_trouble(error.to_string());
        self.publish(None);
    }

    fn publish(&mut self, change: Option<&ConfigChange>) {
        let status = self.state.status();
        let key = &status.key;
        match change {
            None => {}
            Some(ConfigChange::Applied(revision)) => {
                tracing::info!(key, %revision, "the service config in etcd applies");
            }
            Some(ConfigChange::Cached(revision)) => {
                tracing::warn!(
                    key,
                    %revision,
                    "etcd has not answered since the start: using the service config of the cache"
                );
            }
            Some(ConfigChange::Removed) => {
                tracing::info!(
                    key,
                    "the service config was deleted: the options of the program apply"
                );
            }
            Some(ConfigChange::Rejected(revision)) => {
                self.publisher.on_rejected();
                let error = status.last_error.as_deref().unwrap_or_default();
                let now = Instant::now();
                // Warnings are rate-limited, because a writer that stores a bad value every second must not flood the log of every client.
                if self.warned.is_none_or(|at| now >= at + WARN_INTERVAL) {
                    self.warned = Some(now);
                    tracing::warn!(key, %revision, error, "the service config cannot be used; the last good one stays in force");
                } else {
                    tracing::debug!(key, %revision, error, "the service config cannot be used; the last good one stays in force");
                }
            }
        }
        self.publisher.publish(status);
        if matches!(
            change,
            Some(ConfigChange::Applied(_) | ConfigChange::Removed)
        ) {
            self.on_changed();
        }
    }
}

/// Maximum time before another attempt to read the key; the minimum is half of it.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// The same time if only an operator can resolve the error, such as a missing permission.
const OPERATOR_WAIT: Duration = Duration::from_secs(30);
/// Minimum time between two warnings about values that cannot be used.
const WARN_INTERVAL: Duration = Duration::from_secs(60);
