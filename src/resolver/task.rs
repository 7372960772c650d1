//! The tasks of a resolver: one for each prefix, one that ends holds, and one for the cache and the seeds. A held instance is one that is
//! kept as a last resort after a mass removal.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::cache::{CACHE_DELAY, Cache, WRITE_AGAIN, WRITE_DELAY};
use super::status::ResolverState;
use super::store::Core;
use super::watcher::{Command, Machine};
use crate::etcd::{DEADLINE, Etcd, Watch};
use crate::instance::Instance;
use crate::keyspace::Revision;
use tonic_balance::{Address, AddressPolicy};

/// Executes the commands of the list-and-watch state machine of one prefix, in an endless loop.
///
/// The future of each request is boxed. Most of the time, the task waits for the next message of its watch, and the memory of a request
/// would belong to the task during that time: for 1 000 services, several megabytes.
pub(super) async fn run(
    etcd: Etcd,
    mut machine: Machine,
    core: Arc<Core>,
    index: usize,
    mut reported: mpsc::Receiver<Address>,
) {
    let _report_end = ReportEnd { core: &core, index };
    let mut watch: Option<Watch> = None;
    // The auth token with which the watch was opened.
    let mut token = None;
    let mut command = machine.on_wake();
    loop {
        tracing::trace!(?command, "next");
        command = match command {
            Command::List(request) => {
                let _permit = etcd.acquire_permit().await;
                let page = Box::pin(etcd.list(&request)).await;
                machine.on_page(page)
            }
            Command::Watch(revision) => {
                // The old watch is dropped first, so that no member serves two watches of this task at the same time.
                watch = None;
                let _permit = etcd.acquire_permit().await;
                token = etcd.token();
                match Box::pin(etcd.watch(machine.range(), Some(revision))).await {
                    Ok(opened) => {
                        watch = Some(opened);
                        machine.on_watch_opened(Instant::now())
                    }
                    Err(error) => machine.on_watch_ended(error, Instant::now()),
                }
            }
            Command::Receive => {
                receive(&etcd, &mut machine, &mut watch, &core, index, &mut reported).await
            }
            Command::Check(key) => {
                let _permit = etcd.acquire_permit().await;
                let answer = Box::pin(etcd.version(&key, machine.knows_value(&key))).await;
                machine.on_checked(answer, Instant::now())
            }
            Command::Reconcile(request) => {
                // A request for changes is sent in one transaction with those of other services. A list of all names is sent alone, because
                // several such lists could exceed the maximum size of a response.
                let page = if request.written_after == Revision::ZERO {
                    Box::pin(etcd.list(&request)).await
                } else {
                    Box::pin(etcd.reconcile(&request)).await
                };
                machine.on_names(page, Instant::now())
            }
            Command::Read(key) => {
                // The read is tried only once, because no message of the watch is received during the read. If the read fails, a later
                // report or reconciliation can request another one.
                let answer = Box::pin(etcd.read_once(&key, DEADLINE)).await;
                machine.on_read(key, answer, Instant::now())
            }
            Command::RenewToken(wait) => {
                watch = None;
                tokio::time::sleep(wait).await;
                let renewed = Box::pin(etcd.on_token_rejected(token.as_ref())).await;
                if let Err(error) = &renewed {
                    tracing::debug!(%error, "could not renew the token of the watch");
                }
                machine.on_token(renewed)
            }
            Command::Wait(wait) => {
                watch = None;
                // A new resolver that joins this one ends the wait, but not at once: a program may start resolvers without a pause.
                let least = wait.min(WAIT_MIN);
                tokio::time::sleep(least).await;
                tokio::select! {
                    () = tokio::time::sleep(wait.saturating_sub(least)) => {}
                    () = core.woken(index) => {}
                }
                machine.on_wake()
            }
        };
        etcd.on_known_servers(machine.known());
        core.publish(index, &mut machine, Instant::now());
    }
}

