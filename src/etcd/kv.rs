//! Reads and writes keys.

use std::time::Duration;

use etcd_client::proto::PbTxnOpResponse;
use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, SortOrder, SortTarget, Txn, TxnOp};

use super::cluster::Etcd;
use super::decode::{header, key_value};
use super::error;
use super::limits::MAX_MESSAGE;
use super::member_health::Traffic;
use super::request_channel::RequestChannel;
use crate::error::EtcdError;
use crate::keyspace::{
    GuardedPut, Header, Key, KeyValue, KeyVersion, LeaseId, ListRequest, Page, Range, Revision,
};

impl Etcd {
    /// Reads one page of a range, linearizably. The page has up to `limit` keys. It is read at `revision`, or at the newest revision if
    /// `revision` is zero.
    pub(crate) async fn list(&self, request: &ListRequest) -> Result<Page, EtcdError> {
        const OPERATION: &str = "list";
        self.call(OPERATION, |channel| {
            let options = list_options(request);
            let start = request.range.start.as_bytes().to_vec();
            async move {
                let mut kv = channel
                    .client
                    .kv_client()
                    .max_decoding_message_size(MAX_MESSAGE);
                let response = kv.get(start, Some(options)).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &channel.endpoint(), source))?;
                let header = header(response.0.header.as_ref());
                self.0.id.check(header, OPERATION, &channel.endpoint())?;
                Ok(Page {
                    header,
                    more: response.0.more,
                    count: usize::try_from(response.0.count).unwrap_or(0),
                    kvs: response.0.kvs.into_iter().map(key_value).collect(),
                })
            }
        })
        .await
    }

    /// Returns the number of keys in a range. Makes a single attempt. The member answers from its own store, which may be behind the store
    /// of the leader.
    pub(crate) async fn count(
        &self,
        range: &Range,
        deadline: Duration,
    ) -> Result<usize, EtcdError> {
        const OPERATION: &str = "count";
        self.attempt(Traffic::Keys, OPERATION, deadline, |channel| {
            let options = GetOptions::new()
                .with_range(range.end.as_bytes())
                .with_serializable()
                .with_count_only();
            let start = range.start.as_bytes().to_vec();
            async move {
                let response = channel.client.kv_client().get(start, Some(options)).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &channel.endpoint(), source))?;
                let header = header(response.0.header.as_ref());
                self.0.id.check(header, OPERATION, &channel.endpoint())?;
                Ok(usize::try_from(response.0.count).unwrap_or(0))
            }
        })
        .await
    }

    /// Reads one key, linearizably.
    pub(crate) async fn read(&self, key: &Key) -> Result<(Header, Option<KeyValue>), EtcdError> {
        self.call("read", |channel| self.read_over(channel, key.clone()))
            .await
    }

    /// Reads the [`KeyVersion`] of a key, linearizably. It contains the digest of the value only if `with_value` is true.
    pub(crate) async fn version(
        &self,
        key: &Key,
        with_value: bool,
    ) -> Result<(Header, Option<KeyVersion>), EtcdError> {
        let request = ListRequest {
            range: Range::key(key),
            limit: 1,
            revision: Revision::ZERO,
            written_after: Revision::ZERO,
            keys_only: !with_value,
        };
        let page = self.list(&request).await?;
        let version = if with_value {
            KeyValue::version
        } else {
            KeyValue::named
        };
        Ok((page.header, page.kvs.first().map(version)))
    }

    /// Reads one key as [`Etcd::read`] does, in a single attempt.
    pub(crate) async fn read_once(
        &self,
        key: &Key,
        deadline: Duration,
    ) -> Result<(Header, Option<KeyValue>), EtcdError> {
        self.attempt(Traffic::Keys, "read", deadline, |channel| {
            self.read_over(channel, key.clone())
        })
        .await
    }

    /// Reads one key over `channel`, and checks that the response is from this cluster.
    async fn read_over(
        &self,
        channel: RequestChannel,
        key: Key,
    ) -> Result<(Header, Option<KeyValue>), EtcdError> {
        let (header, found) = read(channel.clone(), key).await?;
        self.0.id.check(header, "read", &channel.endpoint())?;
        Ok((header, found))
    }

    /// Reads the keys in the given order, linearizably. Each batch of up to 100 keys is read in one request, at one revision, with a single
    /// attempt. Returns the header of the last batch, and one result for each key.
    pub(crate) async fn read_each(
        &self,
        keys: &[Key],
        deadline: Duration,
    ) -> Result<(Header, Vec<Option<KeyValue>>), EtcdError> {
        let mut head = Header::default();
        let mut found = Vec::with_capacity(keys.len());
        for chunk in keys.chunks(OPERATIONS_MAX) {
            let answer = self.attempt(Traffic::Keys, "read", deadline, |channel| async move {
                let (header, found) = read_all(channel.clone(), chunk.to_vec()).await?;
                self.0.id.check(header, "read", &channel.endpoint())?;
                Ok((header, found))
            });
            let (header, chunk) = answer.await?;
            head = header;
            found.extend(chunk);
        }
        Ok((head, found))
    }

    /// Puts all keys, each attached to its lease, or puts none of them. The keys are put only if the mod revision of each key still equals
    /// its `expected` revision. An `expected` revision of zero means that the key does not exist. Returns the new revision, or `None` if
    /// the revision of a key differs. Makes a single attempt.
    pub(crate) async fn put_if(
        &self,
        puts: &[GuardedPut],
        deadline: Duration,
    ) -> Result<Option<Revision>, EtcdError> {
        const OPERATION: &str = "put";
        let unchanged = |put: &GuardedPut| {
            let key = put.key.as_bytes().to_vec();
            Compare::mod_revision(key, CompareOp::Equal, put.expected.get())
        };
        let write = |put: &GuardedPut| {
            let options = PutOptions::new().with_lease(put.lease.get());
            TxnOp::put(put.key.as_bytes(), put.value.clone(), Some(options))
        };
        self.attempt(Traffic::Keys, OPERATION, deadline, |channel| {
            let txn = Txn::new()
                .when(puts.iter().map(unchanged).collect::<Vec<_>>())
                .and_then(puts.iter().map(write).collect::<Vec<_>>());
            async move {
                let response = channel.client.kv_client().txn(txn).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &channel.endpoint(), source))?;
                let header = header(response.0.header.as_ref());
                self.0.id.check(header, OPERATION, &channel.endpoint())?;
                let revision = header.revision;
                Ok(response.succeeded().then_some(revision))
            }
        })
        .await
    }

    /// Deletes a key if it is attached to `lease`, and, with a revision, if it was not written after it; otherwise does nothing. Makes a
    /// single attempt.
    pub(crate) async fn delete_if(
        &self,
        key: &Key,
        lease: LeaseId,
        revision: Option<Revision>,
        deadline: Duration,
    ) -> Result<(), EtcdError> {
        const OPERATION: &str = "delete";
        self.attempt(Traffic::Keys, OPERATION, deadline, |channel| {
            let key = key.as_bytes();
            let of_lease = Compare::lease(key, CompareOp::Equal, lease.get());
            let unchanged = revision
                .map(|revision| Compare::mod_revision(key, CompareOp::Equal, revision.get()));
            let conditions: Vec<_> = [of_lease].into_iter().chain(unchanged).collect();
            let txn = Txn::new()
                .when(conditions)
                .and_then([TxnOp::delete(key, None)]);
            async move {
                let response = channel.client.kv_client().txn(txn).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &channel.endpoint(), source))?;
                let header = header(response.0.header.as_ref());
                self.0.id.check(header, OPERATION, &channel.endpoint())
            }
        })
        .await
    }
}

