//! The tasks of a resolver: one for each prefix, and one that ends holds.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::store::Core;
use super::watcher::{Command, Machine};
use crate::etcd::{DEADLINE, Etcd, Watch};
use tonic_balance::Address;

/// Carries a machine's commands out, for ever.
pub(super) async fn run(
    etcd: Etcd,
    mut machine: Machine,
    core: Arc<Core>,
    index: usize,
    mut reported: mpsc::Receiver<Address>,
) {
    let _ended = Ended { core: &core, index };
    let mut watch: Option<Watch> = None;
    // What the watch was opened with.
    let mut token = None;
    let mut command = machine.on_wake();
    loop {
        tracing::trace!(?command, "next");
        command = match command {
            Command::List(request) => {
                let page = etcd.list(&request).await;
                machine.on_page(page)
            }
            Command::Watch(revision) => {
                // The old stream goes first, so that a member never serves two of ours.
                watch = None;
                token = etcd.token();
                match etcd.watch(machine.range(), Some(revision)).await {
                    Ok(opened) => {
                        watch = Some(opened);
                        machine.on_watch_opened(Instant::now())
                    }
                    Err(error) => machine.on_watch_ended(error, Instant::now()),
                }
            }
            Command::Receive => {
                receive(&etcd, &mut machine, &mut watch, &core, &mut reported).await
            }
            Command::Check(key) => {
                let answer = etcd.version(&key, machine.knows_value(&key)).await;
                machine.on_checked(answer, Instant::now())
            }
            Command::Reconcile(request) => {
                let page = etcd.list(&request).await;
                machine.on_names(page, Instant::now())
            }
            Command::Read(key) => {
                // Once: the watch waits meanwhile, and what matters is asked again.
                let answer = etcd.read_once(&key, DEADLINE).await;
                machine.on_read(key, answer, Instant::now())
            }
            Command::RenewToken(wait) => {
                watch = None;
                tokio::time::sleep(wait).await;
                let renewed = etcd.refused(token.as_ref()).await;
                if let Err(error) = &renewed {
                    tracing::debug!(%error, "no fresh token");
                }
                machine.on_token(renewed)
            }
            Command::Wait(wait) => {
                watch = None;
                tokio::time::sleep(wait).await;
                machine.on_wake()
            }
        };
        core.publish(index, &mut machine, Instant::now());
    }
}

/// Reports the end of a task that runs for ever: its runtime has ended, or it has panicked. If the last view is dropped nothing reads it.
struct Ended<'a> {
    core: &'a Core,
    index: usize,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.core.on_task_ended(self.index);
    }
}

/// Ends holds when they are over, for ever.
pub(super) async fn release(core: Arc<Core>) {
    loop {
        let next = core.release(Instant::now());
        tokio::select! {
            biased;
            () = core.held.notified() => {}
            () = until(next) => {}
        }
    }
}

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
    reported: &mut mpsc::Receiver<Address>,
) -> Command {
    let Some(open) = watch else {
        return machine.on_wake();
    };
    let due = until(machine.due());
    let message = tokio::select! {
        biased;
        // What is due is then due again much later, so it cannot keep the messages waiting; they could keep it waiting for ever.
        () = due => return machine.on_time(Instant::now()),
        message = open.message() => message,
        Some(address) = reported.recv() => {
            for key in core.lock().snapshot.keys(&address) {
                machine.on_doubt(key, Instant::now());
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
    etcd.report(open, &error);
    machine.on_watch_ended(error, Instant::now())
}
