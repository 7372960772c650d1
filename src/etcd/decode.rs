//! Converts the messages of the etcd client into the types of this crate.

use crate::format::MAX_VALUE;
use crate::keyspace::{Header, KeyValue, LeaseId, Revision};

/// Converts the header of a response. If the header is missing, all fields are zero.
pub(super) fn header(header: Option<&etcd_client::proto::PbResponseHeader>) -> Header {
    header.map_or_else(Header::default, |header| Header {
        cluster_id: header.cluster_id,
        revision: Revision::new(header.revision),
        raft_term: header.raft_term,
    })
}

/// Converts a key with its value.
pub(super) fn key_value(kv: etcd_client::proto::PbKeyValue) -> KeyValue {
    let mut value = kv.value;
    if value.len() > MAX_VALUE {
        // The value is truncated, so that a list of many such values does not fill the memory. One byte more than the limit is kept, so
        // that the decoder of the format, which runs later, still rejects the value as too large.
        value.truncate(MAX_VALUE + 1);
        value.shrink_to_fit();
    }
    KeyValue {
        key: kv.key.into(),
        value,
        create_revision: Revision::new(kv.create_revision),
        mod_revision: Revision::new(kv.mod_revision),
        lease: LeaseId::new(kv.lease),
    }
}
