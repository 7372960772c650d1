//! Keeps a server registered: a key under a lease, renewed, verified, and put back after any loss.
//!
//! One task owns the pure machine of [`lease`] and carries out its commands.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::Instrument;

use crate::error::RegisterError;
use crate::etcd::Etcd;
use tonic_balance::Address;

mod builder;
mod entry;
mod key_watch;
mod lease;
mod serve;
mod status;
mod task;

pub use builder::RegistrationBuilder;
#[cfg(feature = "health")]
pub(crate) use serve::Health;
pub(crate) use serve::ServeOptions;
pub use serve::ServerState;
pub use status::RegistrationState;

use entry::Entry;
use task::{Answer, Failure, Request, Task};

/// A registered server. It stays registered, whatever happens to etcd, until it is [deregistered](Self::deregister).
///
/// Dropping it deregisters as well, in the background and without saying whether that worked.
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
    /// The key of each service, and the service's name; the name is empty for an exact key.
    keys: Vec<(String, String)>,
    entry: Entry,
    endpoints: Vec<String>,
    change_timeout: Duration,
    requests: mpsc::Sender<Request>,
    states: watch::Receiver<RegistrationState>,
}

impl Registration {
    /// Starts to register; the outcome is that of [`registered`](Self::registered).
    fn start(
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
        let registration = Self {
            keys: keys.zip(services).collect(),
            entry: entry.clone(),
            endpoints: etcd.endpoints(),
            change_timeout,
            requests,
            states: states.subscribe(),
        };
        let span = tracing::info_span!("registration", key = registration.key());
        let run = async move |etcd| {
            let task = Task::new(etcd, entry, inbox, states, change_timeout);
            // The futures of etcd's client are large.
            Box::pin(task.run().instrument(span)).await;
        };
        if dedicated_thread {
            let started = detached(etcd, run);
            started.map_err(|source| RegisterError::Thread {
                key: registration.key().to_owned(),
                source: Arc::new(source),
            })?;
        } else {
            tokio::spawn(Box::pin(run(etcd)));
        }
        Ok(registration)
    }

