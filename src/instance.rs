//! One registered server of a service, and its location in etcd.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::keyspace::KeyValue;
pub use crate::keyspace::{LeaseId, Revision};
use tonic_balance::Address;

/// One registered server of a service.
///
/// The *address* is the identity of an instance: a balancer connects to the address. All other attributes may change in place, without a
/// new connection. A clone shares the data by a reference count.
///
/// An instance that was read from etcd has an [id](Self::id) and a [location](Self::location). An instance that was created with
/// [`Instance::new`] has neither.
///
/// ```
/// use tonic_etcd::Instance;
///
/// let instance = Instance::new("10.0.0.5:50051".parse()?).with_weight(3).with_zone("eu-1a");
/// assert_eq!(instance.weight(), 3);
/// # Ok::<(), tonic_etcd::error::AddressError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    data: Arc<Data>,
    last_resort: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Data {
    advertisement: Advertisement,
    id: Option<String>,
    location: Option<KeyLocation>,
}

/// The key from which an instance was read, with its lease and its revisions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyLocation {
    key: String,
    lease: LeaseId,
    create_revision: Revision,
    mod_revision: Revision,
}

impl KeyLocation {
    pub(crate) fn new(key: String, kv: &KeyValue) -> Self {
        Self {
            key,
            lease: kv.lease,
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
        }
    }

    /// Returns the complete etcd key. Bytes that are not UTF-8 are replaced.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns the lease that the key is attached to, or `None` for a key without a lease. Such a key does not expire.
    #[must_use]
    pub fn lease(&self) -> Option<LeaseId> {
        self.lease.known()
    }

    /// Returns the revision at which the key was created.
    #[must_use]
    pub fn create_revision(&self) -> Revision {
        self.create_revision
    }

    /// Returns the revision at which the key was last written.
    #[must_use]
    pub fn mod_revision(&self) -> Revision {
        self.mod_revision
    }
}

impl Instance {
    /// Creates an instance for a server at `address` with the default attributes: weight 1, no zone, no version, no metadata.
    #[must_use]
    pub fn new(address: Address) -> Self {
        Self::from(Advertisement::new(address))
    }

    /// Sets the weight: the share of calls relative to the weights of the other instances. 0 counts as 1.
    #[must_use]
    pub fn with_weight(mut self, weight: u32) -> Self {
        self.advertisement_mut().weight = weight.max(1);
        self
    }

    /// Sets the zone.
    #[must_use]
    pub fn with_zone(mut self, zone: impl Into<String>) -> Self {
        self.advertisement_mut().zone = Some(zone.into());
        self
    }

    /// Sets the version.
    #[must_use]
    pub fn with_version(mut self, version: impl Into<String>) -> Self {
        self.advertisement_mut().version = Some(version.into());
        self
    }

    /// Adds one metadata entry.
    #[must_use]
    pub fn with_metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.advertisement_mut()
            .metadata
            .insert(name.into(), value.into());
        self
    }

    /// Sets whether the server advertises TLS. The flag is a hint for people and tools, and some formats write it into the scheme of a URL.
    /// The client alone decides whether it uses TLS, and which certificates it accepts.
    #[must_use]
    pub fn with_tls(mut self, tls: bool) -> Self {
        self.advertisement_mut().tls = tls;
        self
    }

    /// Sets whether the instance is a last resort. Such an instance was removed from the registry together with most others and is kept for
    /// a while. It gets calls only while no other instance is ready, and only over a connection that is already established.
    #[must_use]
    pub fn with_last_resort(mut self, last_resort: bool) -> Self {
        self.last_resort = last_resort;
        self
    }

    pub(crate) fn advertisement(&self) -> &Advertisement {
        &self.data.advertisement
    }

    /// Sets the id of the instance, and the key from which it was read.
    pub(crate) fn at(mut self, id: String, location: KeyLocation) -> Self {
        let data = Arc::make_mut(&mut self.data);
        data.id = Some(id);
        data.location = Some(location);
        self
    }

    /// Sets the instance id of an instance that has no key yet.
    pub(crate) fn with_id(mut self, id: Option<&str>) -> Self {
        Arc::make_mut(&mut self.data).id = id.map(str::to_owned);
        self
    }

    pub(crate) fn advertisement_mut(&mut self) -> &mut Advertisement {
        &mut Arc::make_mut(&mut self.data).advertisement
    }

    /// Returns the address to connect to.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.data.advertisement.address
    }

    /// Returns the weight, at least 1. If the registry value has no weight, this is the default weight of the value's
    /// [`Format`](crate::Format).
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.data.advertisement.weight
    }

    /// Returns the zone, if the registry value has one.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.data.advertisement.zone.as_deref()
    }

    /// Returns the version, if the registry value has one.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        self.data.advertisement.version.as_deref()
    }

    /// Returns the metadata: all names and values except the attributes that have methods of their own. Values that are not strings in the
    /// registry are returned as JSON text.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.data.advertisement.metadata
    }

    /// Returns whether the server advertises TLS in the registry. The flag has no effect on connections; see [`with_tls`](Self::with_tls).
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.data.advertisement.tls
    }

    /// Returns whether the registry value announces that the server is being deregistered or paused.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.data.advertisement.leaving
    }

    /// Returns whether the instance is only a last resort, see [`Instance::with_last_resort`].
    #[must_use]
    pub fn is_last_resort(&self) -> bool {
        self.last_resort
    }

    /// Returns the instance id: the part of the key after the service's prefix. Returns `None` for an instance that was not read from etcd.
    /// The only exception is the instance that [`InstanceFormat::key`](crate::format::InstanceFormat::key) receives for a registration with
    /// a configured instance id.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.data.id.as_deref()
    }

    /// Returns the key from which the instance was read, or `None` for an instance that was not read from etcd.
    ///
    /// If the lease or the create revision at an address changes, the server has registered again, with or without a restart.
    #[must_use]
    pub fn location(&self) -> Option<&KeyLocation> {
        self.data.location.as_ref()
    }
}

