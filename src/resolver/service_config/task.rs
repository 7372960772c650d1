//! The task that watches the key of a service config.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::state::{ConfigChange, ConfigState};
use super::status::ServiceConfigStatus;
use crate::backoff::jittered;
use crate::error::EtcdError;
use crate::etcd::{Etcd, KeyWatch, News};
use crate::keyspace::Key;
use crate::metrics::{Counter, Metrics, SERVICE_CONFIG_REJECTED, TARGET};

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
/// opened, and then once in each `interval`, the key is read, so that no change is missed.
pub(in crate::resolver) async fn follow(
    etcd: Etcd,
    key: Key,
    publisher: Arc<ConfigPublisher>,
    interval: Option<Duration>,
) {
    let mut follower = Follower {
        etcd,
        keys: [key.clone()],
        state: ConfigState::new(key),
        publisher,
        interval,
        warned: None,
    };
    let etcd = follower.etcd.clone();
    let mut watch = KeyWatch::new();
    let mut read_at = None;
    loop {
        tokio::select! {
            biased;
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

struct Follower {
    etcd: Etcd,
    keys: [Key; 1],
    state: ConfigState,
    publisher: Arc<ConfigPublisher>,
    interval: Option<Duration>,
    /// The time of the last warning about a value that cannot be used.
    warned: Option<Instant>,
}

impl Follower {
    /// Reads the key. Returns the time of the next read.
    async fn read(&mut self) -> Option<Instant> {
        let [key] = &self.keys;
        // The future of the request is boxed, because the task waits for the watch most of the time, and the memory of the request would
        // belong to the task during that time.
        let found = {
            let _permit = self.etcd.acquire_permit().await;
            Box::pin(self.etcd.read(key)).await
        };
        let wait = match found {
            Ok((header, found)) => {
                let change = self.state.on_read(header.revision, found);
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
    }
}

/// Maximum time before another attempt to read the key; the minimum is half of it.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// The same time if only an operator can resolve the error, such as a missing permission.
const OPERATOR_WAIT: Duration = Duration::from_secs(30);
/// Minimum time between two warnings about values that cannot be used.
const WARN_INTERVAL: Duration = Duration::from_secs(60);
