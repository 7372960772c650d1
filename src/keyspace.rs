//! The words of etcd that the pure machines speak: keys, ranges, revisions, leases, events. Nothing here does I/O.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

/// A revision of an etcd store: a counter that every change raises. 0 stands for "none".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(i64);

impl Revision {
    /// The revision of a key that does not exist.
    pub const ZERO: Self = Self(0);

    pub(crate) const fn new(revision: i64) -> Self {
        Self(revision)
    }

    /// The revision as etcd's API writes it.
    #[must_use]
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl From<i64> for Revision {
    fn from(number: i64) -> Self {
        Self(number)
    }
}

impl From<Revision> for i64 {
    fn from(revision: Revision) -> Self {
        revision.0
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The id of an etcd lease. 0 stands for "none". Displayed in hexadecimal, as `etcdctl lease list` does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(i64);

impl LeaseId {
    /// The lease of a key that hangs on none.
    pub const NONE: Self = Self(0);

    pub(crate) const fn new(id: i64) -> Self {
        Self(id)
    }

    /// Chooses a lease id. Ids are the client's, so that a grant repeated after a lost answer is harmless; 62 random bits make a
    /// collision with another client's id as likely as a broken disk.
    pub(crate) fn random(rng: &mut fastrand::Rng) -> Self {
        Self(rng.i64(1..=i64::MAX >> 1))
    }

    /// The id as etcd's API writes it.
    #[must_use]
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl From<i64> for LeaseId {
    fn from(number: i64) -> Self {
        Self(number)
    }
}

impl From<LeaseId> for i64 {
    fn from(lease: LeaseId) -> Self {
        lease.0
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// An etcd key: any bytes, cheap to clone. Displayed as text, with what is not UTF-8 replaced.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key(Arc<[u8]>);

impl Key {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The smallest key above this one.
    pub(crate) fn successor(&self) -> Self {
        let mut next = self.0.to_vec();
        next.push(0);
        Self(next.into())
    }
}

impl From<Vec<u8>> for Key {
    fn from(key: Vec<u8>) -> Self {
        Self(key.into())
    }
}

impl From<&str> for Key {
    fn from(key: &str) -> Self {
        Self(key.as_bytes().into())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(&self.0).fmt(f)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(&self.0), f)
    }
}

/// The keys from `start` up to, and without, `end`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Range {
    pub(crate) start: Key,
    pub(crate) end: Key,
}

impl Range {
    /// All keys that begin with `prefix`, which must not be empty.
    pub(crate) fn prefix(prefix: &str) -> Self {
        let mut end = prefix.as_bytes().to_vec();
        // UTF-8 never contains 0xff, so the last byte can always be raised.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Self {
            start: prefix.into(),
            end: end.into(),
        }
    }

    /// One key alone.
    pub(crate) fn key(key: &Key) -> Self {
        Self {
            start: key.clone(),
            end: key.successor(),
        }
    }

    #[cfg(test)]
    pub(crate) fn contains(&self, key: &Key) -> bool {
        (&self.start..&self.end).contains(&key)
    }

    /// What follows the range's common prefix in a key: the instance id.
    pub(crate) fn suffix<'a>(&self, key: &'a Key) -> &'a [u8] {
        key.as_bytes()
            .strip_prefix(self.start.as_bytes())
            .unwrap_or(key.as_bytes())
    }
}

/// A key with its value and where it stands in the store's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyValue {
    pub(crate) key: Key,
    pub(crate) value: Vec<u8>,
    pub(crate) create_revision: Revision,
    pub(crate) mod_revision: Revision,
    pub(crate) lease: LeaseId,
}

impl KeyValue {
    /// Which write of the key this is.
    pub(crate) fn version(&self) -> KeyVersion {
        let mut hasher = DefaultHasher::new();
        self.value.hash(&mut hasher);
        KeyVersion {
            digest: Some(hasher.finish()),
            ..self.named()
        }
    }

    /// The same for a key that was read without its value.
    pub(crate) fn named(&self) -> KeyVersion {
        KeyVersion {
            key: self.key.clone(),
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            lease: self.lease,
            digest: None,
        }
    }
}

/// Which write of a key this is. The lease belongs to it: a store that was wiped and filled again can repeat every revision, but not
/// the lease ids. So do the key's creation and its value, for keys without a lease: where all of that is the same, nothing is another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyVersion {
    pub(crate) key: Key,
    pub(crate) create_revision: Revision,
    pub(crate) mod_revision: Revision,
    pub(crate) lease: LeaseId,
    /// Of the value; `None` if that was not read.
    pub(crate) digest: Option<u64>,
}

/// One change of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Put(KeyValue),
    Delete { key: Key, mod_revision: Revision },
}

impl Event {
    pub(crate) fn key(&self) -> &Key {
        match self {
            Self::Put(kv) => &kv.key,
            Self::Delete { key, .. } => key,
        }
    }

