//! One registered server of a service, as the registry describes it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::keyspace::{KeyValue, LeaseId, Revision};
use tonic_balance::Address;

/// One registered server of a service.
///
/// The *address* is its identity: it is what a balancer connects to. Everything else is an attribute that may change in place without a
/// reconnect. Cloning is a reference count.
///
/// An instance that was read from etcd has an [id](Self::id) and a [location](Self::location); one made with [`Instance::new`] has neither.
///
/// ```
/// use tonic_etcd::Instance;
///
/// let instance = Instance::new("10.0.0.5:50051".parse()?).with_weight(3).with_zone("eu-1a");
/// assert_eq!(instance.weight(), 3);
/// # Ok::<(), tonic_etcd::AddressError>(())
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

/// The key at which an instance was read.
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

    /// Returns the whole etcd key. Bytes that are not UTF-8 are replaced.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns the lease that the key is attached to; `None` for a key without a lease, which does not expire.
    #[must_use]
    pub fn lease(&self) -> Option<LeaseId> {
        (self.lease != LeaseId::NONE).then_some(self.lease)
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
    /// Describes a server at `address` with the default attributes: weight 1, no zone, no version, no metadata.
    #[must_use]
    pub fn new(address: Address) -> Self {
        Self::from(Advertisement::new(address))
    }

    /// Sets the weight: its share of the calls relative to the others'. 0 counts as 1.
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

    /// Adds one pair of metadata.
    #[must_use]
    pub fn with_metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.advertisement_mut()
            .metadata
            .insert(name.into(), value.into());
        self
    }

    /// Sets whether the server says that it speaks TLS. It is a hint to people and tools, and what some formats write into the scheme
    /// of a URL: whether TLS is spoken, and with whom, is the client's decision alone.
    #[must_use]
    pub fn with_tls(mut self, tls: bool) -> Self {
        self.advertisement_mut().tls = tls;
        self
    }

    /// Marks the instance as one that has vanished from the registry together with most others and is kept for a while: to be used only
    /// while nothing else is ready, and only over a connection that is already there.
    #[must_use]
    pub fn with_last_resort(mut self, last_resort: bool) -> Self {
        self.last_resort = last_resort;
        self
    }

    pub(crate) fn advertisement(&self) -> &Advertisement {
        &self.data.advertisement
    }

    /// Adds where the instance was read.
    pub(crate) fn at(mut self, id: String, location: KeyLocation) -> Self {
        let data = Arc::make_mut(&mut self.data);
        data.id = Some(id);
        data.location = Some(location);
        self
    }

    /// Sets the instance id, for an instance whose key is yet to be made.
    pub(crate) fn with_id(mut self, id: Option<&str>) -> Self {
        Arc::make_mut(&mut self.data).id = id.map(str::to_owned);
        self
    }

    pub(crate) fn advertisement_mut(&mut self) -> &mut Advertisement {
        &mut Arc::make_mut(&mut self.data).advertisement
    }

    /// The address to connect to.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.data.advertisement.address
    }

    /// The weight, at least 1; 1 if the registry says nothing.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.data.advertisement.weight
    }

    /// The zone, if the registry names one.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.data.advertisement.zone.as_deref()
    }

    /// The version, if the registry names one.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        self.data.advertisement.version.as_deref()
    }

    /// Further metadata. Values that are not strings in the registry are their JSON text here.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.data.advertisement.metadata
    }

    /// Whether the registry says that the server speaks TLS. Nothing depends on it; see [`with_tls`](Self::with_tls).
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.data.advertisement.tls
    }

    /// Whether the instance said, in its last value, that it is about to leave.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.data.advertisement.leaving
    }

    /// Whether the instance is kept as a last resort only, see [`Instance::with_last_resort`].
    #[must_use]
    pub fn is_last_resort(&self) -> bool {
        self.last_resort
    }

    /// Returns the instance id: the part of the key after the service's prefix. `None` for an instance that was not read from etcd.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.data.id.as_deref()
    }

    /// Returns the key at which the instance was read; `None` for an instance that was not read from etcd.
    ///
    /// A new lease or create revision at the same address is a fresh registration: the server was restarted, or registered again.
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

/// What a server says of itself: the content of a registry value, whatever its format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Advertisement {
    pub(crate) address: Address,
    pub(crate) weight: u32,
    pub(crate) zone: Option<String>,
    pub(crate) version: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) leaving: bool,
    /// What the server says of its own transport.
    pub(crate) tls: bool,
    /// What the value said besides, in its own format.
    pub(crate) remainder: Option<Arc<Remainder>>,
}

/// The fields of a value that have no place in an [`Advertisement`], kept so that writing it in the same format loses nothing.
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

    /// Keeps what a format's value said besides.
    pub(crate) fn keep(&mut self, format: &'static str, fields: Map<String, Value>) {
        self.remainder = (!fields.is_empty()).then(|| Arc::new(Remainder { format, fields }));
    }

    /// What a value of this format said besides; nothing if it was read in another.
    pub(crate) fn kept(&self, format: &'static str) -> Map<String, Value> {
        self.remainder
            .as_ref()
            .filter(|remainder| remainder.format == format)
            .map(|remainder| remainder.fields.clone())
            .unwrap_or_default()
    }

    /// The first thing that the two say differently, if there is one.
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
            return first("the word that TLS is spoken");
        }
        if self.leaving != other.leaving {
            return first("the word that the server is leaving");
        }
        let names = self.metadata.keys().chain(other.metadata.keys());
        names
            .into_iter()
            .find(|name| self.metadata.get(*name) != other.metadata.get(*name))
            .map(|name| format!("the metadata {name:?}"))
    }
}

/// The weight of an instance that names none.
pub(crate) const DEFAULT_WEIGHT: u32 = 1;
