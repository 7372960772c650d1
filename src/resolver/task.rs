//! The tasks of a resolver: one for each prefix, and one that ends holds.

use std::sync::Arc;

use tokio::time::Instant;

use super::core::Core;
use super::state::{Command, Machine};
use crate::etcd::{Etcd, Watch};

/// Carries a machine's commands out, for ever.
pub(super) async fn run(etcd: Etcd, mut machine: Machine, core: Arc<Core>, index: usize) {
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
            Command::Receive => receive(&etcd, &mut machine, &mut watch).await,
            Command::Check(key) => {
                let answer = etcd.version(&key).await;
                machine.on_checked(answer, Instant::now())
            }
            Command::RenewToken(wait) => {
                watch = None;
                tokio::time::sleep(wait).await;
                let renewed = etcd.refused(token.as_ref()).await;
                if let Err(error) = &renewed {
                    tracing::debug!(%error, "no fresh token");
                }
                machine.on_token(renewed.is_ok())
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

/// Ends holds when they are over, for ever.
pub(super) async fn release(core: Arc<Core>) {
    loop {
        let next = core.release(Instant::now());
        let over = async {
            match next {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = core.held.notified() => {}
            () = over => {}
        }
    }
}

async fn receive(etcd: &Etcd, machine: &mut Machine, watch: &mut Option<Watch>) -> Command {
    let Some(open) = watch else {
        return machine.on_wake();
    };
    let error = match open.message().await {
        Ok(message) if message.canceled => open.cancel_error(&message),
        Ok(message) => return machine.on_message(message),
        Err(error) => error,
    };
    tracing::debug!(%error, "the watch ended");
    etcd.report(&error);
    machine.on_watch_ended(error, Instant::now())
}
