//! Reading and writing keys.

use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, SortOrder, SortTarget, Txn, TxnOp};

use super::member::{Link, Traffic};
use super::{Etcd, MAX_MESSAGE, error, header, key_value};
use crate::error::EtcdError;
use crate::keyspace::{
    GuardedPut, Header, Key, KeyValue, KeyVersion, ListRequest, Page, Range, Revision,
};

impl Etcd {
    /// Reads up to `limit` keys of a range, linearizably: at `revision`, or at the newest.
    pub(crate) async fn list(&self, request: &ListRequest) -> Result<Page, EtcdError> {
        const OPERATION: &str = "list";
        self.call(OPERATION, |link| {
            let mut options = GetOptions::new()
                .with_range(request.range.end.as_bytes())
                .with_limit(request.limit)
                .with_revision(request.revision.get())
                .with_sort(SortTarget::Key, SortOrder::Ascend);
            if request.keys_only {
                options = options.with_keys_only();
            }
            let start = request.range.start.as_bytes().to_vec();
            async move {
                let mut kv = link
                    .client
                    .kv_client()
                    .max_decoding_message_size(MAX_MESSAGE);
                let response = kv.get(start, Some(options)).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &link.endpoint, source))?;
                Ok(Page {
                    header: header(response.0.header.as_ref()),
                    more: response.0.more,
                    kvs: response.0.kvs.into_iter().map(key_value).collect(),
                })
            }
        })
        .await
    }

    /// Reads one key, linearizably.
    pub(crate) async fn read(&self, key: &Key) -> Result<(Header, Option<KeyValue>), EtcdError> {
        self.call("read", |link| read(link, key.clone())).await
    }

    /// Reads which write of a key is the last, linearizably and without its value.
    pub(crate) async fn version(
        &self,
        key: &Key,
    ) -> Result<(Header, Option<KeyVersion>), EtcdError> {
        let request = ListRequest {
            range: Range::key(key),
            limit: 1,
            revision: Revision::ZERO,
            keys_only: true,
        };
        let page = self.list(&request).await?;
        Ok((page.header, page.kvs.first().map(KeyValue::version)))
    }

    /// As [`Etcd::read`], tried once.
    pub(crate) async fn read_once(
        &self,
        key: &Key,
        deadline: Duration,
    ) -> Result<(Header, Option<KeyValue>), EtcdError> {
        self.attempt(Traffic::Keys, "read", deadline, |link| {
            read(link, key.clone())
        })
        .await
    }

    /// Puts a key under a lease if nobody has written it since `expected` (zero: if it does not exist). Says the new revision, or
    /// `None` if somebody has. Tried once.
    pub(crate) async fn put_if(
        &self,
        put: &GuardedPut,
        deadline: Duration,
    ) -> Result<Option<Revision>, EtcdError> {
        const OPERATION: &str = "put";
        self.attempt(Traffic::Keys, OPERATION, deadline, |link| {
            let key = || put.key.as_bytes().to_vec();
            let compare = Compare::mod_revision(key(), CompareOp::Equal, put.expected.get());
            let options = PutOptions::new().with_lease(put.lease.get());
            let txn = Txn::new().when([compare]).and_then([TxnOp::put(
                key(),
                put.value.clone(),
                Some(options),
            )]);
            async move {
                let response = link.client.kv_client().txn(txn).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &link.endpoint, source))?;
                Ok(response
                    .succeeded()
                    .then(|| header(response.0.header.as_ref()).revision))
            }
        })
        .await
    }
}

async fn read(link: Link, key: Key) -> Result<(Header, Option<KeyValue>), EtcdError> {
    let mut kv = link
        .client
        .kv_client()
        .max_decoding_message_size(MAX_MESSAGE);
    let response = kv.get(key.as_bytes(), None).await;
    let response = response.map_err(|source| error::of_client("read", &link.endpoint, source))?;
    Ok((
        header(response.0.header.as_ref()),
        response.0.kvs.into_iter().next().map(key_value),
    ))
}
