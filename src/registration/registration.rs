//! A registered server, and the requests to the task that keeps it registered.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tonic_balance::Address;
use tracing::Instrument;

use super::entry::{Entry, check_weight};
use super::metrics::RegistrationMetrics;
use super::status::RegistrationState;
use super::task::{Answer, Failure, PausedBy, Request, Task};
use crate::error::RegisterError;
use crate::etcd::Etcd;

/// A registered server. It stays registered until it is [deregistered](Self::deregister). After a failure of etcd, the entry is restored.
///
/// Dropping a `Registration` deregisters the server in the background and does not report the result. If the runtime ends right after the
/// drop, as at the end of `main`, the entry stays until its lease expires. To avoid this, await [`deregister`](Self::deregister).
///
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let registry = tonic_etcd::Registry::connect(["127.0.0.1:2379"]).await?;
/// let registration = registry
///     .registration("helloworld.Greeter")
///     .address("10.0.0.5:50051")
///     .zone("eu-1a")
///     .register()
///     .await?;
/// // serve ...
/// registration.deregister().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping it deregisters the server"]
pub struct Registration {
    pub(super) parts: Arc<Parts>,
    /// The task deregisters the server when the last sender is dropped.
    pub(super) requests: mpsc::Sender<Request>,
}

/// The parts that a registration and its handles share.
#[derive(Debug)]
pub(super) struct Parts {
    /// The key of each service and the name of the service. The name is empty for an exact key.
    pub(super) keys: Vec<(String, String)>,
    pub(super) entry: Entry,
    endpoints: Vec<String>,
    change_timeout: Duration,
    states: watch::Receiver<RegistrationState>,
    /// The instruments, if metrics are enabled. They are kept here as well as in the task, so that a task that has panicked, or whose runtime
    /// has ended, is exported as not registered. Without them, the gauges would vanish, and no alert would fire.
    _metrics: Option<Arc<RegistrationMetrics>>,
}

/// The data from which the handles of a registration are created.
#[derive(Clone, Debug)]
pub(crate) struct Started {
    pub(super) parts: Arc<Parts>,
    pub(super) requests: mpsc::WeakSender<Request>,
}

impl Registration {
    /// Starts the task of the registration. [`registered`](Self::registered) waits for the result.
    pub(super) fn start(
        etcd: Etcd,
        entry: Entry,
        change_timeout: Duration,
        dedicated_thread: bool,
        states: watch::Sender<RegistrationState>,
    ) -> Result<Self, RegisterError> {
        let (requests, inbox) = mpsc::channel(8);
        let services = entry.services.iter().cloned();
        let services = services.chain(std::iter::repeat(String::new()));
        let keys = entry.keys.iter().map(ToString::to_string);
        // A status has no metrics: they would be those of a server without a name.
        let metrics = etcd.metrics().filter(|_| !entry.is_status);
        let metrics = metrics.map(|metrics| {
            RegistrationMetrics::start(metrics, &entry.services, states.subscribe())
        });
        let parts = Parts {
            keys: keys.zip(services).collect(),
            entry: entry.clone(),
            endpoints: etcd.endpoints(),
            change_timeout,
            states: states.subscribe(),
            _metrics: metrics.clone(),
        };
        let registration = Self {
            parts: Arc::new(parts),
            requests,
        };
        let span = tracing::info_span!("registration", key = registration.key());
        let run = async move |etcd| {
            let task = Task::new(etcd, entry, inbox, states, metrics, change_timeout);
            // The future is boxed because the futures of the etcd client are large.
            Box::pin(task.run().instrument(span)).await;
        };
        if dedicated_thread {
            let started = run_on_own_thread(etcd, run);
            started.map_err(|cause| RegisterError::Thread {
                key: registration.key().to_owned(),
                cause: Arc::new(cause),
            })?;
        } else {
            tokio::spawn(Box::pin(run(etcd)));
        }
        Ok(registration)
    }

    /// Returns the data for handles of the registration.
    pub(crate) fn started(&self) -> Started {
        Started {
            parts: Arc::clone(&self.parts),
            requests: self.requests.downgrade(),
        }
    }

