//! The task that owns the state machine of a registration and executes its commands.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::entry::Entry;
use super::lease::{Command, Found, LEAVE_MARKER_MAX, Machine, Phase, Put};
use super::metrics::RegistrationMetrics;
use super::status::RegistrationState;
use super::ttl::{self, Ttl};
use crate::error::EtcdError;
use crate::etcd::{Etcd, KeyWatch, News};
use crate::keyspace::{Event, GuardedPut, Key, KeyValue, LeaseId};

/// A request of the owner of the registration. The task responds once the requested change is complete.
#[derive(Debug)]
pub(super) enum Request {
    Pause(PausedBy, Answer),
    Resume(PausedBy, Answer),
    SetWeight(u32, Answer),
    SetEntry(Entry, Answer),
    /// Removes the key with this index.
    Remove(usize, Answer),
    Deregister(Answer),
}

/// Who has paused the registration. It is registered again only when neither pauses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PausedBy {
    Program,
    Operator,
}

pub(super) type Answer = oneshot::Sender<Result<(), Failure>>;

/// The reason why the task did not complete a request.
#[derive(Debug)]
pub(super) enum Failure {
    Superseded(LeaseId),
    TimedOut,
    Ended,
}

/// The task that owns the state machine.
pub(super) struct Task {
    machine: Machine,
    etcd: Etcd,
    entry: Entry,
    inbox: mpsc::Receiver<Request>,
    states: watch::Sender<RegistrationState>,
    /// The instruments, if metrics are enabled.
    metrics: Option<Arc<RegistrationMetrics>>,
    waiting: Vec<(Goal, Answer)>,
    paused_by: Vec<PausedBy>,
    key_watch: KeyWatch,
    /// The largest number of servers of the service that was counted. After a loss of all data, the servers of a large service register
    /// again together. The first of them find few others.
    servers: usize,
    /// The phase, the number of failures and whether an error was present, as last published.
    published: Option<(Phase, u64, bool)>,
    /// Timeout of a deregistration.
    budget: Duration,
    /// The time at which a deregistration in progress is abandoned.
    give_up: Option<Instant>,
}

/// Publishes `Aborted` if the task ends without a deregistration.
struct Aborted(watch::Sender<RegistrationState>);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.send_if_modified(|state| {
            let aborted = !matches!(state, RegistrationState::Deregistered);
            if aborted {
                *state = RegistrationState::Aborted;
            }
            aborted
        });
    }
}

/// The state that a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Paused,
    Written,
    Removed(usize),
    Deregistered,
}

impl Task {
    pub(super) fn new(
        etcd: Etcd,
        entry: Entry,
        inbox: mpsc::Receiver<Request>,
        states: watch::Sender<RegistrationState>,
        metrics: Option<Arc<RegistrationMetrics>>,
        budget: Duration,
    ) -> Self {
        let has_leave_marker = entry.has_leave_marker();
        Self {
            machine: Machine::new(
                entry.ttl.lowest(),
                entry.keys.len(),
                has_leave_marker,
                // The default seed of `fastrand` is derived from the time since boot. Hosts that boot at the same time would sooner or
                // later choose the same lease ids. `RandomState` is seeded by the operating system.
                fastrand::Rng::with_seed(RandomState::new().build_hasher().finish()),
            ),
            etcd,
            entry,
            inbox,
            states,
            metrics,
            waiting: Vec::new(),
            paused_by: Vec::new(),
            key_watch: KeyWatch::new(),
            servers: 0,
            published: None,
            budget: budget.min(FAR_FUTURE),
            give_up: None,
        }
    }

    pub(super) async fn run(mut self) {
        let _aborted = Aborted(self.states.clone());
        self.etcd.set_renews_leases();
        loop {
            let now = Instant::now();
            self.publish(now);
            self.answer(now);
            let command = self.machine.command(now);
            tracing::trace!(?command, "next command");
            if command == Command::End || self.give_up.is_some_and(|give_up| give_up <= now) {
                break;
            }
            self.step(command).await;
        }
        for (_, answer) in self.waiting.drain(..) {
            // The caller may have dropped the receiver.
            let _ = answer.send(Err(Failure::TimedOut));
        }
        self.states.send_replace(RegistrationState::Deregistered);
    }

