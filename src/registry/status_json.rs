//! The serialized form of the status of a channel.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use tokio::time::Instant;
use tonic_balance::channel::EndpointStatus;

use super::channel_status::{ChannelStatus, EndpointReport};
use crate::instance::{Instance, KeyLocation};
use crate::keyspace::Revision;
use crate::resolver::{RejectedKey, ResolverState, ResolverStatus, ServiceConfigStatus};

/// An object with the fields `service`, `resolver`, `endpoints`, `rejected` and `service_config`.
impl Serialize for ChannelStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a> {
            service: &'a str,
            resolver: &'a ResolverStatus,
            endpoints: &'a [EndpointReport],
            rejected: &'a [RejectedKey],
            service_config: Option<&'a ServiceConfigStatus>,
        }
        let Self {
            service,
            resolver,
            endpoints,
            rejected,
            service_config,
        } = self;
        let fields = Fields {
            service,
            resolver,
            endpoints,
            rejected,
            service_config: service_config.as_ref(),
        };
        fields.serialize(serializer)
    }
}

/// The fields of the status, without the service config itself, which is in etcd.
impl Serialize for ServiceConfigStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a> {
            key: &'a str,
            revision: Option<i64>,
            stale: bool,
            last_error: Option<&'a str>,
            rejected: u64,
        }
        let fields = Fields {
            key: &self.key,
            revision: self.revision.map(Revision::get),
            stale: self.stale,
            last_error: self.last_error.as_deref(),
            rejected: self.rejected,
        };
        fields.serialize(serializer)
    }
}

/// The fields of [`EndpointStatus`], and `instance`.
impl Serialize for EndpointReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a> {
            #[serde(flatten)]
            endpoint: &'a EndpointStatus,
            instance: Option<&'a Instance>,
        }
        let fields = Fields {
            endpoint: &self.endpoint,
            instance: self.instance.as_ref(),
        };
        fields.serialize(serializer)
    }
}

/// The attributes of the instance, and its place in etcd. The lease is a text in hexadecimal, as `etcdctl` prints it.
impl Serialize for Instance {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a> {
            address: &'a str,
            id: Option<&'a str>,
            key: Option<&'a str>,
            lease: Option<String>,
            create_revision: Option<i64>,
            mod_revision: Option<i64>,
            weight: u32,
            zone: Option<&'a str>,
            version: Option<&'a str>,
            metadata: &'a BTreeMap<String, String>,
            tls: bool,
            leaving: bool,
            last_resort: bool,
        }
        let location = self.location();
        let lease = location.and_then(KeyLocation::lease);
        let fields = Fields {
            address: self.address().as_str(),
            id: self.id(),
            key: location.map(KeyLocation::key),
            lease: lease.map(|lease| lease.to_string()),
            create_revision: location.map(|location| location.create_revision().get()),
            mod_revision: location.map(|location| location.mod_revision().get()),
            weight: self.weight(),
            zone: self.zone(),
            version: self.version(),
            metadata: self.metadata(),
            tls: self.is_tls(),
            leaving: self.is_leaving(),
            last_resort: self.is_last_resort(),
        };
        fields.serialize(serializer)
    }
}

/// Fields with the names of [`ResolverStatus`]. `state_seconds` is the time since [`since`](ResolverStatus::since), in seconds, and
/// `last_error` is a text.
impl Serialize for ResolverStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields {
            state: ResolverState,
            state_seconds: f64,
            revision: Option<i64>,
            last_error: Option<String>,
            rejected_values: u64,
            lists: u64,
            watches: u64,
            reconciliations: u64,
            reads: u64,
            repaired: u64,
            cached: usize,
            held: usize,
            mass_removals: u64,
        }
        let age = Instant::now().saturating_duration_since(self.since);
        let fields = Fields {
            state: self.state,
            state_seconds: age.as_secs_f64(),
            revision: self.revision.map(i64::from),
            last_error: self.last_error.as_ref().map(ToString::to_string),
            rejected_values: self.rejected_values,
            lists: self.lists,
            watches: self.watches,
            reconciliations: self.reconciliations,
            reads: self.reads,
            repaired: self.repaired,
            cached: self.cached,
            held: self.held,
            mass_removals: self.mass_removals,
        };
        fields.serialize(serializer)
    }
}

/// The text of `Display`, for example `"fresh"`.
impl Serialize for ResolverState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An object with the fields `key`, `revision` and `reason`.
impl Serialize for RejectedKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a> {
            key: &'a str,
            revision: i64,
            reason: String,
        }
        let fields = Fields {
            key: &self.key,
            revision: self.revision.get(),
            reason: self.reason.to_string(),
        };
        fields.serialize(serializer)
    }
}