    /// Waits for the first success, or for what rules it out.
    pub(crate) async fn registered(&self, bound: Duration) -> Result<(), RegisterError> {
        let mut states = self.states.clone();
        let first = async {
            loop {
                let state = states.borrow_and_update().clone();
                match state {
                    RegistrationState::Registered { .. } => return Ok(()),
                    RegistrationState::Registering {
                        last_error: Some(source),
                    } if source.kind().needs_operator() => {
                        return Err(RegisterError::Refused {
                            key: self.key().to_owned(),
                            source,
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

    /// The key in etcd: the first one, if there are [several](Self::keys).
    #[must_use]
    pub fn key(&self) -> &str {
        self.keys.first().map_or("", |(key, _)| key)
    }

    /// The keys in etcd, one for each service, in the order in which the services were named.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|(key, _)| key.as_str())
    }

    /// The advertised address.
    #[must_use]
    pub fn address(&self) -> &Address {
        self.entry.instance.address()
    }

    /// Where the registration stands now.
    #[must_use]
    pub fn state(&self) -> RegistrationState {
        self.states.borrow().clone()
    }

    /// Where the registration stands, as a watch: for a health check, a gauge, a log.
    #[must_use]
    pub fn watch_state(&self) -> watch::Receiver<RegistrationState> {
        self.states.clone()
    }

    /// Takes the server out of rotation and goes on serving: the entry is removed until [`resume`](Self::resume).
    ///
    /// # Errors
    ///
    /// If etcd could not be told within the bound (5 s by default); the attempt goes on in the background, and the entry goes with its
    /// lease at the latest.
    ///
    /// # Cancel safety
    ///
    /// Once sent, the request is carried out even if the future is dropped.
    pub async fn pause(&self) -> Result<(), RegisterError> {
        self.ask(Request::Pause).await
    }

    /// Puts the entry back after a [`pause`](Self::pause). Returns once it is in etcd; without a pause before, at once.
    ///
    /// # Errors
    ///
    /// If etcd could not be told within the bound (5 s by default); the attempt goes on. Also if another server has the key.
    ///
    /// # Cancel safety
    ///
    /// Once sent, the request is carried out even if the future is dropped.
    pub async fn resume(&self) -> Result<(), RegisterError> {
        self.ask(Request::Resume).await
    }

    /// Changes the weight, 1 to 1 000 000, in place: clients keep their connections. A paused registration has it when it resumes.
    ///
    /// # Errors
    ///
    /// If the weight is out of range or the format has no room for one, by name. If etcd could not be told within the bound (5 s by
    /// default); the attempt goes on. Also if another server has the key.
    ///
    /// # Cancel safety
    ///
    /// Once sent, the request is carried out even if the future is dropped.
    pub async fn set_weight(&self, weight: u32) -> Result<(), RegisterError> {
        let invalid = |reason| RegisterError::Invalid {
            service: self.key().to_owned(),
            reason,
        };
        builder::check_weight(weight).map_err(invalid)?;
        let entry = self.entry.weighted(weight);
        let entry = entry
            .map_err(|error| invalid(format!("the format {:?} {error}", self.entry.format)))?;
        self.ask(|answer| Request::SetWeight(entry, answer)).await
    }

    /// Removes the entry of one of [several services](RegistrationBuilder::additional_service); the others stay. The last one ends the
    /// registration, as [`deregister`](Self::deregister) does. For a service that was removed before there is nothing to do.
    ///
    /// # Errors
    ///
    /// If the registration is not of this service. If etcd could not be told within the bound (5 s by default); the attempt goes on.
    ///
    /// # Cancel safety
    ///
    /// Once sent, the request is carried out even if the future is dropped.
    pub async fn deregister_service(&self, service: &str) -> Result<(), RegisterError> {
        let index = self.keys.iter().position(|(_, name)| name == service);
        let index = index.ok_or_else(|| RegisterError::Invalid {
            service: service.to_owned(),
            reason: format!(
                "the registration of {:?} is not of this service",
                self.key()
            ),
        })?;
        self.ask(|answer| Request::Remove(index, answer)).await
    }

    /// Removes the entry and ends the registration. The lease is revoked; it is never registered again after that.
    ///
    /// # Errors
    ///
    /// If etcd could not be told within the bound (5 s by default): then the entry goes with its lease, one TTL later at the latest.
    ///
    /// # Cancel safety
    ///
    /// Once sent, the request is carried out even if the future is dropped.
    pub async fn deregister(self) -> Result<(), RegisterError> {
        self.ask(Request::Deregister).await
    }

    async fn ask(&self, request: impl FnOnce(Answer) -> Request) -> Result<(), RegisterError> {
        let (answer, outcome) = oneshot::channel();
        let asked = async {
            // The task may be busy, and others before us.
            let sent = self.requests.send(request(answer)).await;
            sent.map_err(|_| Failure::Ended)?;
            outcome.await.unwrap_or(Err(Failure::Ended))
        };
        // The task gives a deregistration up by itself, and says so; it is only waited for a little longer.
        match timeout(self.change_timeout.saturating_add(ANSWER_SLACK), asked).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Failure::Superseded(lease))) => Err(RegisterError::Superseded {
                key: self.key().to_owned(),
                lease,
            }),
            Ok(Err(Failure::Ended)) => Err(self.ended()),
            Ok(Err(Failure::GaveUp)) | Err(_) => Err(self.timed_out(self.change_timeout)),
        }
    }

    fn ended(&self) -> RegisterError {
        RegisterError::Ended {
            key: self.key().to_owned(),
        }
    }

    fn timed_out(&self, bound: Duration) -> RegisterError {
        let source = match self.state() {
            RegistrationState::Registering { last_error }
            | RegistrationState::Registered { last_error, .. }
            | RegistrationState::Leaving { last_error } => last_error,
            _ => None,
        };
        RegisterError::TimedOut {
            key: self.key().to_owned(),
            endpoints: self.endpoints.clone(),
            bound,
            source,
        }
    }
}

/// Runs a registration on a thread and over connections of its own.
fn detached<Run>(etcd: Etcd, run: Run) -> io::Result<()>
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

/// An answer that is due at a bound may be this late.
const ANSWER_SLACK: Duration = Duration::from_secs(1);