/// When dropped, reports the end of the task that owns it. The task never ends by itself. A drop therefore means that its runtime was shut
/// down, that it panicked, or that the last [`Resolver`](super::Resolver) was dropped. In the last case, only a handle of the resolver can
/// still read the report.
struct ReportEnd<'a> {
    core: &'a Core,
    index: usize,
}

impl Drop for ReportEnd<'_> {
    fn drop(&mut self) {
        self.core.on_task_ended(self.index);
    }
}

/// Ends each hold at its deadline, in an endless loop.
pub(super) async fn release_holds(core: Arc<Core>) {
    loop {
        let next = core.release(Instant::now());
        tokio::select! {
            biased;
            () = core.held.notified() => {}
            () = until(next) => {}
        }
    }
}

/// Uses the cache or the seeds if the first lists are not complete within [`CACHE_DELAY`]. Then keeps the cache up to date, in an endless
/// loop.
pub(super) async fn keep_cache(
    core: Arc<Core>,
    file: Option<Cache>,
    seeds: Vec<Instance>,
    policy: AddressPolicy,
) {
    let mut status = core.status.subscribe();
    let is_known = status.wait_for(|status| status.state != ResolverState::Unknown);
    if tokio::time::timeout(CACHE_DELAY, is_known).await.is_err() {
        let cached = match file.clone() {
            Some(file) => load(file, policy).await,
            None => None,
        };
        let (instances, from) = match cached {
            Some(cached) if !cached.is_empty() => (cached, "the cache"),
            _ => (seeds, "the seeds"),
        };
        let count = instances.len();
        if count > 0 && core.use_fallback(instances) {
            let service = &core.service;
            tracing::warn!(
                service,
                instances = count,
                "etcd has not answered since the start: using the instances of {from}"
            );
        }
    }
    let Some(file) = file else {
        return;
    };
    let mut again = None;
    loop {
        tokio::select! {
            // Changes in quick succession then cause only one write.
            () = core.changed.notified() => tokio::time::sleep(WRITE_DELAY).await,
            () = until(again) => {}
        }
        again = None;
        let instances = core.registered();
        if instances.is_empty() {
            continue;
        }
        let written = file.clone();
        let store = tokio::task::spawn_blocking(move || written.store(&instances));
        if let Ok(Err(error)) = store.await {
            tracing::warn!(file = %file.path().display(), %error, "could not write the cache");
            again = Some(Instant::now() + WRITE_AGAIN);
        }
    }
}

async fn load(file: Cache, policy: AddressPolicy) -> Option<Vec<Instance>> {
    let path = file.path().to_owned();
    let load = tokio::task::spawn_blocking(move || file.load(&policy));
    match load.await {
        Ok(Ok(instances)) => instances,
        Ok(Err(error)) => {
            tracing::warn!(file = %path.display(), %error, "could not use the cache file");
            None
        }
        Err(_) => None,
    }
}

/// The shortest wait after a failure. With rejected credentials, each attempt costs etcd a password hash.
const WAIT_MIN: Duration = Duration::from_secs(5);

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

async fn receive(
    etcd: &Etcd,
    machine: &mut Machine,
    watch: &mut Option<Watch>,
    core: &Core,
    index: usize,
    reported: &mut mpsc::Receiver<Address>,
) -> Command {
    let Some(open) = watch else {
        return machine.on_wake();
    };
    let due = until(machine.due());
    let message = tokio::select! {
        biased;
        // The timer is polled before the messages, because frequent messages could otherwise starve it. The timer cannot starve the
        // messages, because no action of the timer is due again at once.
        () = due => return machine.on_time(Instant::now()),
        message = open.message() => message,
        () = core.woken(index) => return Command::Receive,
        Some(address) = reported.recv() => {
            for key in core.lock().registered.keys(&address) {
                machine.on_refused_connection(key, Instant::now());
            }
            return Command::Receive;
        }
    };
    let error = match message {
        Ok(message) if message.canceled => open.cancel_error(&message),
        Ok(message) => return machine.on_message(message),
        Err(error) => error,
    };
    tracing::debug!(%error, "the watch ended");
    etcd.record_watch_end(open, &error);
    machine.on_watch_ended(error, Instant::now())
}
