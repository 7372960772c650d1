//! Sends the reconciliation requests of several services as one transaction. A resolver periodically reconciles its service: it compares
//! the keys in etcd with those that it knows, to find changes that its watch has not delivered. Without this module, a process with a
//! thousand services would send several requests per second even while no key changes.
//!
//! A batch must not let one service affect another: if etcd rejects the transaction, for example because of the permissions on one prefix,
//! each service sends its own request.

use std::time::Duration;

use etcd_client::proto::PbTxnOpResponse;
use etcd_client::{Txn, TxnOp};
use tokio::runtime::{Handle, Id};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::cluster::Etcd;
use super::decode::{header, key_value};
use super::error;
use super::kv::{self, OPERATIONS_MAX};
use super::limits::{DEADLINE, MAX_MESSAGE};
use super::member_health::Traffic;
use super::reconcile_batch::Pending;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{ListRequest, Page};

/// A drop guard of the task that collects a batch. The task disarms the guard when it takes the batch. If the runtime of the task ends
/// before that, the guard is dropped and empties the batch, and the owner of each request sends the request alone.
struct Collection(Option<(Etcd, Id)>);

impl Drop for Collection {
    fn drop(&mut self) {
        if let Some((etcd, runtime)) = &self.0 {
            drop(etcd.0.reconcile_batch.take(*runtime));
        }
    }
}

impl Etcd {
    /// Reads one page as [`Etcd::list`] does. Requests that are made within 20 ms share transactions of up to [`OPERATIONS_MAX`] requests.
    /// A request that is the only one of its transaction is sent alone, as a list request.
    pub(crate) async fn reconcile(&self, request: &ListRequest) -> Result<Page, EtcdError> {
        let batch = &self.0.reconcile_batch;
        if !batch.is_paused(Instant::now()) {
            let runtime = Handle::current().id();
            let (reply, answer) = oneshot::channel();
            let pending = Pending {
                request: request.clone(),
                reply,
            };
            if batch.push(runtime, pending) {
                let mut collection = Collection(Some((self.clone(), runtime)));
                tokio::spawn(async move {
                    tokio::time::sleep(COLLECT).await;
                    if let Some((etcd, runtime)) = collection.0.take() {
                        etcd.send_all(etcd.0.reconcile_batch.take(runtime)).await;
                    }
                });
            }
            // The resolver receives no message of its watch while it waits, so the wait is short.
            if let Ok(Ok(answer)) = tokio::time::timeout(COLLECT + DEADLINE, answer).await {
                return answer;
            }
        }
        self.list(request).await
    }

    /// Sends the requests in transactions, all at once.
    async fn send_all(&self, mut batch: Vec<Pending>) {
        // Resolvers that have ended no longer wait for a response.
        batch.retain(|pending| !pending.reply.is_closed());
        let mut transactions = JoinSet::new();
        while !batch.is_empty() {
            let rest = batch.split_off(batch.len().min(OPERATIONS_MAX));
            let (etcd, one) = (self.clone(), std::mem::replace(&mut batch, rest));
            transactions.spawn(async move { etcd.send_batch(one).await });
        }
        transactions.join_all().await;
    }

    async fn send_batch(&self, batch: Vec<Pending>) {
        if batch.len() < 2 {
            return;
        }
        // A single attempt: if it fails, each request is repeated alone. The cause may be the transaction itself, for example a prefix that
        // may not be read, a lower limit on its operations, a proxy that does not support it, or too much work for the deadline.
        match self.list_all(&batch).await {
            Ok(pages) => {
                self.0.reconcile_batch.on_success();
                // A request without a page in the response is sent alone by its owner.
                for (pending, page) in batch.into_iter().zip(pages) {
                    if let Some(page) = page {
                        let _ = pending.reply.send(Ok(page));
                    }
                }
            }
            // The member is unavailable, so separate requests would only add load. The next reconciliation repeats the comparison.
            Err(error)
                if matches!(
                    error.kind(),
                    EtcdErrorKind::NoLeader | EtcdErrorKind::OtherCluster
                ) =>
            {
                for pending in batch {
                    let _ = pending.reply.send(Err(error.clone()));
                }
            }
            Err(error) => {
                tracing::debug!(%error, "could not reconcile several services with one request");
                self.0
                    .reconcile_batch
                    .on_failure(error.kind().is_transient(), Instant::now());
            }
        }
    }

    /// Reads one page for each request, all at one revision.
    async fn list_all(&self, batch: &[Pending]) -> Result<Vec<Option<Page>>, EtcdError> {
        const OPERATION: &str = "list";
        self.attempt(Traffic::Keys, OPERATION, DEADLINE, |channel| {
            let gets = batch.iter().map(|pending| {
                let start = pending.request.range.start.as_bytes();
                TxnOp::get(start, Some(kv::list_options(&pending.request)))
            });
            let txn = Txn::new().and_then(gets.collect::<Vec<_>>());
            async move {
                let mut kv = channel
                    .client
                    .kv_client()
                    .max_decoding_message_size(MAX_MESSAGE);
                let response = kv.txn(txn).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &channel.endpoint(), source))?;
                let header = header(response.0.header.as_ref());
                self.0.id.check(header, OPERATION, &channel.endpoint())?;
                let pages = response.0.responses.into_iter();
                let pages = pages.map(|answer| match answer.response {
                    Some(PbTxnOpResponse::ResponseRange(range)) => Some(Page {
                        header,
                        more: range.more,
                        count: usize::try_from(range.count).unwrap_or(0),
                        kvs: range.kvs.into_iter().map(key_value).collect(),
                    }),
                    _ => None,
                });
                Ok(pages.collect())
            }
        })
        .await
    }
}

/// The time in which requests are collected. It can be short: the reconciliations of one registry are due at the same time (see
/// [`Slots`](crate::slots::Slots)), so their requests are only as far apart as the wake-ups of their tasks.
const COLLECT: Duration = Duration::from_millis(20);
