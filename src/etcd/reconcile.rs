//! Sends the reconciliation requests of several services as one transaction. A resolver periodically reconciles its service: it compares
//! the keys in etcd with those that it knows, to find changes that its watch has not delivered. Without this module, a process with a
//! thousand services would send several requests per second at rest.
//!
//! A batch must not let one service affect another: if etcd rejects the transaction, for example because of the permissions on one prefix,
//! each service sends its own request.

use std::time::Duration;

use etcd_client::proto::PbTxnOpResponse;
use etcd_client::{Txn, TxnOp};
use tokio::sync::oneshot;

use super::cluster::Etcd;
use super::decode::{header, key_value};
use super::error;
use super::kv::{self, OPERATIONS_MAX};
use super::limits::MAX_MESSAGE;
use super::reconcile_batch::Pending;
use crate::error::EtcdError;
use crate::keyspace::{ListRequest, Page};

/// Held by the task that collects a batch, until the task takes the batch. If the runtime of the task ends earlier, the drop of this value
/// empties the batch, and the owner of each request sends the request alone. Without it, the requests of other runtimes would wait forever.
struct Collection(Option<Etcd>);

impl Drop for Collection {
    fn drop(&mut self) {
        if let Some(etcd) = &self.0 {
            drop(etcd.0.reconcile_batch.take());
        }
    }
}

impl Etcd {
    /// Reads one page as [`Etcd::list`] does. Requests that are made within 20 ms share transactions of up to [`OPERATIONS_MAX`] requests.
    /// A request that is the only one of its transaction is sent alone, as a list request.
    pub(crate) async fn reconcile(&self, request: &ListRequest) -> Result<Page, EtcdError> {
        let (reply, answer) = oneshot::channel();
        let request_of = request.clone();
        let is_first = self.0.reconcile_batch.push(Pending {
            request: request_of,
            reply,
        });
        if is_first {
            let mut collection = Collection(Some(self.clone()));
            tokio::spawn(async move {
                tokio::time::sleep(COLLECT).await;
                let Some(etcd) = collection.0.take() else {
                    return;
                };
                let mut batch = etcd.0.reconcile_batch.take();
                while !batch.is_empty() {
                    let rest = batch.split_off(batch.len().min(OPERATIONS_MAX));
                    etcd.send_batch(batch).await;
                    batch = rest;
                }
            });
        }
        match answer.await {
            Ok(answer) => answer,
            Err(_) => self.list(request).await,
        }
    }

    async fn send_batch(&self, batch: Vec<Pending>) {
        // Resolvers that have ended no longer wait for a response.
        let batch: Vec<_> = batch
            .into_iter()
            .filter(|pending| !pending.reply.is_closed())
            .collect();
        if batch.len() < 2 {
            return;
        }
        match self.list_all(&batch).await {
            Ok(pages) => {
                // If the response is too short, the remaining requests are sent alone.
                for (pending, page) in batch.into_iter().zip(pages) {
                    if let Some(page) = page {
                        let _ = pending.reply.send(Ok(page));
                    }
                }
            }
            // etcd is unavailable at present, so separate requests would fail as well.
            Err(error) if error.kind().is_transient() => {
                for pending in batch {
                    let _ = pending.reply.send(Err(error.clone()));
                }
            }
            Err(error) => {
                tracing::debug!(%error, "could not reconcile several services with one request");
            }
        }
    }

    /// Reads one page for each request, all at one revision.
    async fn list_all(&self, batch: &[Pending]) -> Result<Vec<Option<Page>>, EtcdError> {
        const OPERATION: &str = "list";
        self.call(OPERATION, |channel| {
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

/// The time in which requests are collected. It is short, because the reconciliations of one registry are due at the same time (see
/// [`Slots`](crate::slots::Slots)) and only their tasks wake up one after another.
const COLLECT: Duration = Duration::from_millis(20);
