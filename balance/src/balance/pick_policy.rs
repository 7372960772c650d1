//! A policy that the program provides.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::{Extensions, HeaderMap, Uri};

use super::picker::Candidate;
use super::ready_connection::ReadyEntry;
use super::ready_set::{ReadySet, Slot};
use crate::address::Address;
use crate::attributes::Attributes;
use crate::load_report::LoadReport;

/// A policy that picks an endpoint for each attempt of a call. Set it with
/// [`pick_policy`](crate::channel::ChannelBuilder::pick_policy).
///
/// Use it if the choice depends on data that only the program has, for example on the tenant of a call. To choose by labels or by a key, a
/// [`Select`](crate::channel::Select) or [`LbPolicy::RingHash`](crate::LbPolicy::RingHash) needs no code.
///
/// ```
/// use tonic_balance::channel::{PickInfo, PickPolicy, ReadyEndpoints};
///
/// /// Sends each call to the endpoints whose label `tenant` is the tenant of the call. Of these, it picks the one with the fewest calls.
/// struct ByTenant;
///
/// impl PickPolicy for ByTenant {
///     fn pick(&self, call: &PickInfo, endpoints: &ReadyEndpoints<'_>) -> Option<usize> {
///         let tenant = call.headers().get("x-tenant")?.to_str().ok()?;
///         let own = endpoints.iter().enumerate().filter(|(_, endpoint)| {
///             endpoint.is_usable() && endpoint.attributes().label("tenant") == Some(tenant)
///         });
///         own.min_by_key(|(_, endpoint)| endpoint.in_flight()).map(|(index, _)| index)
///     }
/// }
///
/// # fn run() {
/// let channel = tonic_balance::BalancedChannel::builder()
///     .pick_policy(ByTenant)
///     .addresses(["10.0.0.5:50051", "10.0.0.6:50051"])
///     .connect_lazy();
/// # }
/// ```
pub trait PickPolicy: Send + Sync + 'static {
    /// Returns the index of the endpoint for an attempt of this call. If the result is `None`, if the index is out of range, or if the
    /// endpoint cannot take the call, the [`LbPolicy`](crate::LbPolicy) of the channel picks instead.
    ///
    /// `endpoints` is never empty. It contains the ready endpoints that the call may use: those of its
    /// [`Select`](crate::channel::Select), or those of its part of the [traffic split](crate::channel::TrafficSplit). The same endpoints can
    /// have other indexes in the next call. The function is called in the task of the caller, for each attempt and each change while the call
    /// waits, so it must not block. If all streams are in use, the call waits for any stream. When one becomes free, the function is called
    /// once more; if it picks no endpoint with a free stream, the call uses that stream.
    fn pick(&self, call: &PickInfo, endpoints: &ReadyEndpoints<'_>) -> Option<usize>;
}

/// A call for which a [`PickPolicy`] picks an endpoint.
#[derive(Debug)]
pub struct PickInfo {
    uri: Uri,
    headers: HeaderMap,
    extensions: Extensions,
}

impl PickInfo {
    pub(crate) fn new(uri: Uri, headers: HeaderMap, extensions: Extensions) -> Self {
        Self {
            uri,
            headers,
            extensions,
        }
    }

    /// Returns the path of the method, for example `/helloworld.Greeter/SayHello`.
    #[must_use]
    pub fn path(&self) -> &str {
        self.uri.path()
    }

    /// Returns the headers of the request, which include its metadata.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Returns the extensions of the request.
    #[must_use]
    pub fn extensions(&self) -> &Extensions {
        &self.extensions
    }
}

/// The ready endpoints among which a [`PickPolicy`] picks. If the channel has several connections to an endpoint, each of them is an entry.
#[derive(Clone, Copy)]
pub struct ReadyEndpoints<'a> {
    set: &'a ReadySet<ReadyEntry>,
    usable: &'a dyn Fn(&ReadyEntry) -> bool,
}

impl<'a> ReadyEndpoints<'a> {
    pub(super) fn new(
        set: &'a ReadySet<ReadyEntry>,
        usable: &'a dyn Fn(&ReadyEntry) -> bool,
    ) -> Self {
        Self { set, usable }
    }

    /// Returns the number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.set.len()
    }

    /// Returns whether there are no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the entry with this index, if there is one.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<ReadyEndpoint<'a>> {
        let slot = self.set.get(index)?;
        let usable = self.usable;
        Some(ReadyEndpoint { slot, usable })
    }

    /// Returns all entries, in the order of their indexes.
    pub fn iter(&self) -> impl Iterator<Item = ReadyEndpoint<'a>> {
        let usable = self.usable;
        self.set
            .slots()
            .map(move |slot| ReadyEndpoint { slot, usable })
    }
}

impl fmt::Debug for ReadyEndpoints<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// A ready endpoint, as a [`PickPolicy`] sees it.
#[derive(Clone, Copy)]
pub struct ReadyEndpoint<'a> {
    slot: &'a Slot<ReadyEntry>,
    usable: &'a dyn Fn(&ReadyEntry) -> bool,
}

impl<'a> ReadyEndpoint<'a> {
    /// Returns the address.
    #[must_use]
    pub fn address(&self) -> &'a Address {
        self.slot.connection.connection().endpoint().address()
    }

    /// Returns the attributes: the labels, the zone and the configured weight.
    #[must_use]
    pub fn attributes(&self) -> Arc<Attributes> {
        let endpoint = self.slot.connection.connection().endpoint();
        Arc::clone(&endpoint.attributes())
    }

    /// Returns the current weight, relative to the other entries. Slow start and the preference for a zone change it.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.slot.weight
    }

    /// Returns the number of calls of this channel that are in flight on the connection.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.slot.connection.in_flight()
    }

    /// Returns the estimate of the latency that [`LbPolicy::Latency`](crate::LbPolicy::Latency) uses; `None` if no endpoint has served a call
    /// yet.
    #[must_use]
    pub fn latency(&self) -> Option<Duration> {
        let micros = self.slot.connection.latency();
        (micros > 0.0).then(|| Duration::from_secs_f32(micros / 1e6))
    }

    /// Returns the last load report of the server. `None` without [load reports](crate::channel::ChannelBuilder::load_reports), and if the
    /// server has sent none.
    #[must_use]
    pub fn load_report(&self) -> Option<Arc<LoadReport>> {
        self.slot.connection.connection().endpoint().load_report()
    }

    /// Returns false if this call must not be sent to the entry, for example because an earlier attempt failed there, or because the endpoint
    /// has as many requests as [`max_requests_per_endpoint`](crate::channel::ChannelBuilder::max_requests_per_endpoint) allows.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        (self.usable)(&self.slot.connection) && !self.slot.connection.is_limited()
    }
}

impl fmt::Debug for ReadyEndpoint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadyEndpoint")
            .field("address", self.address())
            .field("weight", &self.weight())
            .field("in_flight", &self.in_flight())
            .field("latency", &self.latency())
            .finish_non_exhaustive()
    }
}

/// The policy that the program provides.
#[derive(Clone)]
pub(crate) struct ProvidedPolicy(pub(crate) Arc<dyn PickPolicy>);

impl fmt::Debug for ProvidedPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProvidedPolicy").finish_non_exhaustive()
    }
}
