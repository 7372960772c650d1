//! The task that obeys the control keys of a registration and writes its status keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::Instrument;

use super::instruction::{Demand, Instructions};
use super::keys::ControlKeys;
use super::status::{ReportedState, Status};
use crate::backoff::jittered;
use crate::error::{EtcdError, RegisterError};
use crate::etcd::{DEADLINE, Etcd, KeyWatch, News};
use crate::keyspace::{Header, KeyValue};
use crate::registration::entry::Entry;
use crate::registration::handle::RegistrationHandle;
use crate::registration::registration::Registration;
use crate::registration::status::RegistrationState;
use crate::registration::task::PausedBy;

/// The control of a registration that has not started yet.
#[derive(Debug)]
pub(in crate::registration) struct Control {
    etcd: Etcd,
    keys: ControlKeys,
    instructions: Instructions,
    /// What the keys demanded at the start. `None` if they could not be read.
    first: Option<Demand>,
}

impl Control {
    /// Reads the control keys before the registration starts, so that a server with a sticky pause is never registered.
    pub(in crate::registration) async fn new(etcd: Etcd, keys: ControlKeys) -> Self {
        let mut instructions = Instructions::default();
        let first = match etcd.read_each(&keys.instances, FIRST_READ_TIMEOUT).await {
            Ok((_, found)) => Some(instructions.on_start(&found)),
            // etcd trouble does not stop the server. The task reads the keys later.
            Err(error) => {
                tracing::debug!(%error, "could not read the control keys before the start");
                None
            }
        };
        Self {
            etcd,
            keys,
            instructions,
            first,
        }
    }

    /// Returns whether the registration must start paused.
    pub(in crate::registration) fn starts_paused(&self) -> bool {
        self.first.as_ref().is_some_and(|demand| demand.out)
    }

    /// Spawns the task. It ends with the registration.
    pub(in crate::registration) fn spawn(
        self,
        entry: &Entry,
        handle: RegistrationHandle,
        states: watch::Receiver<RegistrationState>,
        connections: Option<Arc<AtomicUsize>>,
    ) {
        let task = Task {
            etcd: self.etcd,
            key_watch: KeyWatch::new(),
            instructions: self.instructions,
            started: self.first.is_some(),
            paused: self.first.as_ref().is_some_and(|demand| demand.out),
            weight: None,
            weight_error: None,
            demand: self.first.unwrap_or_default(),
            entry: entry.clone(),
            keys: self.keys,
            handle,
            states,
            connections,
            status: None,
        };
        tokio::spawn(Box::pin(task.run().in_current_span()));
    }
}

struct Task {
    etcd: Etcd,
    keys: ControlKeys,
    key_watch: KeyWatch,
    instructions: Instructions,
    /// Whether the first read has succeeded.
    started: bool,
    demand: Demand,
    /// Whether this task has paused the registration. It is registered again when neither this task nor the program pauses it.
    paused: bool,
    /// The weight that this task has set.
    weight: Option<u32>,
    /// Why the weight could not be set.
    weight_error: Option<String>,
    entry: Entry,
    handle: RegistrationHandle,
    states: watch::Receiver<RegistrationState>,
    connections: Option<Arc<AtomicUsize>>,
    /// The registration that keeps the status keys in etcd while a control key exists, and the status that it has written. It has a lease
    /// of its own, because the lease of the server's entry is revoked during a pause.
    status: Option<(Registration, Status)>,
}

impl Task {
    async fn run(mut self) {
        self.obey().await;
        let mut read_at = Instant::now();
        loop {
            let report_at = Instant::now() + REPORT_INTERVAL;
            tokio::select! {
                changed = self.states.changed() => {
                    let state = self.states.borrow().clone();
                    let ended = matches!(state, RegistrationState::Deregistered | RegistrationState::Aborted);
                    if changed.is_err() || ended {
                        break;
                    }
                }
                news = self.key_watch.next(&self.etcd, &self.keys.instances) => match news {
                    News::Opened | News::Events(_) => read_at = Instant::now(),
                    News::Lost(error) => tracing::debug!(%error, "the watch on the control keys ended"),
                },
                () = sleep_until(read_at) => {
                    read_at = Instant::now() + jittered(READ_INTERVAL, &mut fastrand::Rng::new());
                    match self.read().await {
                        Ok((_, found)) => self.on_read(&found).await,
                        Err(error) => tracing::debug!(%error, "could not read the control keys"),
                    }
                }
                () = sleep_until(report_at), if self.paused && self.connections.is_some() => {}
            }
            self.report().await;
        }
        if let Some((registration, _)) = self.status.take() {
            // Without a result, the status keys remain until their lease expires.
            let _ = registration.deregister().await;
        }
    }

