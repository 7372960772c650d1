//! The options for the choice of endpoints: subset, traffic split, consistent hash, load reports and a policy of the program.

use std::sync::Arc;

use tokio::sync::watch;

#[cfg(doc)]
use super::ChannelError;
use super::builder::ChannelBuilder;
use super::{LoadReports, PeerIndex, PickPolicy, TrafficSplit};
#[cfg(doc)]
use crate::balance::LbPolicy;
use crate::balance::ProvidedPolicy;

impl<S> ChannelBuilder<S> {
    /// Connects to only `size` of the endpoints (gRFC A68). Default: the channel connects to all endpoints. 0 makes the channel
    /// [invalid](ChannelError::InvalidOption). If there are fewer endpoints than `size`, all are used.
    ///
    /// The channel hashes the address of each endpoint with XXH64 and a random seed of the channel, and uses the endpoints with the smallest
    /// hashes. The subset is computed when the set of endpoints changes, never for a call. If an endpoint is added or removed, at most one
    /// endpoint of the subset changes. An endpoint that is still listed is removed from the subset only when its successor is ready.
    ///
    /// Weights and zones do not affect the choice. The [policy](Self::policy), the [zone](Self::zone), a [split](Self::split), selections
    /// and outlier detection apply within the subset. An endpoint that is a [last
    /// resort](crate::channel::Attributes::with_last_resort) does not count. It stays in the subset if it was part of it before.
    ///
    /// If an endpoint of the subset is failing for 10 s, the channel also connects to the next endpoint in the order of the hashes, until the
    /// first one is ready again. If all endpoints of the subset are failing, it does so at once. This part is not in the gRFC. There are at
    /// most `size` such additional endpoints.
    ///
    /// ```no_run
    /// use tonic_balance::BalancedChannel;
    ///
    /// # fn run() {
    /// let channel = BalancedChannel::builder()
    ///     .subset(20)
    ///     .dns("greeter.internal:50051")
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn subset(mut self, size: usize) -> Self {
        if size == 0 {
            let reason = "the size of the subset is 0, so the channel would have no endpoint";
            self.config.refuse(reason.to_owned());
        }
        self.config.options.subset_size = (size > 0).then_some(size);
        self
    }

    /// Connects to `size` of the endpoints, as [`subset`](Self::subset) does, but chooses them by the index of this client among its peers,
    /// the other clients of the same endpoints. Default: disabled. 0 makes the channel [invalid](ChannelError::InvalidOption).
    ///
    /// If all peers have the same endpoints, the same `size` and the same number of peers, the numbers of peers per endpoint differ by at
    /// most 1. The endpoints are the positions of a ring, in the order of the hashes of their addresses (XXH64, seed 0). Each peer uses `size`
    /// neighbours of the ring, from the position `index * endpoints / count` on. Choose a `size` of at least `endpoints / count`. Otherwise
    /// some endpoints have no client.
    ///
    /// While the index is `None`, the subset is that of [`subset`](Self::subset). Changes of the index take effect while the channel runs.
    /// After the sender is dropped, the last index stays valid. If an endpoint is added or removed, at most two endpoints of the subset
    /// change. If a peer joins or leaves, at most `endpoints / count` of them change, rounded up.
    ///
    /// `Resolver::peer_index` of `tonic-etcd` provides the index of a client that is registered in etcd.
    ///
    /// ```no_run
    /// use tokio::sync::watch;
    /// use tonic_balance::{BalancedChannel, channel::PeerIndex};
    ///
    /// # fn run() {
    /// // The third of 300 clients.
    /// let (peers, index) = watch::channel(PeerIndex::new(2, 300));
    /// let channel = BalancedChannel::builder()
    ///     .aperture(20, index)
    ///     .dns("greeter.internal:50051")
    ///     .connect_lazy();
    /// // One client has left.
    /// peers.send_replace(PeerIndex::new(2, 299));
    /// # }
    /// ```
    pub fn aperture(self, size: usize, peers: watch::Receiver<Option<PeerIndex>>) -> Self {
        let mut builder = self.subset(size);
        builder.config.options.peers = Some(peers);
        builder
    }

    /// Sets a policy of the program, which picks the endpoint of each attempt. If it returns `None`, the policy set with
    /// [`policy`](Self::policy) picks. Default: none. The policy receives a copy of the headers and the extensions of each call.
    pub fn pick_policy(mut self, policy: impl PickPolicy) -> Self {
        self.config.options.pick_policy = Some(ProvidedPolicy(Arc::new(policy)));
        self
    }

    /// Reads the load reports that servers send with their responses (ORCA, gRFC A51). Disabled by default.
    ///
    /// - [`LbPolicy::Latency`] counts the calls of all clients that are in flight at an endpoint, if the endpoint reports them.
    /// - [`LbPolicy::WeightedRoundRobin`] multiplies the weight of an endpoint by the weight that gRFC A58 computes from its reports.
    /// - The last report is visible to a [`PickPolicy`], and in [`EndpointStatus`](crate::channel::EndpointStatus).
    ///
    /// An endpoint that sends no reports counts as an average one. The reports of the out-of-band service of ORCA are not read.
    pub fn load_reports(mut self, reports: LoadReports) -> Self {
        self.config.load_reports = Some(reports);
        self
    }

    /// Sets the header whose value is the key of a call for [`LbPolicy::RingHash`] (gRFC A76), for example `x-customer-id`. The values of a
    /// repeated header are joined by commas. The extension [`HashKey`](crate::channel::HashKey) of a request takes precedence. Default:
    /// none. If the name is not a valid header name, the channel is [invalid](ChannelError::InvalidOption). Other policies ignore the header.
    pub fn request_hash_header(mut self, name: impl AsRef<str>) -> Self {
        match name.as_ref().parse() {
            Ok(name) => self.config.options.hash_header = Some(name),
            Err(_) => self.config.refuse(format!(
                "request_hash_header is {:?}, which is not the name of a header",
                name.as_ref()
            )),
        }
        self
    }

    /// Splits the calls between groups of endpoints, for example 5 % to a new version. Default: no split. A split that is not valid (two
    /// parts with the same labels, all weights 0, or more than 64 parts) makes the channel [invalid](ChannelError::InvalidOption).
    ///
    /// A service config can set a split as well. The [mode](Self::service_config_mode) decides which one applies.
    pub fn split(mut self, split: TrafficSplit) -> Self {
        if let Some(reason) = split.invalid_reason() {
            self.config.refuse(reason);
        }
        self.config.options.splits.of_program = split;
        self
    }
}
