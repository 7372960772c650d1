//! Keeps a server registered: a key under a lease, renewed, verified, and put back after any loss.
//!
//! One task owns the pure machine of [`lease`] and carries out its commands.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::Instrument;

use crate::address::Address;
use crate::backoff::jittered;
use crate::error::{Endpoints, EtcdError, RegisterError};
use crate::etcd::{Etcd, Token, Watch};
use crate::keyspace::{Event, GuardedPut, Key, LeaseId, Range};

mod builder;
mod entry;
mod lease;
mod serve;
mod state;

pub use builder::RegistrationBuilder;
#[cfg(feature = "health")]
pub(crate) use serve::Health;
pub(crate) use serve::ServeOptions;
pub use serve::ServerState;
pub use state::RegistrationState;

use entry::Entry;
use lease::{Command, Machine, Phase};

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
pub struct Registration {
    key: String,
    entry: Entry,
    endpoints: Endpoints,
    change_timeout: Duration,
    requests: mpsc::Sender<Request>,
    states: watch::Receiver<RegistrationState>,
}

/// What the owner asks of the task. The answer comes when it is done.
#[derive(Debug)]
enum Request {
    Pause(Answer),
    Resume(Answer),
    SetWeight(Entry, Answer),
    Deregister(Answer),
}

type Answer = oneshot::Sender<Result<(), Failure>>;

/// Why the task could not do what was asked.
#[derive(Debug)]
enum Failure {
    Superseded(LeaseId),
    GaveUp,
    Ended,
}

impl Registration {
    /// Starts to register; the outcome is that of [`registered`](Self::registered).
    fn start(
        etcd: Etcd,
        entry: Entry,
        change_timeout: Duration,
        states: watch::Sender<RegistrationState>,
    ) -> Self {
        let (requests, inbox) = mpsc::channel(8);
        let registration = Self {
            key: entry.key.to_string(),
            entry: entry.clone(),
            endpoints: Endpoints(etcd.endpoints()),
            change_timeout,
            requests,
            states: states.subscribe(),
        };
        let span = tracing::info_span!("registration", key = %entry.key);
        let says_goodbye = entry.says_goodbye();
        let task = Task {
            machine: Machine::new(entry.ttl, says_goodbye, fastrand::Rng::new()),
            etcd,
            entry,
            inbox,
            states,
            waiting: Vec::new(),
            key_watch: KeyWatch::default(),
            published: None,
            budget: change_timeout.min(NEVER),
            give_up: None,
        };
        tokio::spawn(task.run().instrument(span));
        registration
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
                            key: self.key.clone(),
                            source,
                        });
                    }
                    RegistrationState::Deregistered => return Err(self.ended()),
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

    /// The key in etcd.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
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
    pub fn states(&self) -> watch::Receiver<RegistrationState> {
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
            service: self.key.clone(),
            reason,
        };
        builder::check_weight(weight).map_err(invalid)?;
        let entry = self.entry.weighted(weight);
        let entry = entry
            .map_err(|error| invalid(format!("the format {:?} {error}", self.entry.format)))?;
        self.ask(|answer| Request::SetWeight(entry, answer)).await
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
        if self.requests.send(request(answer)).await.is_err() {
            return Err(self.ended());
        }
        // The task gives a deregistration up by itself, and says so; it is only waited for a little longer.
        match timeout(self.change_timeout.saturating_add(ANSWER_SLACK), outcome).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(Failure::Superseded(lease)))) => Err(RegisterError::Superseded {
                key: self.key.clone(),
                lease,
            }),
            Ok(Ok(Err(Failure::Ended)) | Err(_)) => Err(self.ended()),
            Ok(Ok(Err(Failure::GaveUp))) | Err(_) => Err(self.timed_out(self.change_timeout)),
        }
    }

    fn ended(&self) -> RegisterError {
        RegisterError::Ended {
            key: self.key.clone(),
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
            key: self.key.clone(),
            endpoints: self.endpoints.clone(),
            bound,
            source,
        }
    }
}

/// The owner task.
struct Task {
    machine: Machine,
    etcd: Etcd,
    entry: Entry,
    inbox: mpsc::Receiver<Request>,
    states: watch::Sender<RegistrationState>,
    waiting: Vec<(Goal, Answer)>,
    key_watch: KeyWatch,
    /// What was last told: the phase, the number of failures, and whether the last exchange was one.
    published: Option<(Phase, u64, bool)>,
    /// How long a deregistration may take.
    budget: Duration,
    /// When a deregistration under way is given up.
    give_up: Option<Instant>,
}

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Paused,
    Written,
    Deregistered,
}