    pub(crate) fn mod_revision(&self) -> Revision {
        match self {
            Self::Put(kv) => kv.mod_revision,
            Self::Delete { mod_revision, .. } => *mod_revision,
        }
    }
}

/// What every answer of etcd begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) cluster_id: u64,
    pub(crate) revision: Revision,
    pub(crate) raft_term: u64,
}

/// Which keys to list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListRequest {
    pub(crate) range: Range,
    pub(crate) limit: i64,
    /// Zero reads at the newest revision.
    pub(crate) revision: Revision,
    pub(crate) keys_only: bool,
}

/// A part of a range.
#[derive(Clone, Debug, Default)]
pub(crate) struct Page {
    pub(crate) header: Header,
    pub(crate) kvs: Vec<KeyValue>,
    /// Whether the range goes on after it.
    pub(crate) more: bool,
}

/// A put that happens only if the key is as it was read.
#[derive(Clone, Debug)]
pub(crate) struct GuardedPut {
    pub(crate) key: Key,
    pub(crate) value: Vec<u8>,
    pub(crate) lease: LeaseId,
    pub(crate) expected: Revision,
}

/// The answer to a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeepAlive {
    /// The answering member's header; `None` where the client at hand does not show it.
    pub(crate) header: Option<Header>,
    /// The new time to live.
    pub(crate) ttl: Duration,
}

/// One message of a watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WatchMessage {
    /// How far the member's store is. It runs ahead of the events in catch-up batches, and is no point to resume from.
    pub(crate) header: Header,
    pub(crate) events: Vec<Event>,
    /// Whether more of the last event's revision follows in the next message.
    pub(crate) fragment: bool,
    pub(crate) created: bool,
    pub(crate) canceled: bool,
    /// The revision from which history is left, if the watch asked for an older one; else zero.
    pub(crate) compacted: Revision,
    pub(crate) cancel_reason: String,
}

/// Where services live in the store: under the registry's own prefix, or else that of the format in which they are written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Keyspace {
    prefix: Option<String>,
}

impl Keyspace {
    /// The prefix gets a trailing slash if it has none; an empty one stays empty.
    pub(crate) fn new(prefix: &str) -> Self {
        let prefix = match prefix {
            "" => String::new(),
            prefix => with_slash(prefix),
        };
        Self {
            prefix: Some(prefix),
        }
    }

    /// The prefix of this library's own format, if none was given.
    pub(crate) fn prefix(&self) -> &str {
        self.given().unwrap_or(DEFAULT_PREFIX)
    }

    /// The prefix that was given.
    pub(crate) fn given(&self) -> Option<&str> {
        self.prefix.as_deref()
    }
}

/// Where the services of this library live unless told otherwise.
pub(crate) const DEFAULT_PREFIX: &str = "/gRPC/";

/// A prefix that ends in a slash.
pub(crate) fn with_slash(prefix: &str) -> String {
    if prefix.ends_with('/') {
        prefix.to_owned()
    } else {
        format!("{prefix}/")
    }
}

/// Says what is wrong with a service name, if anything.
pub(crate) fn check_service(service: &str) -> Result<(), &'static str> {
    if service.is_empty() {
        return Err("is empty");
    }
    if service.contains('/') {
        return Err("contains a slash, which separates the service from the instance in the key");
    }
    if service.chars().any(char::is_control) {
        return Err("contains a control character");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_in_a_slash_unless_it_is_empty() {
        for (given, prefix) in [("/gRPC", "/gRPC/"), ("team/", "team/"), ("", "")] {
            assert_eq!(Keyspace::new(given).given(), Some(prefix));
        }
        let none = Keyspace::default();
        assert_eq!((none.given(), none.prefix()), (None, DEFAULT_PREFIX));
    }

    #[test]
    fn a_service_never_sees_the_keys_of_another_that_begins_alike() {
        let range = Range::prefix("/gRPC/user/");
        assert!(range.contains(&Key::from("/gRPC/user/10.0.0.1:80")));
        assert!(!range.contains(&Key::from("/gRPC/user-admin/10.0.0.1:80")));
        assert!(!range.contains(&Key::from("/gRPC/usera/10.0.0.1:80")));
        assert_eq!(range.suffix(&Key::from("/gRPC/user/a/b")), b"a/b");
    }

    #[test]
    fn service_names_are_checked() {
        assert!(check_service("helloworld.Greeter").is_ok());
        for service in ["", "a/b", "/", "a\nb"] {
            assert!(
                check_service(service).is_err(),
                "{service:?} must be refused"
            );
        }
    }

    #[test]
    fn a_key_range_holds_exactly_one_key() {
        let key = Key::from("/a");
        let range = Range::key(&key);
        assert!(range.contains(&key));
        assert!(!range.contains(&Key::from("/a/")));
        assert!(!range.contains(&Key::from("/b")));
    }
}