impl From<Advertisement> for Instance {
    fn from(advertisement: Advertisement) -> Self {
        let data = Data {
            advertisement,
            id: None,
            location: None,
        };
        Self {
            data: Arc::new(data),
            last_resort: false,
        }
    }
}

/// The attributes that a server advertises: the content of a registry value in any format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Advertisement {
    pub(crate) address: Address,
    pub(crate) weight: u32,
    pub(crate) zone: Option<String>,
    pub(crate) version: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) leaving: bool,
    /// Whether the server advertises TLS.
    pub(crate) tls: bool,
    /// The fields of the value that have no place in this struct, in the format of the value.
    pub(crate) remainder: Option<Arc<Remainder>>,
}

/// The fields of a value that have no place in an [`Advertisement`]. They are kept so that a write in the same format loses nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remainder {
    format: &'static str,
    fields: Map<String, Value>,
}

impl Advertisement {
    pub(crate) fn new(address: Address) -> Self {
        Self {
            address,
            weight: DEFAULT_WEIGHT,
            zone: None,
            version: None,
            metadata: BTreeMap::new(),
            leaving: false,
            tls: false,
            remainder: None,
        }
    }

    /// Stores the remaining fields of a value, and the name of the value's format.
    pub(crate) fn keep(&mut self, format: &'static str, fields: Map<String, Value>) {
        self.remainder = (!fields.is_empty()).then(|| Arc::new(Remainder { format, fields }));
    }

    /// Returns the remaining fields if the value was read in this format. Otherwise returns no fields.
    pub(crate) fn kept(&self, format: &'static str) -> Map<String, Value> {
        self.remainder
            .as_ref()
            .filter(|remainder| remainder.format == format)
            .map(|remainder| remainder.fields.clone())
            .unwrap_or_default()
    }

    /// Returns a description of the first attribute that differs between the two advertisements, if any. If this is the weight, the
    /// description contains the weight of `self`.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        let first = |name: &str| Some(name.to_owned());
        if self.address != other.address {
            return first("the address");
        }
        if self.weight != other.weight {
            return Some(format!("the weight {}", self.weight));
        }
        if self.zone != other.zone {
            return first("the zone");
        }
        if self.version != other.version {
            return first("the version");
        }
        if self.tls != other.tls {
            return first("the flag that the server uses TLS");
        }
        if self.leaving != other.leaving {
            return first("the leave marker");
        }
        let names = self.metadata.keys().chain(other.metadata.keys());
        names
            .into_iter()
            .find(|name| self.metadata.get(*name) != other.metadata.get(*name))
            .map(|name| format!("the metadata {name:?}"))
    }
}

/// The weight of an instance whose registry value has no weight, in formats that have no other default.
pub(crate) const DEFAULT_WEIGHT: u32 = 1;