impl Task {
    async fn run(mut self) {
        loop {
            let now = Instant::now();
            self.publish(now);
            self.answer(now);
            let command = self.machine.command(now);
            tracing::trace!(?command, "next");
            if command == Command::End || self.give_up.is_some_and(|give_up| give_up <= now) {
                break;
            }
            self.step(command).await;
        }
        for (_, answer) in self.waiting.drain(..) {
            // The asker may have gone.
            let _ = answer.send(Err(Failure::GaveUp));
        }
        self.states.send_replace(RegistrationState::Deregistered);
    }

    async fn step(&mut self, command: Command) {
        let never = Instant::now() + NEVER;
        let give_up = self.give_up.unwrap_or(never);
        // After a deregistration nobody is listened to any more.
        let listening = self.give_up.is_none();
        if let Command::Wait { until } = command {
            let watched = matches!(
                self.machine.phase(Instant::now()),
                Phase::Registered { .. } | Phase::Superseded(_)
            );
            let expires = self
                .machine
                .expires()
                .filter(|expires| *expires > Instant::now());
            let until = [until, expires, self.give_up]
                .into_iter()
                .flatten()
                .min()
                .unwrap_or(never);
            tokio::select! {
                biased;
                request = self.inbox.recv(), if listening => self.on_request(request),
                news = self.key_watch.next(&self.etcd, &self.entry.key), if watched => self.on_news(news),
                () = sleep_until(until) => {}
            }
            return;
        }
        // A grant is waited for: one that reaches etcd after the revoke would leave a lease behind.
        let interruptible = listening && !matches!(command, Command::Grant { .. });
        let sent = Instant::now();
        tokio::select! {
            biased;
            request = self.inbox.recv(), if interruptible => self.on_request(request),
            () = execute(&self.etcd, &self.entry, &mut self.machine, command, sent) => {}
            () = sleep_until(give_up) => {}
        }
    }

    fn on_request(&mut self, request: Option<Request>) {
        match request {
            Some(Request::Pause(answer)) => {
                self.machine.on_pause();
                self.waiting.push((Goal::Paused, answer));
            }
            Some(Request::Resume(answer)) => {
                self.machine.on_resume();
                self.waiting.push((Goal::Written, answer));
            }
            Some(Request::SetWeight(entry, answer)) => {
                self.entry = entry;
                self.machine.on_new_value();
                self.waiting.push((Goal::Written, answer));
            }
            Some(Request::Deregister(answer)) => {
                self.deregister();
                self.waiting.push((Goal::Deregistered, answer));
            }
            None => self.deregister(),
        }
    }

    fn deregister(&mut self) {
        self.machine.on_deregister();
        self.give_up = Some(Instant::now() + self.budget);
    }

    fn on_news(&mut self, news: News) {
        match news {
            News::Opened => self.machine.on_watch_opened(),
            News::Events(events) => {
                let now = Instant::now();
                for event in events {
                    self.machine.on_event(&event, now);
                }
            }
            News::Lost(error) => {
                tracing::debug!(%error, "the watch on our own key ended");
                self.machine.on_watch_lost();
            }
        }
    }

    /// Answers the requests whose goal is reached, or out of reach.
    fn answer(&mut self, now: Instant) {
        self.waiting.retain(|(_, answer)| !answer.is_closed());
        let phase = self.machine.phase(now);
        let written = self.machine.is_written();
        for index in (0..self.waiting.len()).rev() {
            let outcome = match (self.waiting[index].0, phase) {
                // A resume may have overtaken a pause, and a pause a change of the value.
                (Goal::Paused, Phase::Paused | Phase::Registered { .. } | Phase::Superseded(_))
                | (Goal::Written, Phase::Paused)
                | (Goal::Deregistered, Phase::Deregistered) => Ok(()),
                (Goal::Written, Phase::Registered { .. }) if written => Ok(()),
                (Goal::Written, Phase::Superseded(lease)) => Err(Failure::Superseded(lease)),
                (Goal::Paused | Goal::Written, Phase::Deregistered) => Err(Failure::Ended),
                _ => continue,
            };
            let (_, answer) = self.waiting.swap_remove(index);
            // The asker may have gone.
            let _ = answer.send(outcome);
        }
    }

