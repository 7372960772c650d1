//! The etcd data types that the resolver, the registration and the etcd client share: keys, ranges, revisions, leases, events. This module
//! does no I/O.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

/// A revision of an etcd store: a counter that every change increments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(i64);

impl Revision {
    /// Zero. In etcd's API, zero stands for no revision: it is, for example, the mod revision of a key that does not exist.
    pub(crate) const ZERO: Self = Self(0);

    pub(crate) const fn new(revision: i64) -> Self {
        Self(revision)
    }

    /// Returns `None` for zero, which stands for no revision.
    pub(crate) fn known(self) -> Option<Self> {
        (self != Self::ZERO).then_some(self)
    }

    /// Returns the revision as the number used in etcd's API.
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

/// The id of an etcd lease. It is displayed in hexadecimal, as in `etcdctl lease list`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(i64);

impl LeaseId {
    /// Zero. In etcd's API, zero stands for no lease.
    pub(crate) const NONE: Self = Self(0);

    pub(crate) const fn new(id: i64) -> Self {
        Self(id)
    }

    /// Chooses a random lease id. The client chooses the id, so that it can safely repeat a grant whose response was lost. With 62 random
    /// bits, a collision with an id of another client is extremely unlikely.
    pub(crate) fn random(rng: &mut fastrand::Rng) -> Self {
        Self(rng.i64(1..=i64::MAX >> 1))
    }

    /// Returns `None` for zero, which stands for no lease.
    pub(crate) fn known(self) -> Option<Self> {
        (self != Self::NONE).then_some(self)
    }

    /// Returns the id as the number used in etcd's API.
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
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LeaseId({self})")
    }
}

/// An etcd key: arbitrary bytes, cheap to clone. It is displayed as text, in which bytes that are not UTF-8 are replaced.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key(Arc<[u8]>);

impl Key {
    /// Returns the key as text, with escaped control characters. Bytes that are not UTF-8 are replaced.
    pub(crate) fn escaped(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        let mut escaped = String::with_capacity(text.len());
        for char in text.chars() {
            if char.is_control() {
                escaped.extend(char.escape_debug());
            } else {
                escaped.push(char);
            }
        }
        escaped
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the smallest key above this key.
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

/// The keys from `start` (inclusive) to `end` (exclusive).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Range {
    pub(crate) start: Key,
    pub(crate) end: Key,
}

impl Range {
    /// Returns the range of all keys that begin with `prefix`, which must not be empty.
    pub(crate) fn prefix(prefix: &str) -> Self {
        let mut end = prefix.as_bytes().to_vec();
        // UTF-8 never contains 0xff, so the last byte can always be incremented.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Self {
            start: prefix.into(),
            end: end.into(),
        }
    }

    /// Returns the range of a single key.
    pub(crate) fn key(key: &Key) -> Self {
        Self {
            start: key.clone(),
            end: key.successor(),
        }
    }

    pub(crate) fn contains(&self, key: &Key) -> bool {
        (&self.start..&self.end).contains(&key)
    }

    /// Returns the part of a key after the common prefix of the range: the instance id.
    pub(crate) fn suffix<'a>(&self, key: &'a Key) -> &'a [u8] {
        key.as_bytes()
            .strip_prefix(self.start.as_bytes())
            .unwrap_or(key.as_bytes())
    }
}

/// A key with its value, its revisions and its lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyValue {
    pub(crate) key: Key,
    pub(crate) value: Vec<u8>,
    pub(crate) create_revision: Revision,
    pub(crate) mod_revision: Revision,
    pub(crate) lease: LeaseId,
}

impl KeyValue {
    /// Returns the version, which identifies the write that created this value.
    pub(crate) fn version(&self) -> KeyVersion {
        let mut hasher = DefaultHasher::new();
        self.value.hash(&mut hasher);
        KeyVersion {
            digest: Some(hasher.finish()),
            ..self.named()
        }
    }

    /// Returns the version without a digest, for a key that was read without its value.
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

/// Identifies one write of a key. All fields are compared, because revisions alone are ambiguous: a store that was wiped and filled again
/// can repeat every revision. Lease ids are not repeated, so the lease shows whether a key was written anew. For a key without a lease, the
/// digest of the value serves this purpose. Two writes with equal fields are equivalent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyVersion {
    pub(crate) key: Key,
    pub(crate) create_revision: Revision,
    pub(crate) mod_revision: Revision,
    pub(crate) lease: LeaseId,
    /// Digest of the value; `None` if the value was not read.
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

/// The header of every etcd response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) cluster_id: u64,
    pub(crate) revision: Revision,
    pub(crate) raft_term: u64,
}