    async fn step(&mut self, command: Command) {
        let never = Instant::now() + FAR_FUTURE;
        let give_up = self.give_up.unwrap_or(never);
        // Once a deregistration has begun, no further request is received.
        let listening = self.give_up.is_none();
        if let Command::Wait { until } = command {
            let watched = match self.machine.phase(Instant::now()) {
                Phase::Registered { .. } | Phase::Superseded(_) => true,
                // A value that is written by hand would return a paused server to its clients.
                Phase::Paused => self.machine.has_written(),
                _ => false,
            };
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
                news = self.key_watch.next(&self.etcd, &self.entry.keys), if watched => self.on_news(news),
                () = sleep_until(until) => {}
            }
            return;
        }
        // A request of the owner does not interrupt a grant. The machine revokes only leases whose grant it has recorded, so the lease of
        // an interrupted grant would remain until it expires.
        let interruptible = listening && !matches!(command, Command::Grant { .. });
        let sent = Instant::now();
        let mut deferred = Vec::new();
        let urgent = {
            let exchange = execute(
                &self.etcd,
                &mut self.entry,
                &mut self.machine,
                &mut self.servers,
                command,
                sent,
            );
            let mut exchange = pin!(exchange);
            loop {
                tokio::select! {
                    biased;
                    () = &mut exchange => break None,
                    () = sleep_until(give_up) => break None,
                    // The number of deferred requests is limited. Otherwise, a caller that sends requests in a tight loop could delay two
                    // things: the response to the etcd request, and the timeout after which another member is tried.
                    request = self.inbox.recv(), if interruptible && deferred.len() < DEFERRED_MAX => match request {
                        Some(request @ (Request::SetEntry(..) | Request::SetWeight(..) | Request::Resume(..))) => deferred.push(request),
                        urgent => break Some(urgent),
                    },
                }
            }
        };
        if self.machine.has_missed_loss() {
            self.key_watch.close();
            self.machine.on_watch_lost();
        }
        for request in deferred {
            self.on_request(Some(request));
        }
        if let Some(request) = urgent {
            self.on_request(request);
        }
    }

    fn on_request(&mut self, request: Option<Request>) {
        match request {
            Some(Request::Pause(by, answer)) => {
                if !self.paused_by.contains(&by) {
                    self.paused_by.push(by);
                }
                self.machine.on_pause();
                self.waiting.push((Goal::Paused, answer));
            }
            Some(Request::Resume(by, answer)) => {
                self.paused_by.retain(|other| *other != by);
                if self.paused_by.is_empty() {
                    self.machine.on_resume();
                }
                self.waiting.push((Goal::Written, answer));
            }
            Some(Request::SetWeight(weight, answer)) => {
                // The caller has checked that the format can represent the weight.
                if let Ok(entry) = self.entry.weighted(weight) {
                    self.entry = entry;
                    self.machine.on_new_value();
                }
                self.waiting.push((Goal::Written, answer));
            }
            Some(Request::SetEntry(entry, answer)) => {
                self.entry = entry;
                self.machine.on_new_value();
                self.waiting.push((Goal::Written, answer));
            }
            Some(Request::Remove(index, answer)) => {
                if self.machine.live().eq([index]) {
                    self.deregister();
                } else {
                    self.machine.on_remove(index);
                }
                self.waiting.push((Goal::Removed(index), answer));
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
                    let mut keys = self.entry.keys.iter();
                    let Some(index) = keys.position(|key| key == event.key()) else {
                        continue;
                    };
                    match &event {
                        Event::Put(kv) if self.entry.is_by_hand(index, kv) => {
                            if self.machine.on_put_by_hand(index, kv) {
                                self.entry.adopt(index, kv);
                                // The edit applies to all services of the registration.
                                self.machine.on_new_value();
                            }
                        }
                        event => self.machine.on_event(index, event, now),
                    }
                }
            }
            News::Lost(error) => {
                tracing::debug!(%error, "the watch on the keys of the registration ended");
                self.machine.on_watch_lost();
            }
        }
    }

    /// Completes the requests whose goal is reached or can no longer be reached.
    fn answer(&mut self, now: Instant) {
        self.waiting.retain(|(_, answer)| !answer.is_closed());
        let phase = self.machine.phase(now);
        let written = self.machine.is_written();
        for index in (0..self.waiting.len()).rev() {
            let outcome = match (self.waiting[index].0, phase) {
                // A later request can replace an earlier one: a resume completes an earlier pause, and a pause completes an earlier resume
                // or change of the weight. Otherwise, the earlier request would wait for a state that may never be reached.
                (Goal::Paused, Phase::Paused | Phase::Registered { .. } | Phase::Superseded(_))
                | (Goal::Written, Phase::Paused)
                | (Goal::Deregistered, Phase::Deregistered) => Ok(()),
                (Goal::Removed(index), _) if self.machine.is_gone(index) => Ok(()),
                (Goal::Written, Phase::Registered { .. }) if written => Ok(()),
                (Goal::Written, Phase::Superseded(lease)) => Err(Failure::Superseded(lease)),
                (Goal::Paused | Goal::Written, Phase::Deregistered) => Err(Failure::Ended),
                _ => continue,
            };
            let (_, answer) = self.waiting.swap_remove(index);
            // The caller may have dropped the receiver.
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
                if let (Some(metrics), Some((Phase::Registered { expires, .. }, ..))) =
                    (&self.metrics, before)
                {
                    metrics.on_loss(expires, seen.0, now);
                }
                tracing::warn!(state = %next, failures = seen.1, "the registration is lost");
            } else {
                tracing::info!(state = %next, failures = seen.1, "registration state changed");
            }
        } else if seen.2 && before.is_some_and(|(.., failing)| !failing) {
            // Only the first failure of a series is logged, because the attempts continue without limit.
            let error = self.machine.last_error.as_ref();
            let error = error.map(tracing::field::display);
            tracing::warn!(
                error,
                "a request of the registration to etcd failed; retrying"
            );
        }
        self.states.send_replace(next);
    }
}