    fn publish(&mut self, now: Instant) {
        let seen = (
            self.machine.phase(now),
            self.machine.failures,
            self.machine.last_error.is_some(),
        );
        let before = self.published.replace(seen);
        if before == Some(seen) {
            return;
        }
        let next = RegistrationState::of(&self.machine, now);
        if before.is_none_or(|(phase, ..)| {
            std::mem::discriminant(&phase) != std::mem::discriminant(&seen.0)
        }) {
            let lost = matches!(before, Some((Phase::Registered { .. }, ..)))
                && matches!(seen.0, Phase::Registering | Phase::Superseded(_));
            if lost {
                tracing::warn!(state = ?next, failures = seen.1, "the registration is lost");
            } else {
                tracing::info!(state = ?next, failures = seen.1, "registration state changed");
            }
        } else if seen.2 && before.is_some_and(|(.., failing)| !failing) {
            // Once per series: the tries go on for as long as it takes.
            let error = self.machine.last_error.as_ref();
            let error = error.map(tracing::field::display);
            tracing::warn!(
                error,
                "etcd does not answer for the registration; trying on"
            );
        }
        self.states.send_replace(next);
    }
}

/// Carries one command out.
async fn execute(
    etcd: &Etcd,
    entry: &Entry,
    machine: &mut Machine,
    command: Command,
    sent: Instant,
) {
    match command {
        Command::Grant { lease, deadline } => {
            let answer = etcd.grant(lease, entry.ttl, deadline).await;
            machine.on_granted(lease, answer, sent, Instant::now());
        }
        Command::Read { deadline } => {
            let answer = etcd.read_once(&entry.key, deadline).await;
            let mut current = false;
            let found = answer.map(|(header, found)| {
                machine.on_term(header.raft_term);
                current = found
                    .as_ref()
                    .is_some_and(|kv| kv.value == entry.encode(false));
                found
            });
            machine.on_read(found, current, Instant::now());
        }
        Command::Put {
            lease,
            expected,
            leaving,
            deadline,
        } => {
            let put = GuardedPut {
                key: entry.key.clone(),
                value: entry.encode(leaving),
                lease,
                expected,
            };
            let answer = etcd.put_if(&put, deadline).await;
            machine.on_put(leaving, answer, Instant::now());
        }
        Command::Renew { lease, deadline } => {
            let answer = etcd.keep_alive(lease, deadline).await;
            machine.on_renewed(answer, sent, Instant::now());
        }
        Command::Revoke { lease, deadline } => {
            let answer = etcd.revoke(lease, deadline).await;
            machine.on_revoked(answer, Instant::now());
        }
        Command::Wait { .. } | Command::End => {}
    }
}

/// The watch on our own key.
#[derive(Debug, Default)]
struct KeyWatch {
    open: Option<Watch>,
    /// What the watch was opened with.
    token: Option<Token>,
    not_before: Option<Instant>,
    /// How often in a row it was refused.
    refusals: u32,
}

/// What the watch on our own key has to say.
enum News {
    /// From here on nothing is missed.
    Opened,
    Events(Vec<Event>),
    Lost(EtcdError),
}

impl KeyWatch {
    /// The next news.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no news; a watch that was being opened is opened anew.
    async fn next(&mut self, etcd: &Etcd, key: &Key) -> News {
        let error = match &mut self.open {
            None => match self.reopen(etcd, key).await {
                Ok(()) => return News::Opened,
                Err(error) => error,
            },
            Some(watch) => match watch.message().await {
                Ok(message) if message.canceled => watch.cancel_error(&message),
                Ok(message) => {
                    self.refusals = 0;
                    return News::Events(message.events);
                }
                Err(error) => error,
            },
        };
        etcd.report(&error);
        self.open = None;
        let refused = error.kind().is_refusal();
        self.refusals = if refused { self.refusals + 1 } else { 0 };
        // Once refused, a fresh token may help; then only an operator can.
        let wait = if self.refusals > 1 { REFUSED } else { REWATCH };
        let wait = jittered(wait, &mut fastrand::Rng::new());
        self.not_before = Some(Instant::now() + wait);
        News::Lost(error)
    }

    async fn reopen(&mut self, etcd: &Etcd, key: &Key) -> Result<(), EtcdError> {
        if let Some(not_before) = self.not_before {
            sleep_until(not_before).await;
        }
        if self.refusals == 1 {
            // Calls renew their token by themselves; a watch is told in a message.
            etcd.refused(self.token.as_ref()).await?;
        }
        self.token = etcd.token();
        self.open = Some(etcd.watch(&Range::key(key), None).await?);
        Ok(())
    }
}

/// Between two tries to watch our own key. It is only a short cut: the key is read at each renewal meanwhile.
const REWATCH: Duration = Duration::from_secs(1);
/// The same while it is refused.
const REFUSED: Duration = Duration::from_secs(30);
/// An answer that is due at a bound may be this late.
const ANSWER_SLACK: Duration = Duration::from_secs(1);
/// Far enough away for a timer that is not to fire.
const NEVER: Duration = Duration::from_secs(24 * 60 * 60);
