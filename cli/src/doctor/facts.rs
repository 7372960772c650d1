//! What `doctor` has observed.

use std::time::Duration;

use crate::probe::Answer;

/// All facts. A part that could not be gathered has the reason.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// The configured endpoints.
    pub(super) endpoints: Vec<String>,
    /// Whether etcd responds with these credentials. If not, all other facts are missing.
    pub(super) connection: Result<(), String>,
    pub(super) members: Result<Vec<Member>, String>,
    /// Configured endpoints that do not respond and belong to no listed member.
    pub(super) dead_endpoints: Vec<(String, String)>,
    pub(super) alarms: Result<Vec<Alarm>, String>,
    pub(super) clocks: Vec<Clock>,
    pub(super) user: Option<String>,
    /// What the keys start with.
    pub(super) prefix: String,
    pub(super) read: Access,
    pub(super) write: Access,
    /// The service that was given, if any.
    pub(super) wanted: Option<String>,
    pub(super) services: Vec<Service>,
    /// Keys of the wanted service under other prefixes.
    pub(super) elsewhere: Vec<String>,
    pub(super) remote_clients: bool,
    /// Whether clients use TLS to the servers.
    pub(super) client_tls: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Granted,
    Denied,
    /// The check itself has failed.
    Unknown(String),
}

/// One member of etcd.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) name: String,
    /// The client URLs, without the scheme.
    pub(super) addresses: Vec<String>,
    pub(super) answer: Result<MemberStatus, String>,
}

#[derive(Clone, Debug)]
pub(super) struct MemberStatus {
    pub(super) latency: Duration,
    pub(super) version: String,
    pub(super) has_leader: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Alarm {
    pub(super) member: String,
    pub(super) kind: AlarmKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AlarmKind {
    NoSpace,
    Corrupt,
    Other,
}

/// The clock of a member, relative to this host.
#[derive(Clone, Debug)]
pub(super) struct Clock {
    pub(super) endpoint: String,
    pub(super) seconds_ahead: i64,
}

#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) keys: Vec<Key>,
}

/// One key of a service.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) name: String,
    /// The address; `None` if the key is not an instance in service.
    pub(super) address: Option<String>,
    pub(super) is_loopback: bool,
    /// Whether the server advertises TLS.
    pub(super) tls_hint: bool,
    /// The reason why the value cannot be read.
    pub(super) rejected: Option<String>,
    pub(super) lease: LeaseState,
    /// What answers at the address, if it was dialled.
    pub(super) answer: Option<Answer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeaseState {
    None,
    /// etcd did not return the TTL.
    Unknown,
    /// The remaining and the granted TTL, in seconds.
    Ttl {
        left: i64,
        granted: i64,
    },
}