    /// Waits until the registration succeeds for the first time. Fails if an error occurs that only an operator can resolve, if the
    /// registration ends, or if the timeout `bound` expires.
    pub(crate) async fn registered(&self, bound: Duration) -> Result<(), RegisterError> {
        let mut states = self.parts.states.clone();
        let first = async {
            loop {
                let state = states.borrow_and_update().clone();
                match state {
                    // An operator can pause the server before its first registration.
                    RegistrationState::Registered { .. } | RegistrationState::Paused => {
                        return Ok(());
                    }
                    RegistrationState::Registering {
                        last_error: Some(cause),
                    } if cause.kind().needs_operator() => {
                        return Err(RegisterError::Refused {
                            key: self.key().to_owned(),
                            cause,
                        });
                    }
                    RegistrationState::Deregistered | RegistrationState::Aborted => {
                        return Err(self.ended());
                    }
                    _ => {}
                }
                if states.changed().await.is_err() {
                    return Err(self.ended());
                }
            }
        };
        match timeout(bound, first).await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.timed_out(bound)),
        }
    }

    /// Returns the key in etcd, or the first key if the registration has [several](Self::keys).
    #[must_use]
    pub fn key(&self) -> &str {
        self.parts.keys.first().map_or("", |(key, _)| key)
    }

    /// Returns the keys in etcd, one for each service, in the order in which the services were added.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.parts.keys.iter().map(|(key, _)| key.as_str())
    }

    /// Returns the advertised address.
    #[must_use]
    pub fn address(&self) -> &Address {
        self.parts.entry.instance.address()
    }

    /// Returns the current state of the registration.
    #[must_use]
    pub fn state(&self) -> RegistrationState {
        self.parts.states.borrow().clone()
    }

    /// Returns a receiver for the state of the registration, for example for a health check, a metric or a log.
    #[must_use]
    pub fn watch_state(&self) -> watch::Receiver<RegistrationState> {
        self.parts.states.clone()
    }

    /// Removes the entry from etcd until [`resume`](Self::resume) is called. The server still serves the calls that it receives.
    ///
    /// # Errors
    ///
    /// Fails if etcd does not confirm the change before the timeout (5 s by default). The attempts then continue in the background. The
    /// entry is removed when its lease expires, at the latest.
    ///
    /// # Cancel safety
    ///
    /// After the request is sent, it is carried out even if the future is dropped.
    pub async fn pause(&self) -> Result<(), RegisterError> {
        self.pause_by(PausedBy::Program).await
    }

    /// Pauses the registration before its first put. Does not wait for the result.
    pub(super) fn start_paused(&self) {
        // The inbox is empty, and its receiver exists as long as the task. The answer is not needed.
        let (answer, _) = oneshot::channel();
        let _ = self
            .requests
            .try_send(Request::Pause(PausedBy::Operator, answer));
    }

    /// Restores the entry after a [`pause`](Self::pause). Returns once the entry is in etcd, or at once if it is already there.
    ///
    /// # Errors
    ///
    /// Fails if etcd does not confirm the change before the timeout (5 s by default); the attempts continue in the background. Also fails
    /// if another server has the key.
    ///
    /// # Cancel safety
    ///
    /// After the request is sent, it is carried out even if the future is dropped.
    pub async fn resume(&self) -> Result<(), RegisterError> {
        self.resume_by(PausedBy::Program).await
    }

    /// Changes the weight to a value from 1 to 1 000 000. The registration continues, so clients keep their connections. A paused
    /// registration uses the new weight when it resumes.
    ///
    /// # Errors
    ///
    /// Fails if the weight is out of range, or if the format has no field for a weight; the error states the reason. Also fails if etcd
    /// does not confirm the change before the timeout (5 s by default); the attempts continue in the background. Also fails if another
    /// server has the key.
    ///
    /// # Cancel safety
    ///
    /// After the request is sent, it is carried out even if the future is dropped.
    pub async fn set_weight(&self, weight: u32) -> Result<(), RegisterError> {
        let service = self.parts.keys.first().map_or("", |(_, service)| service);
        let service = if service.is_empty() {
            self.key()
        } else {
            service
        };
        let invalid = |reason| RegisterError::Invalid {
            service: service.to_owned(),
            reason,
        };
        check_weight(weight).map_err(invalid)?;
        let entry = self.parts.entry.weighted(weight);
        entry.map_err(|error| {
            invalid(format!("the format {:?} {error}", self.parts.entry.format))
        })?;
        self.request(|answer| Request::SetWeight(weight, answer))
            .await
    }

    pub(super) async fn pause_by(&self, by: PausedBy) -> Result<(), RegisterError> {
        self.request(|answer| Request::Pause(by, answer)).await
    }

    pub(super) async fn resume_by(&self, by: PausedBy) -> Result<(), RegisterError> {
        self.request(|answer| Request::Resume(by, answer)).await
    }

    /// Replaces the values of the keys. The keys stay the same.
    pub(super) async fn set_entry(&self, entry: Entry) -> Result<(), RegisterError> {
        self.request(|answer| Request::SetEntry(entry, answer))
            .await
    }

    /// Removes the entry of one of [several services](crate::registration::RegistrationBuilder::additional_service). The entries of the
    /// other services stay. Removing the last entry ends the registration, as [`deregister`](Self::deregister) does. A second call for the
    /// same service has no effect, but fails if the registration has ended.
    ///
    /// # Errors
    ///
    /// Fails if the registration does not contain this service. Also fails if etcd does not confirm the change before the timeout (5 s by
    /// default); the attempts continue in the background.
    ///
    /// # Cancel safety
    ///
    /// After the request is sent, it is carried out even if the future is dropped.
    pub async fn deregister_service(&self, service: &str) -> Result<(), RegisterError> {
        let index = self.parts.keys.iter().position(|(_, name)| name == service);
        let index = index.ok_or_else(|| RegisterError::Invalid {
            service: service.to_owned(),
            reason: format!(
                "the registration of {:?} does not contain this service",
                self.key()
            ),
        })?;
        self.request(|answer| Request::Remove(index, answer)).await
    }

    /// Removes the entry, revokes the lease and ends the registration. The server is not registered again afterwards.
    ///
    /// # Errors
    ///
    /// Fails if etcd does not confirm the change before the timeout (5 s by default). The entry is then removed when its lease expires, one
    /// TTL later at the latest.
    ///
    /// # Cancel safety
    ///
    /// After the request is sent, it is carried out even if the future is dropped.
    pub async fn deregister(self) -> Result<(), RegisterError> {
        self.request(Request::Deregister).await
    }

    async fn request(&self, request: impl FnOnce(Answer) -> Request) -> Result<(), RegisterError> {
        let (answer, outcome) = oneshot::channel();
        let asked = async {
            // If the task is busy with earlier requests, the inbox can be full. The send then waits, and the timeout includes this wait.
            let sent = self.requests.send(request(answer)).await;
            sent.map_err(|_| Failure::Ended)?;
            outcome.await.unwrap_or(Err(Failure::Ended))
        };
        // The task abandons a deregistration after `change_timeout` and then sends the result. The timeout here is 1 s longer, so that this
        // result still arrives.
        match timeout(
            self.parts.change_timeout.saturating_add(ANSWER_SLACK),
            asked,
        )
        .await
        {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Failure::Superseded(lease))) => Err(RegisterError::Superseded {
                key: self.key().to_owned(),
                lease: lease.known(),
            }),
            Ok(Err(Failure::Ended)) => Err(self.ended()),
            Ok(Err(Failure::TimedOut)) | Err(_) => Err(self.timed_out(self.parts.change_timeout)),
        }
    }

    fn ended(&self) -> RegisterError {
        RegisterError::Ended {
            key: Some(self.key().to_owned()),
        }
    }

    fn timed_out(&self, bound: Duration) -> RegisterError {
        let cause = match self.state() {
            RegistrationState::Registering { last_error }
            | RegistrationState::Registered { last_error, .. }
            | RegistrationState::Leaving { last_error } => last_error,
            _ => None,
        };
        RegisterError::TimedOut {
            key: self.key().to_owned(),
            endpoints: self.parts.endpoints.clone(),
            bound,
            cause,
        }
    }
}

/// Runs a registration on its own thread, with its own connections.
fn run_on_own_thread<Run>(etcd: Etcd, run: Run) -> io::Result<()>
where
    Run: AsyncFnOnce(Etcd) + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let thread = std::thread::Builder::new().name("registration".to_owned());
    let body = move || {
        runtime.block_on(async move {
            run(etcd.detached()).await;
        });
    };
    thread.spawn(body).map(drop)
}

/// Additional time for a result that the task sends after `change_timeout`.
const ANSWER_SLACK: Duration = Duration::from_secs(1);