pub(super) fn list_options(request: &ListRequest) -> GetOptions {
    let mut options = GetOptions::new()
        .with_range(request.range.end.as_bytes())
        .with_limit(request.limit)
        .with_revision(request.revision.get())
        .with_sort(SortTarget::Key, SortOrder::Ascend);
    if request.keys_only {
        options = options.with_keys_only();
    }
    if request.written_after > Revision::ZERO {
        options = options.with_min_mod_revision(request.written_after.get() + 1);
    }
    options
}

/// Reads up to [`OPERATIONS_MAX`] keys at one revision.
async fn read_all(
    channel: RequestChannel,
    keys: Vec<Key>,
) -> Result<(Header, Vec<Option<KeyValue>>), EtcdError> {
    if let [key] = &keys[..] {
        let (header, found) = read(channel, key.clone()).await?;
        return Ok((header, vec![found]));
    }
    let gets = keys.iter().map(|key| TxnOp::get(key.as_bytes(), None));
    let txn = Txn::new().and_then(gets.collect::<Vec<_>>());
    let mut kv = channel
        .client
        .kv_client()
        .max_decoding_message_size(MAX_MESSAGE);
    let response = kv.txn(txn).await;
    let response =
        response.map_err(|source| error::of_client("read", &channel.endpoint(), source))?;
    let found = response
        .0
        .responses
        .into_iter()
        .map(|answer| match answer.response {
            Some(PbTxnOpResponse::ResponseRange(range)) => {
                range.kvs.into_iter().next().map(key_value)
            }
            _ => None,
        });
    let mut found: Vec<_> = found.collect();
    // The caller expects one result for each key, even if the response is too short.
    found.resize(keys.len(), None);
    Ok((header(response.0.header.as_ref()), found))
}

async fn read(channel: RequestChannel, key: Key) -> Result<(Header, Option<KeyValue>), EtcdError> {
    let mut kv = channel
        .client
        .kv_client()
        .max_decoding_message_size(MAX_MESSAGE);
    let response = kv.get(key.as_bytes(), None).await;
    let response =
        response.map_err(|source| error::of_client("read", &channel.endpoint(), source))?;
    Ok((
        header(response.0.header.as_ref()),
        response.0.kvs.into_iter().next().map(key_value),
    ))
}

/// Maximum number of operations in one transaction. etcd rejects more than 128 by default.
pub(super) const OPERATIONS_MAX: usize = 100;