impl Entry {
    fn keys(&self, indexes: &[usize]) -> Vec<Key> {
        indexes
            .iter()
            .map(|index| self.keys[*index].clone())
            .collect()
    }

    fn found(&self, indexes: &[usize], found: Vec<Option<KeyValue>>) -> Vec<Found> {
        let found = indexes.iter().zip(found);
        let found = found.map(|(index, kv)| Found {
            index: *index,
            current: kv
                .as_ref()
                .is_some_and(|kv| kv.value == self.encode(*index, false)),
            by_hand: kv.as_ref().is_some_and(|kv| self.is_by_hand(*index, kv)),
            kv,
        });
        found.collect()
    }

    /// Returns whether an operator has written this value of the registration by hand: the address is that of the server, but the key has
    /// no lease.
    fn is_by_hand(&self, index: usize, kv: &KeyValue) -> bool {
        kv.lease == LeaseId::NONE && self.has_own_address(index, &kv.value)
    }

    /// Uses the weight and the metadata of a value that was written by hand.
    fn adopt(&mut self, index: usize, kv: &KeyValue) {
        let edited = self.edited(index, &kv.value);
        tracing::warn!(
            key = %self.keys[index],
            accepted = edited.is_some(),
            "the key was written by hand without a lease; the server uses the weight and the metadata and writes the key under its lease"
        );
        if let Some(edited) = edited {
            *self = edited;
        }
    }

    fn guarded_puts(&self, puts: &[Put], leaving: bool, lease: LeaseId) -> Vec<GuardedPut> {
        let put = |put: &Put| GuardedPut {
            key: self.keys[put.index].clone(),
            value: self.encode(put.index, leaving),
            lease,
            expected: put.expected,
        };
        puts.iter().map(put).collect()
    }
}