impl Default for Header {
    /// The header for a response without a header: every number is zero, as in Protobuf.
    fn default() -> Self {
        Self {
            cluster_id: 0,
            revision: Revision::ZERO,
            raft_term: 0,
        }
    }
}

/// The parameters of a list request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListRequest {
    pub(crate) range: Range,
    pub(crate) limit: i64,
    /// Revision to read at; zero reads at the newest revision.
    pub(crate) revision: Revision,
    /// Return only keys that were written after this revision; zero returns all keys.
    pub(crate) written_after: Revision,
    pub(crate) keys_only: bool,
}

/// One page of a range.
#[derive(Clone, Debug, Default)]
pub(crate) struct Page {
    pub(crate) header: Header,
    pub(crate) kvs: Vec<KeyValue>,
    /// Whether the range has more keys after this page.
    pub(crate) more: bool,
    /// Number of keys in the range, whether or not they are in the page.
    pub(crate) count: usize,
}

/// A put that succeeds only if the key has not changed since it was read.
#[derive(Clone, Debug)]
pub(crate) struct GuardedPut {
    pub(crate) key: Key,
    pub(crate) value: Vec<u8>,
    pub(crate) lease: LeaseId,
    /// The mod revision that the key must still have; zero if the key must not exist.
    pub(crate) expected: Revision,
}

/// The response to a lease renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeepAlive {
    /// The header of the response; `None` if the client does not expose it.
    pub(crate) header: Option<Header>,
    /// The new time to live.
    pub(crate) ttl: Duration,
}

/// One message of a watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WatchMessage {
    /// Header with the current revision of the member's store. While the member sends history, this revision is higher than the revisions
    /// of the events, so a watch must not resume from the revision of the header.
    pub(crate) header: Header,
    pub(crate) events: Vec<Event>,
    /// Whether the next message may have further events of the same revision as the last event.
    pub(crate) fragment: bool,
    pub(crate) created: bool,
    pub(crate) canceled: bool,
    /// The oldest revision in the history of the store, if the watch requested an older revision.
    pub(crate) compacted: Option<Revision>,
    pub(crate) cancel_reason: String,
}

/// The prefix of the keys of all services. If none is configured, each [`Format`](crate::Format) uses its own default prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Keyspace {
    prefix: Option<String>,
}

impl Keyspace {
    /// Creates a keyspace with a prefix. A missing trailing slash is added; an empty prefix stays empty.
    pub(crate) fn new(prefix: &str) -> Self {
        let prefix = match prefix {
            "" => String::new(),
            prefix => with_slash(prefix),
        };
        Self {
            prefix: Some(prefix),
        }
    }

    /// Returns the configured prefix, or the default prefix of this library's own format.
    pub(crate) fn prefix(&self) -> &str {
        self.given().unwrap_or(DEFAULT_PREFIX)
    }

    /// Returns the configured prefix, if any.
    pub(crate) fn given(&self) -> Option<&str> {
        self.prefix.as_deref()
    }
}

/// The default prefix of this library's own format.
pub(crate) const DEFAULT_PREFIX: &str = "/gRPC/";

/// Returns the prefix with a trailing slash.
pub(crate) fn with_slash(prefix: &str) -> String {
    if prefix.ends_with('/') {
        prefix.to_owned()
    } else {
        format!("{prefix}/")
    }
}

/// Checks a service name. The error states how the name violates a rule, such as "is empty".
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
    if service.len() > SERVICE_MAX {
        return Err("is longer than 1 024 bytes");
    }
    Ok(())
}

/// Maximum length of a service name and of an instance id, in bytes. gRPC has no limit. The longest names in use have about a hundred
/// bytes.
pub(crate) const SERVICE_MAX: usize = 1_024;

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
    fn a_service_does_not_match_keys_of_services_with_longer_names() {
        let range = Range::prefix("/gRPC/user/");
        assert!(range.contains(&Key::from("/gRPC/user/10.0.0.1:80")));
        assert!(!range.contains(&Key::from("/gRPC/user-admin/10.0.0.1:80")));
        assert!(!range.contains(&Key::from("/gRPC/usera/10.0.0.1:80")));
        assert_eq!(range.suffix(&Key::from("/gRPC/user/a/b")), b"a/b");
    }

    #[test]
    fn service_names_are_validated() {
        assert!(check_service("helloworld.Greeter").is_ok());
        for service in ["", "a/b", "/", "a\nb"] {
            assert!(
                check_service(service).is_err(),
                "{service:?} must be refused"
            );
        }
    }

    #[test]
    fn the_range_of_a_key_contains_only_that_key() {
        let key = Key::from("/a");
        let range = Range::key(&key);
        assert!(range.contains(&key));
        assert!(!range.contains(&Key::from("/a/")));
        assert!(!range.contains(&Key::from("/b")));
    }
}