    /// Reads the control keys. The read before the start of the server acquires no permit, because the server waits for it.
    async fn read(&self) -> Result<(Header, Vec<Option<KeyValue>>), EtcdError> {
        let _permit = self.etcd.acquire_permit().await;
        self.etcd.read_each(&self.keys.instances, DEADLINE).await
    }

    async fn on_read(&mut self, found: &[Option<KeyValue>]) {
        let demand = if self.started {
            self.instructions.on_read(found)
        } else {
            self.instructions.on_start(found)
        };
        self.started = true;
        if demand == self.demand {
            return;
        }
        if let Some(error) = &demand.error {
            tracing::warn!(
                error,
                "a control key has a value that cannot be used; the last good value remains in force"
            );
        }
        self.demand = demand;
        self.obey().await;
    }

    /// Changes the registration to what the control keys demand.
    async fn obey(&mut self) {
        if self.demand.out != self.paused {
            self.paused = self.demand.out;
            tracing::info!(
                paused = self.paused,
                "a control key pauses or resumes the server"
            );
            // If etcd does not confirm the change in time, the registration continues to attempt it.
            let outcome = match self.handle.registration().await {
                Ok(registration) if self.paused => registration.pause_by(PausedBy::Operator).await,
                Ok(registration) => registration.resume_by(PausedBy::Operator).await,
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                tracing::warn!(%error, "the change that a control key demands is not confirmed yet");
            }
        }
        if self.demand.weight != self.weight {
            self.weight = self.demand.weight;
            let weight = self.weight();
            tracing::info!(weight, "a control key changes the weight");
            let outcome = self.handle.set_weight(weight).await;
            // After other errors, the registration continues to attempt the change.
            let rejected = outcome
                .as_ref()
                .err()
                .filter(|error| matches!(error, RegisterError::Invalid { .. }));
            self.weight_error = rejected.map(ToString::to_string);
            if let Err(error) = outcome {
                tracing::warn!(%error, "the weight that a control key demands is not set");
            }
        }
    }

    fn weight(&self) -> u32 {
        self.weight.unwrap_or(self.entry.instance.weight())
    }

    /// Writes the status keys if the status has changed. Without a control key, there are no status keys.
    async fn report(&mut self) {
        let Some(applied) = self.demand.revision else {
            if let Some((registration, _)) = self.status.take() {
                let _ = registration.deregister().await;
            }
            return;
        };
        let removed = matches!(*self.states.borrow(), RegistrationState::Paused);
        let connections = self.connections.as_ref();
        let connections = connections.map(|open| open.load(Ordering::Relaxed));
        let status = Status {
            state: ReportedState::of(&self.demand, removed, connections),
            weight: self.weight(),
            address: self.entry.instance.address().to_string(),
            applied: applied.get(),
            // While the server serves, the number changes often and is of no interest.
            connections: connections.filter(|_| self.demand.out),
            error: self.demand.error.clone().or(self.weight_error.clone()),
        };
        if self
            .status
            .as_ref()
            .is_some_and(|(_, last)| *last == status)
        {
            return;
        }
        let entry = Entry::raw(
            &self.keys.statuses,
            &status.encode(),
            &self.entry,
            STATUS_TTL,
        );
        match &mut self.status {
            Some((registration, last)) => {
                *last = status;
                // The task of the status writes the newest value as soon as it can.
                drop(timeout(WRITE_TIMEOUT, registration.set_entry(entry)).await);
            }
            None => self.status = start_status(&self.etcd, entry).map(|started| (started, status)),
        }
    }
}

fn start_status(etcd: &Etcd, entry: Entry) -> Option<Registration> {
    let states = watch::Sender::new(RegistrationState::Registering { last_error: None });
    let started = Registration::start(etcd.clone(), entry, WRITE_TIMEOUT, false, states);
    started
        .inspect_err(|error| tracing::warn!(%error, "could not start to report the status"))
        .ok()
}

/// Timeout of the read before the start. It is short, because the server waits for it.
const FIRST_READ_TIMEOUT: Duration = Duration::from_millis(500);
/// Maximum time between two reads of the control keys; the minimum is half of it. The watch reports changes at once; the reads find a
/// change that the watch has not delivered.
const READ_INTERVAL: Duration = Duration::from_secs(120);
/// Time between two looks at the number of open connections of a paused server.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);
/// Timeout of a write of the status.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// TTL of the lease of the status keys.
const STATUS_TTL: Duration = Duration::from_secs(30);