/// Executes one command.
async fn execute(
    etcd: &Etcd,
    entry: &mut Entry,
    machine: &mut Machine,
    servers: &mut usize,
    command: Command,
    sent: Instant,
) {
    match command {
        Command::Grant { lease, deadline } => {
            let ttl = lease_ttl(etcd, &entry.ttl, servers).await;
            let answer = etcd.grant(lease, ttl, deadline).await;
            machine.on_granted(lease, answer, sent, Instant::now());
        }
        Command::Read { deadline } => {
            let read = machine.reads();
            let answer = etcd.read_each(&entry.keys(&read), deadline).await;
            let found = answer.map(|(header, kvs)| {
                machine.on_term(header.raft_term);
                for (index, kv) in read.iter().zip(&kvs) {
                    if let Some(kv) = kv
                        && entry.is_by_hand(*index, kv)
                        && machine.accepts_edit(*index)
                    {
                        entry.adopt(*index, kv);
                        machine.on_new_value();
                    }
                }
                entry.found(&read, kvs)
            });
            machine.on_read(found, Instant::now());
        }
        Command::Put {
            lease,
            leaving,
            deadline,
        } => {
            let puts = entry.guarded_puts(&machine.puts(), leaving, lease);
            let answer = etcd.put_if(&puts, deadline).await;
            machine.on_put(leaving, answer, Instant::now());
        }
        Command::Delete {
            index,
            lease,
            leave_marker,
            deadline,
        } => {
            if let Some(expected) = leave_marker {
                let puts = entry.guarded_puts(&[Put { index, expected }], true, lease);
                // The leave marker is best effort, so the result of this put is ignored.
                let _ = etcd.put_if(&puts, deadline.min(LEAVE_MARKER_MAX)).await;
            }
            let own = machine.lease_id();
            let answer = delete(etcd, entry, index, (lease, own), deadline).await;
            machine.on_deleted(index, answer, Instant::now());
        }
        Command::Renew {
            lease,
            term,
            deadline,
        } => {
            let answer = etcd.keep_alive(lease, term, deadline).await;
            machine.on_renewed(answer, sent, Instant::now());
        }
        Command::Revoke { lease, deadline } => {
            let answer = etcd.revoke(lease, deadline).await;
            machine.on_revoked(answer, Instant::now());
        }
        Command::Wait { .. } | Command::End => {}
    }
}

/// Deletes a key if it is attached to `lease`. Then deletes it if it still belongs to the registration: an operator has written it by hand,
/// without a lease, or it is attached to the current lease `own`. The format may have no leave marker, so only a read finds such a value.
async fn delete(
    etcd: &Etcd,
    entry: &Entry,
    index: usize,
    (lease, own): (LeaseId, Option<LeaseId>),
    deadline: Duration,
) -> Result<(), EtcdError> {
    let key = &entry.keys[index];
    if lease != LeaseId::NONE {
        etcd.delete_if(key, lease, None, deadline).await?;
    }
    let (_, found) = etcd.read_once(key, deadline).await?;
    let Some(kv) = found else {
        return Ok(());
    };
    let is_by_hand = entry.is_by_hand(index, &kv);
    if !is_by_hand && Some(kv.lease) != own {
        return Ok(());
    }
    if is_by_hand {
        tracing::warn!(%key, "the key was written by hand without a lease, and is deleted, because the server is not registered");
    }
    etcd.delete_if(key, kv.lease, Some(kv.mod_revision), deadline)
        .await
}

/// Returns the TTL to request. `servers` is the largest number of servers that was counted before.
async fn lease_ttl(etcd: &Etcd, ttl: &Ttl, servers: &mut usize) -> Duration {
    let range = match ttl {
        Ttl::Fixed(ttl) => return *ttl,
        Ttl::ByServers(range) => range,
    };
    match etcd.count(range, COUNT_TIMEOUT).await {
        Ok(count) => *servers = count.max(*servers),
        // The registration does not depend on the number. A server may also have no permission for the keys of other servers.
        Err(error) => tracing::debug!(%error, "could not count the servers of the service"),
    }
    ttl::by_servers(*servers)
}

/// Timeout of the request that counts the servers. It is short, because the registration waits for it.
const COUNT_TIMEOUT: Duration = Duration::from_millis(500);
/// Maximum number of requests that are deferred until the current etcd request ends. Further requests wait in the inbox.
const DEFERRED_MAX: usize = 8;
/// Duration of a timer that stands for an unlimited wait. If the timer fires, the task only derives its next command again.
const FAR_FUTURE: Duration = Duration::from_secs(24 * 60 * 60);
